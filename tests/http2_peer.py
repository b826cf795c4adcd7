"""A peer of the native transport that keeps to HTTP/2 only as far as a test wants it to.

The server runs in the test's own thread, one step at a time, at the other end of a socket pair:
nothing here waits for anything but the clock of the limits under test.
"""
from __future__ import annotations

import socket
import time
from collections import defaultdict
from typing import Any, ClassVar

import h2.config
import h2.connection
import h2.events
import h2.settings
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hyperframe.frame import GoAwayFrame

from native.extproc import RecordingHost
from native.http2 import Server
from sidecar.serve.transport import SERVICE

PROCESS = f"/{SERVICE}/Process"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
LIMITS = {"connections": 4, "streams": 300, "message_bytes": 100_000, "memory_bytes": 1 << 20, "idle_s": 60.0,
          "keepalive_s": 30.0, "keepalive_timeout_s": 10.0}
WINDOW = h2.settings.SettingCodes.INITIAL_WINDOW_SIZE


def frame(message: Any, flag: int = 0) -> bytes:
    """A gRPC message: flag, length, bytes."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return bytes([flag]) + len(data).to_bytes(4, "big") + data


class Served(Server):  # type: ignore[misc]
    """A server of one thread that nobody runs: the test steps it."""

    host: RecordingHost


def serve(**limits: Any) -> Served:
    host = RecordingHost()
    server = Served([host], -1, **{**LIMITS, **limits})
    server.host = host
    return server


def until(server: Served, condition: Any, within_s: float = 5.0) -> None:
    """Steps the server until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, server.stats()
        server.step(5)


def dead(peer: socket.socket) -> bool:
    """Has the server closed its side? What it had still sent is thrown away."""
    try:
        while True:
            if peer.recv(1 << 16) == b"":
                return True
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


class Peer:
    """A client on h2. read() takes what has come; data, trailers, resets and others are by stream."""

    made: ClassVar[list[socket.socket]] = []  # a test closes them at its end

    def __init__(self, server: Served, window: int | None = None, shake_hands: bool = True,
                 buffer_bytes: int | None = None) -> None:
        self.server = server
        mine, theirs = socket.socketpair()
        mine.setblocking(False)
        if buffer_bytes is not None:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        server.adopt(theirs.detach())
        self.socket = mine
        Peer.made.append(mine)
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.acknowledges = window is None  # else the test opens the window itself
        if window is not None:
            self.h2.local_settings.update({WINDOW: window})
            self.h2.local_settings.acknowledge()
        # h2 would call it a day; the server still has things to say
        self.h2._frame_dispatch_table[GoAwayFrame] = lambda _: ([], [h2.events.ConnectionTerminated()])
        self.data: dict[int, bytes] = defaultdict(bytes)
        self.headers: dict[int, dict[bytes, bytes]] = defaultdict(dict)
        self.resets: dict[int, int] = {}
        self.ended: set[int] = set()
        self.events: list[Any] = []
        self.closed = False
        if shake_hands:
            self.h2.initiate_connection()
            self.flush()
            self.read()

    def flush(self) -> None:
        """Sends all that h2 has to say, stepping the server where the socket is full."""
        data = self.h2.data_to_send()
        deadline = time.monotonic() + 20
        while data and not self.closed:
            assert time.monotonic() < deadline
            try:
                data = data[self.socket.send(data):]
            except BlockingIOError:
                self.server.step()
            except (BrokenPipeError, ConnectionResetError):
                self.closed = True

    def read(self, steps: int = 3) -> None:
        """Lets the server work and takes what it says."""
        for _ in range(steps):
            self.server.step()
            while True:
                try:
                    got = self.socket.recv(1 << 20)
                except BlockingIOError:
                    break
                except ConnectionResetError:
                    got = b""
                if got == b"":
                    self.closed = True
                    return
                self.take(self.h2.receive_data(got))
            self.flush()

    def take(self, events: list[Any]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                self.data[event.stream_id] += event.data
                if self.acknowledges:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                self.headers[event.stream_id].update(dict(event.headers))
            elif isinstance(event, h2.events.StreamReset):
                self.resets[event.stream_id] = int(event.error_code)
            elif isinstance(event, h2.events.StreamEnded):
                self.ended.add(event.stream_id)

    def open(self, path: str = PROCESS, *, method: str = "POST", kind: str = "application/grpc",
             extra: list[tuple[str, str]] | None = None, end: bool = False) -> int:
        stream: int = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, [(":method", method), (":scheme", "http"), (":path", path), (":authority", "o"),
                                      ("content-type", kind), ("te", "trailers"), *(extra or [])], end_stream=end)
        return stream

    def say(self, stream: int, data: bytes, end: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=end)

    def ask(self, message: Any, stream: int | None = None) -> list[pb.ProcessingResponse]:
        """One message on a (new) stream; what has been answered on it so far."""
        stream = self.open() if stream is None else stream
        self.say(stream, frame(message))
        self.flush()
        self.read()
        return self.answers(stream)

    def messages(self, stream: int) -> list[bytes]:
        rest, found = self.data[stream], []
        while len(rest) >= 5:
            n = int.from_bytes(rest[1:5], "big")
            assert rest[0] == 0
            assert len(rest) >= 5 + n
            found.append(rest[5:5 + n])
            rest = rest[5 + n:]
        assert rest == b""
        return found

    def answers(self, stream: int) -> list[pb.ProcessingResponse]:
        return [pb.ProcessingResponse.FromString(m) for m in self.messages(stream)]

    def status(self, stream: int) -> tuple[int, str]:
        """grpc-status and grpc-message; the stream must have ended."""
        found = self.headers[stream]
        return int(found[b"grpc-status"]), found.get(b"grpc-message", b"").decode()

    def close(self) -> None:
        self.socket.close()
