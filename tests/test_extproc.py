"""The ext_proc machine, message by message, against Envoy's compiled API messages."""
from __future__ import annotations

import ipaddress

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import json_format, struct_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from native import extproc
from native.extproc import ProtocolError, RecordingHost
from tests.extproc_messages import (
    ALLOW,
    BLOCK,
    BODY_NONE,
    BODY_WHOLE,
    CHALLENGE,
    PSEUDO,
    TAG,
    THROTTLE,
    Talk,
    request_body,
    request_headers,
    request_trailers,
    response_headers,
    set_headers,
)


def mapped(text: str) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if address.version == 6 else bytes(10) + b"\xff\xff" + address.packed


@pytest.mark.parametrize("raw", [True, False])
def test_headers_reach_the_host(raw: bool) -> None:
    talk = Talk()
    talk.expect(request_headers([("user-agent", "curl"), ("cookie", "a=b"), ("cookie", "c=d")], raw=raw))
    (request,) = talk.host.requests
    assert request["method"] == b"GET"
    assert request["path"] == b"/api/items"
    assert request["query"] == b"q=1&p=2"
    assert request["authority"] == b"shop.example"
    assert request["scheme"] == b"https"
    assert request["headers"] == [(b"user-agent", b"curl"), (b"cookie", b"a=b"), (b"cookie", b"c=d")]
    assert request["body_state"] == BODY_NONE
    assert request["address"] is None
    assert talk.host.planned == []


@pytest.mark.parametrize(("path", "before", "query"), [
    ("/", b"/", b""), ("/?", b"/", b""), ("/a?b?c", b"/a", b"b?c"), ("?x", b"", b"x"), ("*", b"*", b"")])
def test_path_is_split_at_the_first_question_mark(path: str, before: bytes, query: bytes) -> None:
    talk = Talk()
    talk.expect(request_headers(pseudo=[(":method", "GET"), (":path", path)]))
    assert (talk.host.requests[0]["path"], talk.host.requests[0]["query"]) == (before, query)


def test_allowed_request_continues_with_the_verdict_towards_the_upstream() -> None:
    talk = Talk()
    talk.host.score = 0.12345
    talk.host.id = 0xDEADBEEF
    answer = talk.expect(request_headers())
    assert answer.WhichOneof("response") == "request_headers"
    common = answer.request_headers.response
    assert common.status == pb.CommonResponse.CONTINUE
    assert not common.HasField("body_mutation")
    assert not common.clear_route_cache
    assert set_headers(common.header_mutation) == {
        "x-outrider-score": "0.1235", "x-outrider-action": "allow", "x-outrider-id": "00000000deadbeef"}
    assert not common.header_mutation.remove_headers
    assert not answer.HasField("mode_override")


@pytest.mark.parametrize(("score", "text"), [
    (0.0, "0.0000"), (1.0, "1.0000"), (7.0, "1.0000"), (-1.0, "0.0000"), (float("nan"), "0.0000"),
    (float("inf"), "1.0000"), (0.99996, "1.0000"), (0.5, "0.5000"), (0.00004, "0.0000")])
def test_score_header_is_always_between_0_and_1(score: float, text: str) -> None:
    talk = Talk()
    talk.host.score = score
    answer = talk.expect(request_headers())
    assert set_headers(answer.request_headers.response.header_mutation)["x-outrider-score"] == text
    assert 0 <= answer.dynamic_metadata.fields["outrider"].struct_value.fields["score"].number_value <= 1


@pytest.mark.parametrize("action", [ALLOW, TAG, BLOCK])
@pytest.mark.parametrize("headers", [0, 1, 2])
@pytest.mark.parametrize("metadata", [0, 1, 2])
def test_who_is_told(action: int, headers: int, metadata: int) -> None:
    """0 nothing, 1 what isn't plainly allowed, 2 all. What a client sends under our names never gets through."""
    talk = Talk(RecordingHost(tell_upstream=headers, tell_proxy=metadata))
    talk.host.refuse(action)
    answer = talk.expect(request_headers([("x-outrider-action", "forged"), ("X-Outrider-Other", "x")]))
    assert answer.HasField("dynamic_metadata") == (metadata == 2 or (metadata == 1 and action != ALLOW))
    if action == BLOCK:
        assert answer.HasField("immediate_response")
        return
    mutation = answer.request_headers.response.header_mutation
    told = headers == 2 or (headers == 1 and action != ALLOW)
    assert (set_headers(mutation).get("x-outrider-action") is not None) == told
    removed = {name.lower() for name in mutation.remove_headers}
    assert "x-outrider-other" in removed
    assert ("x-outrider-action" in removed) != told


