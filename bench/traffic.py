"""What the benchmarks send: benign requests of a shop's API, different ones each time, the same ones each run.

`pipeline` hands them to the engine; `proxy` writes them to files for the load generators: whole HTTP/1.1 requests
for wrk, paths and a body for h2load.
"""

from __future__ import annotations

import json
import random
import struct
import uuid
from collections.abc import Callable
from pathlib import Path

Request = tuple[str, str, list[tuple[str, str]], str | None]  # method, path with query, headers, body

WORDS = [
    "chair", "table", "lamp", "harbour", "oak", "linen", "folding", "garden", "green", "wool", "ceramic", "kettle",
    "summer", "delivery", "window", "brass", "notebook", "leather", "travel", "candle", "silver", "winter", "mirror",
    "basket", "cotton", "corner", "ladder", "market", "orange", "pepper",
]  # fmt: skip
AGENTS = (
    "Mozilla/5.0 (X11; Linux x86_64; rv:143.0) Gecko/20100101 Firefox/143.0",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) AppleWebKit/605.1.15 Version/18.5 Mobile Safari/604.1",
    "okhttp/4.12.0",
    "ShopApp/7.3.1 (Android 15; Pixel 9)",
)


def headers(rng: random.Random) -> list[tuple[str, str]]:
    """Eight, the values that differ between clients drawn anew for each request."""
    return [
        ("user-agent", rng.choice(AGENTS)),
        ("accept", "application/json"),
        ("accept-encoding", "gzip, br"),
        ("accept-language", rng.choice(("en-GB,en;q=0.8", "de-DE,de;q=0.9", "pt-BR"))),
        ("referer", f"https://shop.example/{rng.choice(WORDS)}/{rng.choice(WORDS)}?page={rng.randrange(40)}"),
        ("cookie", f"sid={rng.getrandbits(64):016x}; theme={rng.choice(('dark', 'light'))}"),
        ("x-request-id", str(uuid.UUID(int=rng.getrandbits(128)))),
        ("x-forwarded-for", f"192.0.2.{rng.randrange(256)}"),
    ]


def get(rng: random.Random) -> Request:
    words = "+".join(rng.choices(WORDS, k=rng.randrange(1, 4)))
    url = f"/api/v1/{rng.choice(WORDS)}s?q={words}&sort={rng.choice(WORDS)}_asc&page={rng.randrange(100)}"
    return "GET", url, headers(rng), None


def _order(rng: random.Random, items: int) -> str:
    def title(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=n))

    order = {
        "customer": {"id": rng.randrange(10**6), "name": title(2).title(), "email": f"{title(1)}@mail.example"},
        "items": [
            {"sku": f"SKU-{rng.randrange(10**5)}", "title": title(4), "quantity": rng.randrange(9), "price": 49.5}
            for _ in range(items)
        ],
        "note": title(12) + "; ring twice, the bell doesn't work & the dog is friendly.",
        "delivery": {"street": f"{rng.randrange(99)} {title(2)}", "zip": str(rng.randrange(10**5)), "country": "DK"},
    }
    return json.dumps({"order": order})


def post(rng: random.Random) -> Request:
    """About 1 KB of JSON."""
    return "POST", "/api/v1/orders", [*headers(rng), ("content-type", "application/json")], _order(rng, 8)


def post_16k(rng: random.Random) -> Request:
    """About 16 KB of JSON."""
    return "POST", "/api/v1/orders/import", [*headers(rng), ("content-type", "application/json")], _order(rng, 176)


def attack(rng: random.Random) -> Request:
    n = rng.randrange(10**4)
    url = f"/api/v1/{rng.choice(WORDS)}s?id={n}%27%20UNION%20SELECT%20{rng.choice(WORDS)},b%20FROM%20users--%20"
    return "GET", url, headers(rng), None


# ---- for the load generators ---------------------------------------------------------------------------

CASES: dict[str, Callable[[random.Random], Request]] = {"get": get, "post_1k": post, "post_16k": post_16k}
TITLES = {"get": "GET, 3 query values", "post_1k": "POST, 1 KB of JSON", "post_16k": "POST, 16 KB of JSON"}
VARIANTS = {"get": 2000, "post_1k": 2000, "post_16k": 300}
CLIENTS = 4096  # three hexadecimal digits, as Envoy's hosts take them from the request's id
SENT_BYTES_MAX = 16 << 20  # prepared for wrk, per case
# Envoy writes these itself: the request id, and the client's address
_NOT_SENT = {"x-request-id", "x-forwarded-for"}


def variants(case: str) -> list[Request]:
    rng = random.Random(f"outrider bench {case}")
    return [CASES[case](rng) for _ in range(VARIANTS[case])]


def addressed(requests: list[Request], header: str) -> list[Request]:
    """The same requests over and over, each time with an address drawn from CLIENTS ones in that header: as many as
    there are clients, or as SENT_BYTES_MAX holds, and each at least once."""
    rng = random.Random("outrider bench addresses")
    bytes_each = sum(len(raw(request)) for request in requests) // len(requests) + 1
    wanted = max(len(requests), min(CLIENTS, SENT_BYTES_MAX // bytes_each))
    out = []
    for i in range(wanted):
        method, path, fields, body = requests[i % len(requests)]
        out.append((method, path, [*fields, (header, f"2001:db8:{rng.randrange(CLIENTS):03x}::1")], body))
    return out


def raw(request: Request) -> bytes:
    """As HTTP/1.1 on the wire."""
    method, path, fields, body = request
    data = (body or "").encode()
    lines = [f"{method} {path} HTTP/1.1", "host: shop.example"]
    lines += [f"{name}: {value}" for name, value in fields if name not in _NOT_SENT]
    if body is not None:
        lines.append(f"content-length: {len(data)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


def write_raw(requests: list[Request], path: Path) -> None:
    """Each with its length before it (4 bytes, little-endian), for closed.lua."""
    with path.open("wb") as out:
        for request in requests:
            data = raw(request)
            out.write(struct.pack("<I", len(data)) + data)


def write_uris(requests: list[Request], base: str, path: Path) -> None:
    path.write_text("".join(f"{base}{request[1]}\n" for request in requests), encoding="ascii")


def sent_headers(request: Request) -> list[tuple[str, str]]:
    return [(name, value) for name, value in request[2] if name not in _NOT_SENT]
