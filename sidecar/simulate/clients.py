"""Where requests come from: addresses (private, shared and documentation ranges only) and the
headers that browsers, apps and programs send."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import orjson

from sidecar.simulate.draws import Draws

Headers = tuple[tuple[str, str], ...]
LANGUAGES = (
    "en-US,en;q=0.9",
    "de-DE,de;q=0.9,en;q=0.8",
    "fr-FR,fr;q=0.9,en;q=0.7",
    "es-ES,es;q=0.9",
    "ja,en-US;q=0.8",
    "tr-TR,tr;q=0.9,en-US;q=0.8",
    "pl,en;q=0.7",
    "en-GB,en;q=0.9",
)


def home_v4(n: int) -> str:
    """10.0.0.0/9, one per household; repeats after 8 million."""
    n = (n * 2654435761 + 12345) % 2**23
    return f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}"


def home_v6(n: int, d: Draws) -> str:
    """2001:db8::/32: a /64 per household, and in it privacy addresses that change."""
    host = d.hex(16)
    return f"2001:db8:{n >> 16 & 0xFFFF:x}:{n & 0xFFFF:x}:{host[:4]}:{host[4:8]}:{host[8:12]}:{host[12:]}"


def carrier(n: int) -> str:
    """100.64.0.0/10, shared by the many behind one carrier."""
    n = (n * 40503 + 77) % 2**22
    return f"100.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


def office(n: int) -> str:
    return f"192.0.2.{n}" if n < 256 else f"172.{16 + (n >> 16 & 15)}.{n >> 8 & 255}.{n & 255}"


def attacker(d: Draws) -> str:
    """A single hostile address: a rented machine, or somebody's home."""
    where = d.u()
    if where < 0.6:
        return f"203.0.113.{d.integer(1, 254)}"
    if where < 0.8:
        return f"2001:db8:{d.integer(0xF000, 0xFFFF):x}:{d.integer(0, 0xFFFF):x}::{d.integer(1, 0xFFFF):x}"
    return f"10.{d.integer(128, 250)}.{d.integer(0, 255)}.{d.integer(1, 254)}"


def bot(n: int) -> str:
    """198.18.0.0/15: a botnet; repeats after 131,072."""
    n = (n * 7919 + 4242) % 2**17
    return f"198.{18 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


@dataclass(slots=True)
class Device:
    """A client program: its fixed headers, and what it can do."""

    kind: str  # web | mobile | sdk
    headers: Headers
    assets: bool = False  # fetches scripts, styles and images
    cookies: list[str] = field(default_factory=list)


def draw_device(d: Draws, host: str, kind: str | None = None) -> Device:
    kind = kind or d.pick(("web", "web", "web", "mobile", "mobile"))
    language = ("Accept-Language", d.pick(LANGUAGES))
    if kind == "web":
        return Device("web", _browser(d, host, language), True)
    if kind == "mobile":
        app = f"{d.integer(3, 6)}.{d.integer(0, 30)}.{d.integer(0, 9)}"
        if d.chance(0.5):
            model = f"SM-{d.pick('AGS')}{d.integer(100, 999)}B"
            agent = f"ShopApp/{app} (Android {d.integer(10, 15)}; {model}) okhttp/4.12.0"
        else:
            kernel = f"{d.integer(22, 24)}.{d.integer(0, 6)}.0"
            agent = f"ShopApp/{app} CFNetwork/{d.integer(1400, 1500)}.0.4 Darwin/{kernel}"
        return Device(
            "mobile",
            (
                ("Host", host),
                ("User-Agent", agent),
                ("Accept", "application/json"),
                language,
                ("Accept-Encoding", "gzip"),
                ("X-App-Version", app),
                ("X-Device-Id", d.hex(16)),
            ),
        )
    agent = d.pick(
        (
            "python-requests/2.32.3",
            "python-httpx/0.27.2",
            "axios/1.7.7",
            "Go-http-client/2.0",
            "Apache-HttpClient/5.3.1 (Java/17.0.12)",
            "okhttp/4.12.0",
            "node-fetch/3.3.2",
            "GuzzleHttp/7",
            "Faraday v2.9.0",
            "curl/8.5.0",
        )
    )
    return Device(
        "sdk",
        (
            ("Host", host),
            ("User-Agent", agent),
            ("Accept", d.pick(("*/*", "application/json"))),
            ("Accept-Encoding", "gzip, deflate"),
        ),
    )


