"""Bodies in the ext_proc machine: when one is asked for, how it is gathered, when it is decided on."""
from __future__ import annotations

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from native import extproc
from native.extproc import RecordingHost
from tests.extproc_messages import (
    BLOCK,
    BODY_NONE,
    BODY_PART,
    BODY_WHOLE,
    BUFFERED,
    BUFFERED_PARTIAL,
    NONE,
    STREAMED,
    Mode,
    Talk,
    request_body,
    request_headers,
    request_trailers,
    response_headers,
    set_headers,
)

SHORT = ("content-length", "7")
CONTINUE_BODY = pb.ProcessingResponse(request_body=pb.BodyResponse(response=pb.CommonResponse()))


def talk_with(mode: int, limit_bytes: int = 1000) -> Talk:
    host = RecordingHost()
    host.body_mode = mode
    host.limit_bytes = limit_bytes
    return Talk(host)


def announced(mode: int, **more: int) -> pb.ProtocolConfiguration:
    return pb.ProtocolConfiguration(request_body_mode=mode, **more)


@pytest.mark.parametrize(("mode", "asked"), [
    (BUFFERED, Mode.BUFFERED), (STREAMED, Mode.STREAMED), (BUFFERED_PARTIAL, Mode.BUFFERED_PARTIAL)])
def test_body_is_asked_for_by_mode_override(mode: int, asked: int) -> None:
    talk = talk_with(mode)
    answer = talk.expect(request_headers([("x-outrider-action", "allow"), SHORT], end=False))
    assert answer.mode_override == Mode(
        response_header_mode=Mode.SEND, request_body_mode=asked, request_trailer_mode=Mode.SEND)
    # no verdict yet: what the client forged goes, nothing is set
    mutation = answer.request_headers.response.header_mutation
    assert list(mutation.remove_headers) == ["x-outrider-action"]
    assert not mutation.set_headers
    assert not answer.HasField("dynamic_metadata")
    assert talk.host.requests == []
    (planned,) = talk.host.planned
    assert planned["headers"] == [(b"x-outrider-action", b"allow"), (b"content-length", b"7")]


@pytest.mark.parametrize(("length", "asked"), [
    *((fine, Mode.BUFFERED) for fine in ("0", "1000", "0001000")),
    *((other, Mode.BUFFERED_PARTIAL) for other in ("1001", None, "", "-1", "1e2", "9999999999", str(2**64)))])
def test_only_a_body_known_to_be_short_is_asked_for_as_a_whole(length: str | None, asked: int) -> None:
    talk = talk_with(BUFFERED, 1000)
    headers = [] if length is None else [("Content-Length", length)]
    assert talk.expect(request_headers(headers, end=False)).mode_override.request_body_mode == asked


def test_override_keeps_the_response_body_mode() -> None:
    talk = talk_with(BUFFERED)
    config = announced(0, response_body_mode=Mode.STREAMED)
    answer = talk.expect(request_headers(end=False, protocol_config=config))
    assert answer.mode_override.response_body_mode == Mode.STREAMED


@pytest.mark.parametrize(("mode", "limit_bytes", "decide_now", "end"), [
    (NONE, 1000, 0, False), (BUFFERED, 0, 0, False), (BUFFERED, 1000, 1, False), (BUFFERED, 1000, 0, True),
    (9, 1000, 0, False)])
def test_no_body_is_asked_for(mode: int, limit_bytes: int, decide_now: int, end: bool) -> None:
    talk = talk_with(mode, limit_bytes)
    talk.host.decide_now = decide_now
    answer = talk.expect(request_headers(end=end))
    assert not answer.HasField("mode_override")
    assert [r["body_state"] for r in talk.host.requests] == [BODY_NONE]


