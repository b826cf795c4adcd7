"""Hostile bytes into the ext_proc machine: it may refuse them, it may never do worse.

The oracle is the protobuf runtime: what the machine takes for well-formed in the parts it reads, and
what protobuf reads there, must agree.
"""
from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import message as protobuf_message
from hypothesis import given, settings
from hypothesis import strategies as st

from native import extproc
from native.extproc import ExtProcStream, ProtocolError, RecordingHost
from tests.extproc_messages import (
    BLOCK,
    BUFFERED,
    STREAMED,
    request_body,
    request_headers,
    request_trailers,
    response_headers,
)


def full_message() -> bytes:
    """Every field that is read, and some that are not."""
    headers = [("user-agent", "x"), ("x-outrider-id", "1"), ("x-forwarded-for", "192.0.2.1, ::1")]
    message = request_headers(headers, end=False)
    message.attributes["envoy.filters.http.ext_proc"].fields["source.address"].string_value = "192.0.2.1:80"
    message.attributes["envoy.filters.http.ext_proc"].fields["n"].number_value = 1.5
    message.metadata_context.filter_metadata["x"].fields["y"].struct_value.fields["z"].bool_value = True
    message.protocol_config.request_body_mode = 1
    message.observability_mode = False
    message.request_headers.headers.headers.add(key="k", value="v")
    return message.SerializeToString()


SEEDS = [
    full_message(),
    request_body(b"a=1&b=<script>", True).SerializeToString(),
    request_body(b"", False).SerializeToString(),
    request_trailers().SerializeToString(),
    response_headers("200", [("server", "x"), ("x-outrider-score", "1")]).SerializeToString(),
]


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = extproc.counts()["streams"]
    yield
    assert extproc.counts()["streams"] == before


def run(messages: list[bytes], body_mode: int = STREAMED, action: int = 0) -> list[bytes | str | None]:
    """What each message was answered: bytes, None, or the text of the error."""
    host = RecordingHost()
    host.body_mode = body_mode
    host.limit_bytes = 100
    host.enforced = host.action = action
    host.place = b"json.\xff\x00user"
    stream = ExtProcStream(host.host_address(), host)
    answers: list[bytes | str | None] = []
    for message in messages:
        try:
            answers.append(stream.message_before_a_wall(message))
        except ProtocolError as error:
            answers.append(str(error))
    if len(messages) % 2:
        answers.append(stream.expire())
    stream.close()
    assert len(host.requests) <= 1
    assert len(host.responses) <= 1
    for answer in answers:
        if isinstance(answer, bytes):
            parsed = pb.ProcessingResponse.FromString(answer)
            assert parsed.WhichOneof("response") is not None
            assert parsed.SerializeToString(deterministic=True)
    return answers


def after(seed: int) -> list[bytes]:
    """What has to come before that seed, so that it is read and not refused for its order."""
    return [] if seed == 0 else [SEEDS[0]]


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_truncated_at_every_byte(seed: int) -> None:
    data = SEEDS[seed]
    for n in range(len(data)):
        run([*after(seed), data[:n], data])


@pytest.mark.parametrize("seed", range(len(SEEDS)))
@pytest.mark.parametrize("action", [0, BLOCK])
def test_every_bit_flipped(seed: int, action: int) -> None:
    data = SEEDS[seed]
    for i in range(len(data) * 8):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        run([*after(seed), bytes(changed), data, SEEDS[1], SEEDS[4]], action=action)


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_bytes_inserted_removed_and_doubled(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1500):
        data = bytearray(SEEDS[seed])
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data) + 1)
            kind = rng.randrange(3)
            if kind == 0:
                data[at:at] = rng.choice([b"\x80" * 12, b"\xff", b"\0", rng.randbytes(3), b"\xff" * 5])
            elif kind == 1:
                del data[at:at + rng.randint(1, 4)]
            else:
                end = min(len(data), at + rng.randint(1, 40))
                data[at:at] = data[at:end]
        run([*after(seed), bytes(data), *SEEDS], body_mode=rng.choice([0, BUFFERED, STREAMED]))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=120), min_size=1, max_size=4))
def test_random_bytes(messages: list[bytes]) -> None:
    run(messages)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(range(len(SEEDS))), max_size=8), st.sampled_from([0, BUFFERED, STREAMED]),
       st.sampled_from([0, BLOCK]))
def test_any_order_of_valid_messages(order: list[int], body_mode: int, action: int) -> None:
    run([SEEDS[i] for i in order], body_mode, action)


def tag(number: int, wire: int) -> bytes:
    return varint(number << 3 | wire)


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@pytest.mark.parametrize("junk", [
    b"\x80" * 10 + b"\x01", b"\xff" * 9 + b"\x02", b"\xff" * 20,      # varints
    b"\x00", b"\x02\x00", tag(2**29, 0)[:-1] + b"\x7f\x01",                     # field 0, tag over 32 bits
    tag(15, 3), tag(15, 4), tag(15, 3) + tag(15, 4), tag(15, 6), tag(15, 7),    # groups, no such wire type
    tag(15, 1) + bytes(7), tag(15, 5) + bytes(3), tag(15, 0),                   # truncated
    tag(15, 2) + b"\x05abcd", tag(15, 2) + varint(2**31), tag(15, 2) + varint(2**63),
    tag(15, 2) + b"\xff" * 9 + b"\x01",
    tag(2, 0) + b"\x01", tag(9, 0) + b"\x01", tag(10, 2) + b"\x00", tag(11, 5) + bytes(4),  # wrong wire type
])
def test_malformed_envelopes(junk: bytes) -> None:
    assert run([SEEDS[0] + junk])[0] == "malformed protobuf"
    assert run([junk + SEEDS[0]])[0] == "malformed protobuf"