def test_metadata_names_the_verdict() -> None:
    talk = Talk()
    host = talk.host
    host.action, host.enforced, host.mode, host.score, host.route = BLOCK, TAG, 0, 0.75, 7
    host.route_name = b"orders"
    host.reasons, host.place, host.id = [2, 36], b"query.q", 1
    answer = talk.expect(request_headers())
    assert json_format.MessageToDict(answer.dynamic_metadata) == {"outrider": {
        "action": "block", "enforced": "tag", "mode": "observe", "score": 0.75, "route": "orders",
        "id": "0000000000000001", "reasons": ["sql_injection", "request_flood"], "place": "query.q"}}
    # what is carried out, not what would have been
    assert set_headers(answer.request_headers.response.header_mutation)["x-outrider-action"] == "tag"


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_hostile_place_is_escaped_in_metadata(place: bytes) -> None:
    talk = Talk()
    talk.host.place = place
    answer = talk.expect(request_headers())
    text = answer.dynamic_metadata.fields["outrider"].struct_value.fields["place"].string_value
    assert all(32 <= ord(c) < 127 for c in text)
    assert text.encode().decode("unicode_escape").encode("latin-1") == place[:96]


@pytest.mark.parametrize(("action", "status", "name", "grpc"), [
    (BLOCK, 403, "outrider_block", 7), (THROTTLE, 429, "outrider_throttle", 8),
    (CHALLENGE, 403, "outrider_challenge", 7)])
def test_refusal_is_an_immediate_response(action: int, status: int, name: str, grpc: int) -> None:
    talk = Talk()
    talk.host.refuse(action)
    talk.host.body, talk.host.content_type = b'{"title":"no"}', b"application/problem+json"
    talk.host.retry_after_s = 30
    answer = talk.expect(request_headers())
    assert answer.WhichOneof("response") == "immediate_response"
    refusal = answer.immediate_response
    assert refusal.status.code == status
    assert refusal.body == b'{"title":"no"}'
    assert refusal.details == name
    assert not refusal.HasField("grpc_status")
    assert set_headers(refusal.headers) == {
        "content-type": "application/problem+json", "cache-control": "no-store", "retry-after": "30"}
    assert answer.dynamic_metadata.fields["outrider"].struct_value.fields["action"].string_value == name[9:]
    # whatever was on its way is ignored
    assert talk.say(request_body(b"x", True)) is None
    assert talk.say(b"\xff\xff") is None
    talk.stream.close()
    assert len(talk.host.requests) == 1
    assert talk.host.responses == []

    talk = Talk(talk.host)
    refusal = talk.expect(request_headers([("content-type", "application/grpc+proto")])).immediate_response
    assert refusal.grpc_status.status == grpc
    assert refusal.body == b""
    assert set_headers(refusal.headers) == {"cache-control": "no-store", "retry-after": "30"}


@pytest.mark.parametrize(("given_status", "sent"), [(451, 451), (99, 403), (600, 403), (0, 403), (503, 503)])
def test_refusal_status_is_one_that_a_proxy_accepts(given_status: int, sent: int) -> None:
    talk = Talk()
    talk.host.refuse(BLOCK)
    talk.host.status = given_status
    assert talk.expect(request_headers()).immediate_response.status.code == sent


def test_refusal_without_extras() -> None:
    talk = Talk()
    talk.host.refuse(BLOCK)
    talk.host.content_type = b"text/html\r\nx: y"
    talk.host.body = b"x" * (extproc.REFUSAL_BYTES_MAX + 1)
    refusal = talk.expect(request_headers()).immediate_response
    assert set_headers(refusal.headers) == {"cache-control": "no-store"}
    assert refusal.body == b""
    talk = Talk(talk.host)
    talk.host.body = b"x" * extproc.REFUSAL_BYTES_MAX
    assert len(talk.expect(request_headers()).immediate_response.body) == extproc.REFUSAL_BYTES_MAX