@pytest.mark.parametrize("end", [True, False])  # without where trailers follow
def test_buffered_body(end: bool) -> None:
    talk = talk_with(BUFFERED)
    talk.expect(request_headers([("content-type", "application/json"), SHORT], end=False))
    answer = talk.expect(request_body(b'{"a":1}', end))
    (request,) = talk.host.requests
    assert request["body"] == b'{"a":1}'
    assert request["body_state"] == BODY_WHOLE
    assert request["body_bytes"] == 7
    assert request["path"] == b"/api/items"
    assert request["query"] == b"q=1&p=2"
    assert request["headers"] == [(b"content-type", b"application/json"), (b"content-length", b"7")]
    assert "x-outrider-score" in set_headers(answer.request_body.response.header_mutation)
    assert answer.HasField("dynamic_metadata")
    if not end:
        assert talk.expect(request_trailers()) == pb.ProcessingResponse(
            request_trailers=pb.TrailersResponse())
    assert len(talk.host.requests) == 1


def test_refusal_on_the_body() -> None:
    talk = talk_with(BUFFERED)
    talk.host.refuse(BLOCK)
    assert talk.expect(request_headers(end=False)).HasField("request_headers")
    assert talk.expect(request_body(b"evil", True)).immediate_response.status.code == 403


@pytest.mark.parametrize("chunk_bytes", [1, 3, 7, 4096])
@pytest.mark.parametrize("last", ["end", "empty end", "trailers"])
def test_streamed_body(chunk_bytes: int, last: str) -> None:
    body = bytes(range(256)) * 40
    talk = talk_with(STREAMED, 65536)
    talk.expect(request_headers([("a", "b")], end=False))
    chunks = [body[i:i + chunk_bytes] for i in range(0, len(body), chunk_bytes)]
    for chunk in chunks[:-1]:
        assert talk.expect(request_body(chunk, False)) == CONTINUE_BODY
    assert talk.host.requests == []
    if last == "end":
        answer = talk.expect(request_body(chunks[-1], True))
    else:
        assert talk.expect(request_body(chunks[-1], False)) == CONTINUE_BODY
        answer = talk.expect(request_body(b"", True) if last == "empty end" else request_trailers())
    (request,) = talk.host.requests
    assert request["body"] == body
    assert request["body_state"] == BODY_WHOLE
    assert request["headers"] == [(b"a", b"b")]
    assert answer.HasField("dynamic_metadata")
    assert answer.WhichOneof("response") == ("request_trailers" if last == "trailers" else "request_body")


@pytest.mark.parametrize("end_by", ["body", "trailers"])
def test_empty_body(end_by: str) -> None:
    talk = talk_with(STREAMED)
    talk.expect(request_headers(end=False))
    talk.expect(request_body(b"", True) if end_by == "body" else request_trailers())
    assert [r["body_state"] for r in talk.host.requests] == [BODY_NONE]


def test_refusal_in_the_trailers() -> None:
    talk = talk_with(STREAMED)
    talk.host.refuse(BLOCK)
    talk.expect(request_headers(end=False))
    assert talk.expect(request_body(b"evil", False)) == CONTINUE_BODY
    assert talk.expect(request_trailers()).HasField("immediate_response")


@pytest.mark.parametrize(("chunks", "limit_bytes"), [
    ([b"a" * 11], 10), ([b"a" * 10, b"b"], 10), ([b"a" * 6, b"b" * 6], 10),
    ([b"a" * 3000, b"b" * 3000], 4096), ([b"a" * 4096, b"b" * 4096, b"c"], 8192)])
@pytest.mark.parametrize("end", [True, False])
def test_over_the_limit_is_decided_at_once_on_the_first_part(chunks: list[bytes], limit_bytes: int,
                                                             end: bool) -> None:
    talk = talk_with(STREAMED, limit_bytes)
    cut_before = extproc.counts()["bodies_cut"]
    talk.expect(request_headers(end=False))
    for chunk in chunks[:-1]:
        talk.expect(request_body(chunk, False))
    answer = talk.expect(request_body(chunks[-1], end))
    assert answer.HasField("dynamic_metadata")
    (request,) = talk.host.requests
    assert request["body"] == b"".join(chunks)[:limit_bytes]
    assert request["body_state"] == BODY_PART
    assert request["body_bytes"] == min(len(b"".join(chunks)), request["body_bytes"])
    assert extproc.counts()["bodies_cut"] == cut_before + 1
    if not end:
        # the rest passes, and is not kept
        for _ in range(3):
            assert talk.expect(request_body(b"z" * 1000, False)) == CONTINUE_BODY
        assert talk.expect(request_body(b"z", True)) == CONTINUE_BODY
    assert len(talk.host.requests) == 1