@pytest.mark.parametrize("part", [
    tag(1, 0) + b"\x01", tag(3, 2) + b"\x00", tag(1, 2) + b"\x05a",
    tag(1, 2) + b"\x02" + tag(1, 0) + b"\x01",                                 # HeaderMap.headers as a number
    tag(1, 2) + b"\x04" + tag(1, 2) + b"\x02" + tag(1, 0) + b"\x01",            # HeaderValue.key as a number
    tag(1, 2) + b"\x04" + tag(1, 2) + b"\x02" + tag(3, 5) + b"\x01",
])
def test_malformed_headers(part: bytes) -> None:
    whole = tag(2, 2) + varint(len(part)) + part
    assert run([whole])[0] == "malformed protobuf"


def test_deep_nesting_costs_nothing() -> None:
    nested = b""
    for _ in range(50_000):
        nested = tag(5, 2) + varint(len(nested)) + nested if len(nested) < 100_000 else nested
    message = pb.ProcessingRequest.FromString(SEEDS[0])
    message.ClearField("attributes")
    value = tag(1, 2) + varint(len(nested)) + nested
    entry = tag(1, 2) + b"\x01f" + tag(2, 2) + varint(len(value)) + value
    data = message.SerializeToString() + tag(9, 2) + varint(len(entry)) + entry
    with contextlib.suppress(protobuf_message.DecodeError):
        pb.ProcessingRequest.FromString(data)
    assert isinstance(run([data])[0], bytes)


def test_message_size_is_bounded() -> None:
    padding = extproc.MESSAGE_BYTES_MAX - len(SEEDS[0])
    fits = SEEDS[0] + tag(15, 2) + varint(padding - 5) + bytes(padding - 5)
    assert len(fits) == extproc.MESSAGE_BYTES_MAX
    assert isinstance(run([fits])[0], bytes)
    assert run([fits + tag(15, 0) + b"\0"])[0] == "message too large"


def test_long_message_of_nothing_but_forged_headers() -> None:
    entry = tag(1, 2) + b"\x0b" + b"x-outrider-"
    entry = tag(1, 2) + varint(len(entry)) + entry
    start = request_headers(end=True).request_headers.headers.SerializeToString()
    count = 200_000
    headers = start + entry * count
    part = tag(1, 2) + varint(len(headers)) + headers
    answer = run([tag(2, 2) + varint(len(part)) + part])[0]
    assert isinstance(answer, bytes)
    parsed = pb.ProcessingResponse.FromString(answer)
    assert len(parsed.request_headers.response.header_mutation.remove_headers) == count


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_agrees_with_protobuf_on_changed_messages(data: st.DataObject) -> None:
    """Wherever protobuf still reads a changed first message, the host sees what protobuf sees."""
    changed = bytearray(SEEDS[0])
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        oracle = pb.ProcessingRequest.FromString(bytes(changed))
    except protobuf_message.DecodeError:
        return
    host = RecordingHost()
    stream = ExtProcStream(host.host_address(), host)
    try:
        stream.message(bytes(changed))
    except ProtocolError:
        return
    finally:
        stream.close()
    if oracle.WhichOneof("request") != "request_headers":
        assert host.requests == []
        return
    (seen,) = host.requests
    headers = oracle.request_headers.headers.headers
    pairs = [(h.key.encode(), h.raw_value or h.value.encode()) for h in headers]
    assert seen["headers"] == [(k, v) for k, v in pairs if k and not k.startswith(b":")]
    assert seen["method"] == dict(pairs)[b":method"]


def test_forged_names_that_are_no_text_do_not_spoil_the_answer() -> None:
    entry = tag(1, 2) + b"\x0d" + b"x-outrider-\xff\n" + tag(3, 2) + b"\x01v"
    head = request_headers([("x-outrider-ok", "1")]).request_headers.headers.SerializeToString()
    head += tag(1, 2) + varint(len(entry)) + entry
    part = tag(1, 2) + varint(len(head)) + head
    answer = run([tag(2, 2) + varint(len(part)) + part])[0]
    assert isinstance(answer, bytes)
    mutation = pb.ProcessingResponse.FromString(answer).request_headers.response.header_mutation
    assert list(mutation.remove_headers) == ["x-outrider-ok"]


def test_lengths_of_32_bits_do_not_wrap() -> None:
    for length in (2**32 - 1, 2**32, 2**32 + 5, 2**64 - 1, 2**64 - 5):
        for number in (2, 4, 9, 12):
            data = tag(number, 2) + varint(length) + b"abcdef"
            assert run([data])[0] == "malformed protobuf"