def test_response_half() -> None:
    talk = Talk()
    talk.host.id = 5
    talk.expect(request_headers())
    answer = talk.expect(response_headers("404", [("x-outrider-score", "1"), ("server", "x")]))
    assert answer.WhichOneof("response") == "response_headers"
    mutation = answer.response_headers.response.header_mutation
    assert list(mutation.remove_headers) == ["x-outrider-score"]
    assert not mutation.set_headers
    ((decision, status, response_us),) = talk.host.responses
    assert (decision, status) == (5, 404)
    assert 0 <= response_us < 60_000_000
    body = talk.expect(pb.ProcessingRequest(response_body=pb.HttpBody(body=b"x")))
    assert body == pb.ProcessingResponse(
        response_body=pb.BodyResponse(response=pb.CommonResponse()))
    trailers = talk.expect(pb.ProcessingRequest(response_trailers=pb.HttpTrailers()))
    assert trailers == pb.ProcessingResponse(response_trailers=pb.TrailersResponse())
    with pytest.raises(ProtocolError, match="response headers twice"):
        talk.say(response_headers())
    assert len(talk.host.responses) == 1


def test_response_without_our_headers_is_left_alone() -> None:
    talk = Talk()
    # the client's own do not count for the response
    talk.expect(request_headers([("x-outrider-a", "1")]))
    answer = talk.expect(response_headers())
    assert answer == pb.ProcessingResponse(
        response_headers=pb.HeadersResponse(response=pb.CommonResponse()))


def test_response_of_another_filter_comes_without_a_request() -> None:
    talk = Talk()
    assert talk.expect(response_headers("401", [("X-Outrider-Id", "1")])).HasField("response_headers")
    assert talk.host.requests == []
    assert talk.host.responses == []
    with pytest.raises(ProtocolError, match="request part after the response headers"):
        talk.say(request_headers())


@pytest.mark.parametrize("status", ["", "20", "abc", "2000", "-20", "099"])
def test_response_without_a_valid_status(status: str) -> None:
    talk = Talk()
    talk.expect(request_headers())
    with pytest.raises(ProtocolError, match=":status"):
        talk.say(response_headers(status))


def test_client_sent_headers_are_overwritten_or_removed() -> None:
    talk = Talk()
    forged = [("x-outrider-action", "allow"), ("x-outrider-foo", "1"), ("x_outrider_score", "0"),
              ("X-Outrider-Id", "7"), ("x-outrider-", ""), ("x-outriders", "keep"), ("x-outrider", "keep")]
    mutation = talk.expect(request_headers(forged)).request_headers.response.header_mutation
    assert sorted(mutation.remove_headers) == ["x-outrider-", "x-outrider-foo", "x_outrider_score"]
    assert set(set_headers(mutation)) == {"x-outrider-action", "x-outrider-score", "x-outrider-id"}


def test_client_sent_headers_are_removed_however_many_there_are() -> None:
    talk = Talk()
    padding = [(f"x-pad-{i}", "y" * 300) for i in range(300)]
    forged = [(f"x-outrider-{i}", "1") for i in range(2000)]
    answer = talk.expect(request_headers([*padding, *forged]))
    removed = answer.request_headers.response.header_mutation.remove_headers
    assert sorted(removed) == sorted(name for name, _ in forged)
    (request,) = talk.host.requests
    assert len(request["headers"]) == 128
    assert request["headers_dropped"] == 300 + 2000 - 128


def test_header_bytes_are_bounded() -> None:
    talk = Talk()
    headers = [("a", "x" * 60_000), ("b", "y" * 60_000), ("c", "z")]
    before = extproc.counts()["headers_dropped"]
    talk.expect(request_headers(headers))
    (request,) = talk.host.requests
    assert [name for name, _ in request["headers"]] == [b"a", b"c"]
    assert request["headers_dropped"] == 1
    assert extproc.counts()["headers_dropped"] == before + 1

    talk = Talk()
    talk.expect(request_headers([("a", "b")], pseudo=[(":method", "GET"), (":path", "/" + "p" * 100_000)]))
    (request,) = talk.host.requests
    assert request["path"] == b"/" + b"p" * (extproc.HEADER_BYTES_MAX - 4)
    assert request["headers"] == []
    assert request["headers_dropped"] == 2


