"""An HTTP/2 client for tests, over plain TCP and with prior knowledge, that sends what it is told, right or wrong."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.exceptions

Fields = Sequence[tuple[str, str]]


@dataclass
class Answer:
    """status 0: the stream was reset or the connection closed."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def pseudo(method: str, path: str, authority: str = "shop") -> list[tuple[str, str]]:
    return [(":method", method), (":scheme", "http"), (":authority", authority), (":path", path)]


def ask_h2(
    port: int,
    headers: Fields,
    parts: Sequence[bytes] = (),
    trailers: Fields = (),
    end_apart: bool = False,
    timeout_s: float = 10.0,
) -> Answer:
    """One request: headers, DATA frames, trailers. end_apart: the stream is ended by an empty DATA frame."""
    settings = h2.config.H2Configuration(
        client_side=True,
        header_encoding="utf-8",
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
    )
    connection = h2.connection.H2Connection(settings)
    connection.initiate_connection()
    answer = Answer()
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as peer:
        connection.send_headers(1, headers, end_stream=not parts and not trailers and not end_apart)
        for i, part in enumerate(parts):
            last = i + 1 == len(parts) and not trailers and not end_apart
            connection.send_data(1, part, end_stream=last)
        if trailers:
            connection.send_headers(1, trailers, end_stream=True)
        elif end_apart:
            connection.send_data(1, b"", end_stream=True)
        peer.sendall(connection.data_to_send())
        try:
            while data := peer.recv(65536):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.ResponseReceived):
                        answer.headers = dict(event.headers or [])
                        answer.status = int(answer.headers.get(":status", 0))
                    elif isinstance(event, h2.events.DataReceived):
                        answer.body += event.data or b""
                    elif isinstance(
                        event, (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)
                    ):
                        return answer
                peer.sendall(connection.data_to_send())
        except (ConnectionResetError, BrokenPipeError, TimeoutError, h2.exceptions.ProtocolError):
            pass
    return answer