def test_exactly_the_limit_is_whole() -> None:
    talk = talk_with(STREAMED, 10)
    talk.expect(request_headers(end=False))
    talk.expect(request_body(b"a" * 10, False))
    assert talk.host.requests == []
    talk.expect(request_body(b"", True))
    assert talk.host.requests[0]["body_state"] == BODY_WHOLE


def test_partly_buffered_body() -> None:
    for end, state in ((True, BODY_WHOLE), (False, BODY_PART)):
        talk = talk_with(BUFFERED_PARTIAL)
        talk.expect(request_headers(end=False))
        talk.expect(request_body(b"abc", end))
        assert talk.host.requests[0]["body_state"] == state


@pytest.mark.parametrize("headers", [[], [("content-length", "9")]])
def test_proxy_that_keeps_streaming_is_not_taken_for_a_buffering_one(headers: list[tuple[str, str]]) -> None:
    talk = talk_with(BUFFERED)
    talk.expect(request_headers(headers, end=False, protocol_config=announced(Mode.STREAMED)))
    talk.expect(request_body(b"harm", False))
    assert talk.host.requests == []
    talk.expect(request_body(b"less?", True))
    assert talk.host.requests[0]["body"] == b"harmless?"


def test_the_limit_has_a_maximum() -> None:
    talk = talk_with(STREAMED, 2**32 - 1)
    talk.expect(request_headers(end=False))
    chunk = b"x" * 300_000
    for _ in range(5):
        talk.expect(request_body(chunk, False))
    (request,) = talk.host.requests
    assert len(request["body"]) == extproc.BODY_BYTES_MAX
    assert request["body_state"] == BODY_PART
    assert request["body_bytes"] == 1_200_000


def test_stream_that_ends_in_its_body_is_decided_on_what_came() -> None:
    talk = talk_with(STREAMED)
    talk.expect(request_headers(end=False))
    talk.expect(request_body(b"abc", False))
    talk.stream.close()
    (request,) = talk.host.requests
    assert (request["body"], request["body_state"]) == (b"abc", BODY_PART)
    assert talk.host.responses == []


@pytest.mark.parametrize("blocked", [False, True])
def test_expiry_decides_on_what_came(blocked: bool) -> None:
    talk = talk_with(STREAMED)
    if blocked:
        talk.host.refuse(BLOCK)
    assert talk.stream.expire() is None
    talk.expect(request_headers(end=False))
    talk.expect(request_body(b"abc", False))
    answer = talk.stream.expire()
    (request,) = talk.host.requests
    assert (request["body"], request["body_state"]) == (b"abc", BODY_PART)
    assert (answer is not None) == blocked
    if answer is not None:
        assert pb.ProcessingResponse.FromString(answer).HasField("immediate_response")
    assert talk.stream.expire() is None
    talk.stream.close()
    assert len(talk.host.requests) == 1
    with pytest.raises(ValueError, match="closed"):
        talk.stream.expire()


def test_stream_that_is_dropped_asks_nobody() -> None:
    talk = talk_with(STREAMED)
    before = extproc.counts()["streams"]
    talk.expect(request_headers(end=False))
    host = talk.host
    del talk
    assert host.requests == []
    assert extproc.counts()["streams"] == before - 1