def _browser(d: Draws, host: str, language: tuple[str, str]) -> Headers:
    common = (("Host", host), ("Connection", "keep-alive"))
    tail = (
        language,
        ("Accept-Encoding", "gzip, deflate, br"),
        ("Referer", f"https://{host}/"),
        ("Sec-Fetch-Site", "same-origin"),
        ("Sec-Fetch-Mode", "cors"),
        ("Sec-Fetch-Dest", "empty"),
    )
    version = d.integer(118, 131)
    family = d.u()
    if family < 0.62:
        system, platform = d.pick(
            (
                ("Windows NT 10.0; Win64; x64", "Windows"),
                ("X11; Linux x86_64", "Linux"),
                ("Macintosh; Intel Mac OS X 10_15_7", "macOS"),
                ("Linux; Android 10; K", "Android"),
            )
        )
        mobile = " Mobile" if platform == "Android" else ""
        return (
            *common,
            ("sec-ch-ua", f'"Chromium";v="{version}", "Google Chrome";v="{version}", "Not?A_Brand";v="99"'),
            ("sec-ch-ua-mobile", "?1" if mobile else "?0"),
            ("sec-ch-ua-platform", f'"{platform}"'),
            (
                "User-Agent",
                f"Mozilla/5.0 ({system}) AppleWebKit/537.36 (KHTML, like Gecko) "
                f"Chrome/{version}.0.0.0{mobile} Safari/537.36",
            ),
            ("Accept", "application/json, text/plain, */*"),
            *tail,
        )
    if family < 0.8:
        system = d.pick(
            ("Windows NT 10.0; Win64; x64", "X11; Ubuntu; Linux x86_64", "Macintosh; Intel Mac OS X 10.15")
        )
        return (
            *common,
            ("User-Agent", f"Mozilla/5.0 ({system}; rv:{version}.0) Gecko/20100101 Firefox/{version}.0"),
            ("Accept", "application/json, text/plain, */*"),
            *tail,
        )
    release = d.integer(15, 18)
    system = d.pick(
        (
            f"iPhone; CPU iPhone OS {release}_{d.integer(0, 6)} like Mac OS X",
            "Macintosh; Intel Mac OS X 10_15_7",
        )
    )
    mobile = " Mobile/15E148" if system.startswith("iPhone") else ""
    return (
        *common,
        (
            "User-Agent",
            f"Mozilla/5.0 ({system}) AppleWebKit/605.1.15 (KHTML, like Gecko) "
            f"Version/{release}.{d.integer(0, 6)}{mobile} Safari/604.1",
        ),
        ("Accept", "application/json, text/plain, */*"),
        *tail,
    )


def hostile_headers(d: Draws, host: str, scanner: bool = False) -> Headers:
    """What attackers' tools send: bare libraries, scanners that say who they are, copies of a browser."""
    if scanner and d.chance(0.4):
        agent = d.pick(
            (
                "Mozilla/5.00 (Nikto/2.5.0) (Evasions:None) (Test:000001)",
                "gobuster/3.6",
                "ffuf/2.1.0-dev",
                "Mozilla/5.0 zgrab/0.x",
                "Nuclei - Open-source project",
                "masscan/1.3",
                "feroxbuster/2.10.4",
            )
        )
        return (("Host", host), ("User-Agent", agent), ("Accept", "*/*"))
    return draw_device(d, host, "sdk" if d.chance(0.6) else "web").headers


def credential(auth: str, subject: str, d: Draws) -> tuple[str, str]:
    """The header by which a logged-in client shows who it is; forged, of course."""
    if auth == "bearer":
        parts = [
            base64.urlsafe_b64encode(orjson.dumps(part)).rstrip(b"=").decode("ascii")
            for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": subject, "iss": "shop", "jti": d.hex(12)})
        ]
        return "Authorization", f"Bearer {parts[0]}.{parts[1]}.{d.hex(43)}"
    if auth == "cookie":
        return "Cookie", f"sid={d.hex(32)}; theme={d.pick(('dark', 'light'))}"
    return "X-Api-Key", d.hex(40)
