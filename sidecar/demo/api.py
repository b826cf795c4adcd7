"""The service that the demo protects: a small shop API on the standard library.

It keeps everything in memory, within limits, and is as trusting as real services are: what reaches it
is looked up and echoed, so that one can see what a request that was let through would have met.

Run it alone: python -m sidecar.demo.api --port 8080
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BODY_BYTES_MAX = 1 << 20
UPLOAD_BYTES_MAX = 1 << 28  # /upload keeps nothing: it hashes what comes
PIECE_BYTES = 1 << 16
ITEMS_MAX = 1000
COMMENTS_MAX = 200
TOKENS_MAX = 1000
LINE_BYTES_MAX = 8192
TRAILERS_MAX = 64
IDLE_TIMEOUT_S = 30.0

USERS = {"ada": "lovelace-1815", "grace": "hopper-1906", "linus": "tux-1991"}
FILES = {"readme.txt": "Welcome to the shop.\n", "terms.txt": "Be kind.\n"}
ORDERS = 400


class Refused(Exception):
    """A request that the API answers with an error status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Shop:
    """The state: items with comments, and sessions. All methods are safe to call from many threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tokens: dict[str, str] = {}
        names = [
            "walnut desk",
            "oak chair",
            "brass lamp",
            "wool blanket",
            "linen curtain",
            "steel kettle",
            "cherry shelf",
            "clay mug",
            "pine stool",
            "copper pan",
            "felt hat",
            "glass vase",
        ]
        self.items: dict[int, dict[str, Any]] = {
            i + 1: {"id": i + 1, "name": name, "price": 9.5 + 7 * i, "comments": []}
            for i, name in enumerate(names)
        }
        self.next_id = len(names) + 1

    def login(self, user: str, password: str) -> str:
        known = USERS.get(user, "")
        if not known or not hmac.compare_digest(known.encode(), password.encode("utf-8", "replace")):
            raise Refused(401, "unknown user or wrong password")
        token = secrets.token_hex(16)
        with self.lock:
            if len(self.tokens) >= TOKENS_MAX:
                self.tokens.pop(next(iter(self.tokens)))
            self.tokens[token] = user
        return token

    def item(self, number: int) -> dict[str, Any]:
        with self.lock:
            item = self.items.get(number)
        if item is None:
            raise Refused(404, "no such item")
        return item

    def add(self, fields: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            if len(self.items) >= ITEMS_MAX:
                raise Refused(507, "the shop is full")
            item = {
                "id": self.next_id,
                "name": str(fields.get("name", ""))[:200],
                "description": str(fields.get("description", ""))[:4000],
                "price": fields.get("price", 0),
                "comments": [],
            }
            self.items[self.next_id] = item
            self.next_id += 1
        return item

    def find(self, text: str) -> list[dict[str, Any]]:
        text = text.lower()
        with self.lock:
            return [item for item in self.items.values() if text in item["name"].lower()]


class Handler(BaseHTTPRequestHandler):
    """One connection. Routes are the methods named in ROUTES."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: Nagle would hold the second for 40 ms
    server_version = "shop"
    sys_version = ""
    timeout = IDLE_TIMEOUT_S
    shop: Shop

    # ---- plumbing

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: Envoy writes the access log."""

    def read_body(self) -> bytes:
        """The whole body, or Refused(413) beyond BODY_BYTES_MAX after which the connection closes."""
        return b"".join(self.pieces(BODY_BYTES_MAX))

    def pieces(self, limit: int) -> Iterator[bytes]:
        """The body as it comes, at most `limit` bytes; Refused beyond that or when it is cut short, after
        which the connection closes."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                yield from self.chunks(limit)
                return
            try:
                length = int(self.headers.get("content-length") or 0)
            except ValueError:
                raise Refused(400, "content-length isn't a number") from None
            if not 0 <= length <= limit:
                raise Refused(413, f"the body exceeds {limit} bytes")
            yield from self.exactly(length)
        except Refused:
            self.close_connection = True
            raise

    def exactly(self, length: int) -> Iterator[bytes]:
        while length:
            piece = self.rfile.read(min(length, PIECE_BYTES))
            if not piece:
                raise Refused(400, "the body was cut short")
            length -= len(piece)
            yield piece

    def chunks(self, limit: int) -> Iterator[bytes]:
        while True:
            line = self.rfile.readline(LINE_BYTES_MAX)
            try:
                size = int(line.split(b";")[0], 16)
            except ValueError:
                raise Refused(400, "malformed chunk") from None
            if size == 0:
                for _ in range(TRAILERS_MAX):
                    if not self.rfile.readline(LINE_BYTES_MAX).strip():
                        return
                raise Refused(400, "too many trailers")
            limit -= size
            if size < 0 or limit < 0:
                raise Refused(413, "the body is too large")
            yield from self.exactly(size)
            self.rfile.readline(LINE_BYTES_MAX)

    def fields(self) -> dict[str, Any]:
        """The body as fields, from JSON or a form."""
        kind = self.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind == "application/json":
            try:
                value = json.loads(self.body or b"{}")
            except (ValueError, RecursionError):
                raise Refused(400, "malformed JSON") from None
            if not isinstance(value, dict):
                raise Refused(400, "a JSON object is expected")
            return value
        text = self.body.decode("utf-8", "replace")
        return {name: values[0] for name, values in parse_qs(text, max_num_fields=200).items()}

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode() + b"\n"
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def serve(self) -> None:
        try:
            parts = urlsplit(self.path)
            self.body = b"" if parts.path == "/upload" else self.read_body()
            self.path_only = unquote(parts.path, errors="replace")
            self.query = {
                k: v[0] for k, v in parse_qs(parts.query, max_num_fields=200, errors="replace").items()
            }
            for method, pattern, name in ROUTES:
                match = pattern.fullmatch(self.path_only)
                if match and method == self.command:
                    route: Callable[..., tuple[int, Any]] = getattr(self, name)
                    status, value = route(*match.groups())
                    break
            else:
                raise Refused(404, "no such page")
        except Refused as refused:
            status, value = refused.status, {"error": str(refused)}
        except ValueError:
            status, value = 400, {"error": "malformed request"}
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        self.answer(status, value)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_OPTIONS = serve

    # ---- pages

    def index(self) -> tuple[int, Any]:
        return 200, {"service": "demo shop", "pages": [f"{m} {p.pattern}" for m, p, _ in ROUTES]}

    def login(self) -> tuple[int, Any]:
        fields = self.fields()
        token = self.shop.login(str(fields.get("user", "")), str(fields.get("password", "")))
        return 200, {"token": token}

    def me(self) -> tuple[int, Any]:
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        user = self.shop.tokens.get(token)
        if user is None:
            raise Refused(401, "log in first")
        return 200, {"user": user, "orders": ORDERS}

    def list_items(self) -> tuple[int, Any]:
        page, size = int(self.query.get("page", 1)), int(self.query.get("limit", 20))
        if not (1 <= page <= ITEMS_MAX and 1 <= size <= 100):
            raise Refused(400, "page or limit out of range")
        found = self.shop.find(self.query.get("q", ""))
        return 200, {"total": len(found), "items": found[(page - 1) * size : page * size]}

    def search(self) -> tuple[int, Any]:
        text = self.query.get("q", "")
        return 200, {"searched_for": text, "items": self.shop.find(text)[:20]}

    def get_item(self, number: str) -> tuple[int, Any]:
        return 200, self.shop.item(int(number))

    def add_item(self) -> tuple[int, Any]:
        return 201, self.shop.add(self.fields())

    def change_item(self, number: str) -> tuple[int, Any]:
        item = self.shop.item(int(number))
        item["name"] = str(self.fields().get("name", item["name"]))[:200]
        return 200, item

    def remove_item(self, number: str) -> tuple[int, Any]:
        self.shop.item(int(number))
        with self.shop.lock:
            self.shop.items.pop(int(number), None)
        return 200, {"removed": int(number)}

    def comments(self, number: str) -> tuple[int, Any]:
        return 200, self.shop.item(int(number))["comments"]

    def comment(self, number: str) -> tuple[int, Any]:
        item = self.shop.item(int(number))
        text = str(self.fields().get("text", ""))[:4000]
        if len(item["comments"]) >= COMMENTS_MAX:
            raise Refused(507, "too many comments")
        item["comments"].append(text)
        return 201, {"item": item["id"], "comments": len(item["comments"])}

    def order(self, number: str) -> tuple[int, Any]:
        if not 1 <= int(number) <= ORDERS:
            raise Refused(404, "no such order")
        customer = list(USERS)[int(number) % len(USERS)]
        return 200, {"order": int(number), "customer": customer, "total": 10 + int(number) % 90}

    def file(self) -> tuple[int, Any]:
        name = self.query.get("name", "readme.txt")
        if name not in FILES:
            raise Refused(404, "no such file")
        return 200, {"name": name, "text": FILES[name]}

    def preview(self) -> tuple[int, Any]:
        return 200, {"url": self.query.get("url", "")[:200], "title": "not fetched in the demo"}

    def echo(self) -> tuple[int, Any]:
        """What the service sees of a request: the place to look for x-outrider-*."""
        return 200, {
            "method": self.command,
            "path": self.path[:2000],
            "headers": {k.lower(): v[:2000] for k, v in self.headers.items()},
            "body_bytes": len(self.body),
            "body_sha256": hashlib.sha256(self.body).hexdigest(),
        }

    def upload(self) -> tuple[int, Any]:
        """A large body, counted and hashed but not kept."""
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces(UPLOAD_BYTES_MAX):
            digest.update(piece)
            size += len(piece)
        return 200, {"body_bytes": size, "body_sha256": digest.hexdigest()}