def test_observability_mode_says_nothing_and_still_decides() -> None:
    talk = Talk()
    talk.host.refuse(BLOCK)
    assert talk.say(request_headers(observability_mode=True)) is None
    response = response_headers()
    response.observability_mode = True
    assert talk.say(response) is None
    assert len(talk.host.requests) == 1
    assert [status for _, status, _ in talk.host.responses] == [200]


@pytest.mark.parametrize(("messages", "reason"), [
    ([request_body(b"x", True)], "request body before request headers"),
    ([request_trailers()], "request trailers before request headers"),
    ([request_headers(), request_headers()], "request headers twice"),
    ([request_headers(), request_body(b"", True)], "after the end of the request"),
    ([request_headers(end=False), request_body(b"", True), request_body(b"", True)], "after the end"),
    ([request_headers(end=False), request_body(b"", True), request_trailers()], "after the end"),
    ([request_headers(end=False), request_trailers(), request_trailers()], "after the end"),
    ([pb.ProcessingRequest()], "without a known part"),
    ([pb.ProcessingRequest(observability_mode=True)], "without a known part"),
    ([request_headers(pseudo=[(":path", "/")])], "no :method"),
    ([request_headers(pseudo=[(":method", ""), (":path", "/")])], "no :method"),
    ([request_headers(pseudo=[(":method", "GET")])], "no :path"),
    ([request_headers(pseudo=[(":method", "GET"), (":path", "")])], "no :path"),
    *([([request_headers(pseudo=[*PSEUDO, pair])], "pseudo header twice") for pair in PSEUDO]),
    ([request_headers(protocol_config=pb.ProtocolConfiguration(request_body_mode=4))], "full duplex"),
    ([request_headers(protocol_config=pb.ProtocolConfiguration(response_body_mode=5))], "full duplex"),
])
def test_order_and_content_errors(messages: list[pb.ProcessingRequest], reason: str) -> None:
    talk = Talk()
    for message in messages[:-1]:
        talk.expect(message)
    for _ in range(2):  # it stays so
        with pytest.raises(ProtocolError, match=reason):
            talk.say(messages[-1])
    talk.stream.close()


def test_connect_has_no_path() -> None:
    talk = Talk()
    talk.expect(request_headers(pseudo=[(":method", "CONNECT"), (":authority", "a:443")]))
    assert talk.host.requests[0]["path"] == b""


def test_closed_stream() -> None:
    talk = Talk()
    talk.stream.close()
    talk.stream.close()
    with pytest.raises(ValueError, match="closed"):
        talk.say(request_headers())
    assert talk.host.requests == []


def test_unknown_and_ignored_fields_are_skipped() -> None:
    message = request_headers(end=True)
    message.metadata_context.filter_metadata["x"].fields["y"].string_value = "z"
    data = message.SerializeToString()
    unknown = b"\xf8\x07\x01" + b"\xfa\x07\x03abc" + b"\xf9\x07" + bytes(8) + b"\xfd\x07" + bytes(4)
    talk = Talk()
    assert talk.expect(unknown + data + unknown).HasField("request_headers")


def test_of_different_parts_the_last_one_counts_and_equal_ones_are_merged() -> None:
    first = request_headers([("a", "1")], end=True).SerializeToString()
    more = pb.ProcessingRequest(request_headers=pb.HttpHeaders(end_of_stream=True)).SerializeToString()
    more += request_headers([("b", "2")], pseudo=[], end=False).SerializeToString()
    body = request_body(b"x", True).SerializeToString()
    talk = Talk()
    talk.expect(first + more)
    assert talk.host.requests[0]["headers"] == [(b"a", b"1"), (b"b", b"2")]
    talk = Talk()
    talk.expect(body + first)
    assert talk.host.requests[0]["headers"] == [(b"a", b"1")]
    with pytest.raises(ProtocolError, match="body before"):
        Talk().say(first + body)


def attributes(**fields: str) -> dict[str, struct_pb2.Struct]:
    result = struct_pb2.Struct()
    for name, value in fields.items():
        result.fields[name.replace("__", ".")].string_value = value
    result.fields["deep"].struct_value.fields["list"].list_value.values.add(number_value=1)
    return {"envoy.filters.http.ext_proc": result}