@pytest.mark.parametrize("blocked", [False, True])
def test_response_before_the_body_has_ended(blocked: bool) -> None:
    """The upstream was quick, or allow_mode_override is off and no body will ever come."""
    talk = talk_with(STREAMED)
    if blocked:
        talk.host.refuse(BLOCK)
    before = extproc.counts()["late_decisions"]
    talk.expect(request_headers(end=False))
    answer = talk.expect(response_headers("200"))
    assert [r["body_state"] for r in talk.host.requests] == [BODY_PART]
    assert extproc.counts()["late_decisions"] == before + 1
    assert answer.WhichOneof("response") == ("immediate_response" if blocked else "response_headers")
    assert [r[1:] for r in talk.host.responses] == ([] if blocked else [(200, 0)])
    if not blocked:
        # the rest of the request still passes
        assert talk.expect(request_body(b"x", True)) == CONTINUE_BODY
        assert len(talk.host.requests) == 1


def test_observing_stream_waits_only_for_a_body_that_comes_anyway() -> None:
    talk = talk_with(STREAMED)
    assert talk.say(request_headers(end=False, observability_mode=True)) is None
    assert len(talk.host.requests) == 1
    talk = talk_with(STREAMED)
    assert talk.say(request_headers(end=False, observability_mode=True,
                                    protocol_config=announced(Mode.STREAMED))) is None
    assert talk.host.requests == []
    body = request_body(b"abc", True)
    body.observability_mode = True
    assert talk.say(body) is None
    assert talk.host.requests[0]["body"] == b"abc"


def test_exhausted_buffers_mean_a_decision_on_less() -> None:
    before = extproc.limit_buffers(0)
    try:
        talk = talk_with(STREAMED, 100_000)
        counted = extproc.counts()["no_buffer"]
        answer = talk.expect(request_headers([("a", "b")], end=False))
        # not even the headers could be kept: decided on them alone
        assert not answer.HasField("mode_override")
        assert talk.host.requests[0]["headers"] == [(b"a", b"b")]
        assert talk.host.requests[0]["body_state"] == BODY_PART
        extproc.limit_buffers(8192)
        talk = talk_with(STREAMED, 100_000)
        talk.expect(request_headers([("a", "b")], end=False))
        talk.expect(request_body(b"x" * 4000, False))
        talk.expect(request_body(b"y" * 4000, False))
        (request,) = talk.host.requests
        assert request["body"] == b"x" * 4000 + b"y" * 96
        assert request["body_state"] == BODY_PART
        assert extproc.counts()["no_buffer"] == counted + 2
        assert extproc.counts()["buffer_bytes"] <= 8192
    finally:
        extproc.limit_buffers(before)


def test_nothing_is_made_in_steady_state() -> None:
    def one() -> None:
        talk = talk_with(STREAMED, 65536)
        talk.expect(request_headers([("a", "b" * 100)], end=False))
        for i in range(10):
            talk.expect(request_body(b"x" * 3000, i == 9))
        talk.stream.close()

    one()
    before = extproc.counts()
    for _ in range(50):
        one()
    after = extproc.counts()
    assert after["buffer_bytes"] == before["buffer_bytes"]
    assert after["streams_made"] == before["streams_made"]
    assert after["streams"] == before["streams"]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=700), max_size=12), st.integers(1, 3000),
       st.sampled_from(["end", "trailers", "close"]), st.sampled_from([BUFFERED, STREAMED]))
def test_any_chunks_make_the_same_body(chunks: list[bytes], limit_bytes: int, end_by: str, mode: int) -> None:
    talk = talk_with(mode, limit_bytes)
    talk.expect(request_headers([("k", "v")], end=False, protocol_config=announced(Mode.STREAMED)))
    for chunk in chunks:
        talk.expect(request_body(chunk, False))
    if end_by == "end":
        talk.expect(request_body(b"", True))
    elif end_by == "trailers":
        talk.expect(request_trailers())
    talk.stream.close()
    body = b"".join(chunks)
    (request,) = talk.host.requests
    assert request["body"] == body[:limit_bytes]
    whole = len(body) <= limit_bytes and end_by != "close"
    assert request["body_state"] == (BODY_PART if not whole else BODY_WHOLE if body else BODY_NONE)
    assert request["headers"] == [(b"k", b"v")]
    assert request["method"] == b"GET"
