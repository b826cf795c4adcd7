"""Builders of ext_proc messages from Envoy's own compiled API, and a reader of the answers."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from native.extproc import ExtProcStream, RecordingHost

ALLOW, TAG, THROTTLE, CHALLENGE, BLOCK = range(5)
BODY_NONE, BODY_WHOLE, BODY_PART = range(3)
NONE, BUFFERED, STREAMED, BUFFERED_PARTIAL = range(4)
Mode = processing_mode_pb2.ProcessingMode
OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
Pairs = Sequence[tuple[str, str | bytes]]

PSEUDO: Pairs = ((":method", "GET"), (":path", "/api/items?q=1&p=2"), (":authority", "shop.example"),
                 (":scheme", "https"))


def header_map(pairs: Pairs, raw: bool = True) -> base_pb2.HeaderMap:
    result = base_pb2.HeaderMap()
    for name, value in pairs:
        data = value if isinstance(value, bytes) else value.encode()
        if raw:
            result.headers.add(key=name, raw_value=data)
        else:
            result.headers.add(key=name, value=data.decode())
    return result


def request_headers(extra: Pairs = (), *, pseudo: Pairs = PSEUDO, end: bool = True, raw: bool = True,
                    **fields: Any) -> pb.ProcessingRequest:
    headers = header_map([*pseudo, *extra], raw)
    return pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=headers, end_of_stream=end), **fields)


def request_body(body: bytes, end: bool) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=end))


def request_trailers(pairs: Pairs = (("x-checksum", "1"),)) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_trailers=pb.HttpTrailers(trailers=header_map(pairs)))


def response_headers(status: str = "200", extra: Pairs = ()) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(
        response_headers=pb.HttpHeaders(headers=header_map([(":status", status), *extra])))


class Talk:
    """A stream with its host; say() speaks pb2 both ways."""

    def __init__(self, host: RecordingHost | None = None) -> None:
        self.host = host or RecordingHost()
        self.stream = ExtProcStream(self.host.host_address(), self.host)

    def say(self, message: pb.ProcessingRequest | bytes) -> pb.ProcessingResponse | None:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        answer = self.stream.message(data)
        return None if answer is None else pb.ProcessingResponse.FromString(answer)

    def expect(self, message: pb.ProcessingRequest | bytes) -> pb.ProcessingResponse:
        answer = self.say(message)
        assert answer is not None
        return answer


def set_headers(mutation: pb.HeaderMutation) -> dict[str, str]:
    """What a mutation sets; every option must overwrite."""
    assert all(o.append_action == OVERWRITE for o in mutation.set_headers)
    assert not any(o.HasField("append") or o.header.value for o in mutation.set_headers)
    result = {o.header.key: o.header.raw_value.decode() for o in mutation.set_headers}
    assert len(result) == len(mutation.set_headers)
    return result