@pytest.mark.parametrize(("hops", "header", "headers", "attribute", "expected"), [
    (0, b"", [], None, None),
    (0, b"", [("x-forwarded-for", "192.0.2.1")], None, "192.0.2.1"),
    (0, b"", [("x-forwarded-for", "6.6.6.6, 192.0.2.1")], None, "192.0.2.1"),
    (0, b"", [("x-forwarded-for", "6.6.6.6"), ("X-Forwarded-For", "192.0.2.1 ,, ")], None, "192.0.2.1"),
    (1, b"", [("x-forwarded-for", "6.6.6.6, 192.0.2.1,10.0.0.1")], None, "192.0.2.1"),
    (1, b"", [("x-forwarded-for", "6.6.6.6,192.0.2.1"), ("x-forwarded-for", "10.0.0.1")], None, "192.0.2.1"),
    (3, b"", [("x-forwarded-for", "192.0.2.1,10.0.0.1")], None, "192.0.2.1"),
    (0, b"", [("x-forwarded-for", "192.0.2.1, unknown")], None, None),
    (0, b"", [("x-forwarded-for", "6.6.6.6")], "192.0.2.9:4711", "192.0.2.9"),
    (0, b"X-Forwarded-For", [("x-forwarded-for", "6.6.6.6")], "[2001:db8::1]:4711", "2001:db8::1"),
    (1, b"", [("x-forwarded-for", "192.0.2.1, 10.0.0.1")], "10.0.0.2:1", "192.0.2.1"),
    (1, b"", [("x-forwarded-for", "junk, 10.0.0.1")], "10.0.0.2:1", "10.0.0.2"),
    (0, b"CF-Connecting-IP", [("cf-connecting-ip", "2001:db8::2"), ("x-forwarded-for", "6.6.6.6")],
     "10.0.0.2:1", "2001:db8::2"),
    (0, b"cf-connecting-ip", [("x-forwarded-for", "6.6.6.6")], None, None),
    (0, b"", [("x-forwarded-for", "192.0.2.1")], "junk", "192.0.2.1"),
])
def test_client_address(hops: int, header: bytes, headers: list[tuple[str, str]], attribute: str | None,
                        expected: str | None) -> None:
    talk = Talk(RecordingHost(hops, header))
    extra = {"attributes": attributes(source__address=attribute)} if attribute else {}
    talk.expect(request_headers(headers, **extra))
    found = talk.host.requests[0]["address"]
    assert found == (None if expected is None else mapped(expected))


def test_address_is_found_behind_padding() -> None:
    talk = Talk()
    headers = [(f"x-pad-{i}", "y" * 500) for i in range(200)] + [("x-forwarded-for", "192.0.2.1")]
    talk.expect(request_headers(headers))
    assert talk.host.requests[0]["address"] == mapped("192.0.2.1")


def test_empty_allow_answer_for_unasked_body_and_trailers() -> None:
    talk = Talk()
    talk.expect(request_headers(end=False))
    assert talk.expect(request_body(b"x", False)) == pb.ProcessingResponse(
        request_body=pb.BodyResponse(response=pb.CommonResponse()))
    assert talk.expect(request_trailers()) == pb.ProcessingResponse(request_trailers=pb.TrailersResponse())
    assert len(talk.host.requests) == 1


name_text = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1,
                    max_size=30)


@settings(deadline=None)
@given(st.lists(st.tuples(name_text, st.binary(max_size=60)), max_size=20), st.text(min_size=1, max_size=40),
       st.text(min_size=1, max_size=40), st.booleans(), st.sampled_from([ALLOW, TAG, THROTTLE, BLOCK]))
def test_any_headers_arrive_as_sent(headers: list[tuple[str, bytes]], method: str, path: str, end: bool,
                                    action: int) -> None:
    talk = Talk()
    talk.host.enforced = talk.host.action = action
    answer = talk.expect(request_headers(headers, pseudo=[(":method", method), (":path", path)], end=end))
    (request,) = talk.host.requests
    assert request["headers"] == [(name.encode(), value) for name, value in headers]
    assert request["method"] == method.encode()
    before, _, query = path.encode().partition(b"?")
    assert (request["path"], request["query"]) == (before, query)
    kind = "immediate_response" if action >= THROTTLE else "request_headers"
    assert answer.WhichOneof("response") == kind
    assert request["body_state"] != BODY_WHOLE