ROUTES: list[tuple[str, re.Pattern[str], str]] = [
    (method, re.compile(pattern), name)
    for method, pattern, name in [
        ("GET", "/", "index"),
        ("HEAD", "/", "index"),
        ("POST", "/login", "login"),
        ("GET", "/me", "me"),
        ("GET", "/items", "list_items"),
        ("POST", "/items", "add_item"),
        ("GET", r"/items/(\d{1,9})", "get_item"),
        ("PUT", r"/items/(\d{1,9})", "change_item"),
        ("DELETE", r"/items/(\d{1,9})", "remove_item"),
        ("GET", r"/items/(\d{1,9})/comments", "comments"),
        ("POST", r"/items/(\d{1,9})/comments", "comment"),
        ("GET", r"/orders/(\d{1,9})", "order"),
        ("GET", "/search", "search"),
        ("GET", "/files", "file"),
        ("GET", "/preview", "preview"),
        ("GET", "/echo", "echo"),
        ("POST", "/echo", "echo"),
        ("PUT", "/echo", "echo"),
        ("PUT", "/upload", "upload"),
        ("POST", "/upload", "upload"),
    ]
]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection is the client's business; anything else is a fault worth a trace."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def server_bind(self) -> None:
        # no name lookup: it can take seconds on a machine without a resolver
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "localhost", self.server_address[1]


def make_server(port: int) -> Server:
    """A server on 127.0.0.1 with fresh state; OSError when the port is taken."""
    handler = type("ShopHandler", (Handler,), {"shop": Shop()})
    return Server(("127.0.0.1", port), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's API: a small shop.")
    parser.add_argument("--port", type=int, default=8080)
    server = make_server(parser.parse_args().port)
    # shutdown() waits for the loop to end, so it can't be called from the loop's own thread
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.1)
    server.server_close()


if __name__ == "__main__":
    main()
