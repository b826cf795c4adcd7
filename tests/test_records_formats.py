"""Each log format, as its servers write it and as hostile clients bend it."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest

from sidecar.records import RecordsError, RequestRecord, printable, read
from sidecar.records.reader import detect

COMBINED = (
    '203.0.113.9 - - [10/Oct/2025:13:55:36 +0200] "GET /a?b=c HTTP/1.1" 200 2326 '
    '"http://www.example.com/start" "Mozilla/5.0 (X11)"'
)
ENVOY = {
    "start_time": "2025-12-31T16:37:40.479Z",
    "method": "GET",
    "path": "/rewritten",
    "x-envoy-original-path": "/asked?x=1",
    "response_code": 404,
    "duration": 12,
    "downstream_remote_address": "10.0.0.12:59292",
    "user_agent": "curl/8",
    ":authority": "app.example",
    "x-request-id": "abc",
    "x_forwarded_for": "1.1.1.1, 10.0.0.12",
}


def lines(tmp_path: Path, *texts: str | bytes, name: str = "log") -> Path:
    path = tmp_path / name
    path.write_bytes(b"".join((t if isinstance(t, bytes) else t.encode()) + b"\n" for t in texts))
    return path


def one(tmp_path: Path, text: str | bytes, format: str = "auto") -> RequestRecord:
    records = list(read(lines(tmp_path, text), format, strict=True))
    assert len(records) == 1
    return records[0]


# -- access logs -----------------------------------------------------------------------------------


def test_combined(tmp_path: Path) -> None:
    record = one(tmp_path, COMBINED)
    assert (record.method, record.url, record.client, record.status) == ("GET", "/a?b=c", "203.0.113.9", 200)
    assert record.ts == 1760097336.0
    assert record.header("referer") == "http://www.example.com/start"
    assert record.header("user-agent") == "Mozilla/5.0 (X11)"
    assert record.principal is None


def test_common_with_user_and_bytes_unknown(tmp_path: Path) -> None:
    record = one(tmp_path, '2001:db8::1 ident mary ann [10/Oct/2025:13:55:36 -0700] "HEAD / HTTP/1.0" 304 -')
    assert (record.client, record.principal, record.method, record.headers) == (
        "2001:db8::1",
        "mary ann",
        "HEAD",
        [],
    )
    assert record.ts == 1760129736.0


@pytest.mark.parametrize(
    ("line", "client", "host"),
    [
        (
            'shop.example 192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "GET / HTTP/1.1" 200 1',
            "192.0.2.1",
            "shop.example",
        ),
        (
            'shop.example:443 ws1.example - - [10/Oct/2025:13:55:36 +0000] "GET / HTTP/1.1" 200 1',
            "ws1.example",
            "shop.example:443",
        ),
        (
            'Oct  8 11:07:07 h nginx[29]: 192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "GET / HTTP/1.1" 200 1',
            "192.0.2.1",
            None,
        ),
        ('192.0.2.1 - [10/Oct/2025:13:55:36 +0000] "GET / HTTP/1.1" 200 1', "192.0.2.1", None),
    ],
)
def test_prefixes_before_the_client(tmp_path: Path, line: str, client: str, host: str | None) -> None:
    record = one(tmp_path, line)
    assert (record.client, record.header("host"), record.principal) == (client, host, None)


@pytest.mark.parametrize(
    ("written", "url"),
    [
        (r"GET /a\x22b\x5Cc HTTP/1.1", '/a"b\\c'),  # NGINX
        (r"GET /a\"b\\c\td HTTP/1.1", '/a"b\\c\td'),  # Apache
        (r"GET /\xC3\xBC?q=\xE2\x82\xAC HTTP/1.1", "/ü?q=€"),  # escaped UTF-8
        (r"GET /\xFF\xFEa?b=%41 HTTP/1.1", "/%FF%FEa?b=%41"),  # bytes that are no text stay bytes
        (r"GET /\u00e9 HTTP/1.1", "/é"),
        (r"GET /a b' OR 1=1 -- HTTP/1.1", "/a b' OR 1=1 --"),  # raw spaces
        ("GET /old", "/old"),  # HTTP/0.9
        ("GET http://evil.example/x HTTP/1.1", "http://evil.example/x"),
        (r"GET /\x HTTP/1.1", "/x"),
        (r"GET /\x00\x1b[31m HTTP/1.1", "/\x00\x1b[31m"),
    ],
)
def test_request_targets(tmp_path: Path, written: str, url: str) -> None:
    record = one(tmp_path, f'192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "{written}" 200 1 "-" "-"')
    assert (record.method, record.url, record.headers) == ("GET", url, [])


def test_raw_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    record = one(
        tmp_path,
        b'192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "GET /\xff\xc3\xbc HTTP/1.1" 200 1 "-" "\xe9t\xe9"',
    )
    assert record.url == "/%FF%C3%BC"
    assert record.header("user-agent") == "été"


@pytest.mark.parametrize(
    "written", ["-", "", r"\x16\x03\x01\x02", "SSH-2.0-Go", "\\x16\\x03 \\x01", "GET", "GET "]
)
def test_connections_without_a_request_are_counted_apart(tmp_path: Path, written: str) -> None:
    reader = read(
        lines(tmp_path, COMBINED, f'192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "{written}" 400 0 "-" "-"')
    )
    assert len(list(reader)) == 1
    assert (reader.reports[0].bad, reader.reports[0].without_request) == (0, 1)
    assert "hold no HTTP request" in reader.messages()[0]


def test_user_name_that_imitates_the_rest_of_the_line(tmp_path: Path) -> None:
    fake = r"x [01/Jan/2000:00:00:00 +0000] \"GET /fake HTTP/1.1\" 200 1"
    record = one(tmp_path, f'192.0.2.1 - {fake} [10/Oct/2025:13:55:36 +0000] "GET /real HTTP/1.1" 401 5')
    assert (record.url, record.status) == ("/real", 401)
    assert record.principal is not None
    assert "/fake" in record.principal


def test_forwarded_for_and_request_time(tmp_path: Path) -> None:
    record = one(tmp_path, COMBINED + ' "198.51.100.7, 10.0.0.1" rt=0.250 uct="0.1"')
    assert record.header("x-forwarded-for") == "198.51.100.7, 10.0.0.1"
    assert record.response_ms == 250.0
    assert record.client == "203.0.113.9"


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        '192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "GET / HTTP/1.1',
        "\x00" * 50,
        '192.0.2.1 - - [31/Feb/2025:13:55:36 +0000] "GET / HTTP/1.1" 200 1',
        '192.0.2.1 - - [10/Foo/2025:13:55:36 +0000] "GET / HTTP/1.1" 200 1',
        '192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "GET / HTTP/1.1" OK 1',
        ' - - [10/Oct/2025:25:55:36 +0000] "GET / HTTP/1.1" 200 1',
        '[10/Oct/2025:13:55:36 +0000] "GET / HTTP/1.1" 200 1',
    ],
)
def test_bad_lines_are_skipped_and_told(tmp_path: Path, line: str) -> None:
    path = lines(tmp_path, COMBINED, line, COMBINED)
    reader = read(path)
    assert len(list(reader)) == 2
    report = reader.reports[0]
    assert (report.format, report.lines, report.records, report.bad) == ("combined", 3, 2, 1)
    assert report.mistakes[0].line == 2
    assert not report.probably_wrong_format
    with pytest.raises(RecordsError, match=f"{path}:2: ") as caught:
        list(read(path, strict=True))
    assert "--strict" in caught.value.remedy


def test_quotes_without_end_cost_linear_time(tmp_path: Path) -> None:
    start = '192.0.2.1 - - [10/Oct/2025:13:55:36 +0000] "'
    hostile = [
        start + "\\" * 500_001,
        start + 'GET / HTTP/1.1" 200 1' + ' "' * 200_000,
        start * 20_000,
        "[10/Oct/2025:13:55:36 +0000" * 20_000,
        " " * 500_000,
        "a" * 500_000 + '] "',
    ]
    reader = read(lines(tmp_path, *hostile), "combined")
    assert len(list(reader)) <= 2
    assert reader.reports[0].lines == 5  # one is blank


# -- JSON Lines ----------------------------------------------------------------------------------------


def test_json_lines_with_all_fields(tmp_path: Path) -> None:
    raw = {
        "id": "a",
        "ts": 1.5,
        "client": "192.0.2.1",
        "principal": "u",
        "method": "POST",
        "url": "/x",
        "headers": {"Host": "h", "Accept": ["a", "b"]},
        "body": "AP8=",
        "body_enc": "b64",
        "status": 201,
        "response_ms": 2.5,
        "label": 1,
        "cls": "sqli",
        "src": "s",
        "meta": {"site": "t"},
    }
    record = one(tmp_path, json.dumps(raw))
    assert record == RequestRecord(
        "POST",
        "/x",
        "a",
        1.5,
        "192.0.2.1",
        "u",
        [("Host", "h"), ("Accept", "a"), ("Accept", "b")],
        b"\x00\xff",
        201,
        2.5,
        1,
        "sqli",
        "s",
        {"site": "t"},
    )


def test_json_lines_of_an_access_log(tmp_path: Path) -> None:
    record = one(
        tmp_path,
        '{"ts": 1431857100.0, "client": "n0", "method": "GET", "url": "/r", "status": 200, '
        '"bytes": 5, "ref": "http://r/", "ua": "UA", "label": "scanner:x"}',
    )
    assert record.headers == [("User-Agent", "UA"), ("Referer", "http://r/")]
    assert (record.label, record.cls) == (1, "scanner:x")
    assert one(tmp_path, '{"method": "GET", "url": "/", "ua": null, "ref": "-", "label": "human"}').label == 0
    assert one(tmp_path, '{"method": "GET", "url": "/", "label": "moderate_bot"}').label is None


@pytest.mark.parametrize(
    ("ts", "seconds"),
    [
        (1767571200, 1767571200.0),
        (1767571200123, 1767571200.123),
        (1767571200123456, 1767571200.123456),
        ("2026-01-05T00:00:00Z", 1767571200.0),
        ("2026-01-05T01:00:00+01:00", 1767571200.0),
        ("2026-01-05 00:00:00", 1767571200.0),
        ("1767571200.5", 1767571200.5),
        (0, 0.0),
    ],
)
def test_times(tmp_path: Path, ts: object, seconds: float) -> None:
    record = one(tmp_path, json.dumps({"method": "GET", "url": "/", "ts": ts}))
    assert record.ts == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"url": "/"}', "method"),
        ('{"method": "GET"}', "url"),
        ('{"method": "GET", "url": 7}', "url"),
        ('{"method": "GET", "url": "/", "ts": "soon"}', "ts"),
        ('{"method": "GET", "url": "/", "ts": -1}', "ts"),
        ('{"method": "GET", "url": "/", "ts": 1e300}', "ts"),
        ('{"method": "GET", "url": "/", "headers": "x"}', "headers"),
        ('{"method": "GET", "url": "/", "headers": {"a": {}}}', "headers"),
        ('{"method": "GET", "url": "/", "headers": [["a"]]}', "headers"),
        ('{"method": "GET", "url": "/", "body": {"a": 1}}', "body"),
        ('{"method": "GET", "url": "/", "body": "*", "body_enc": "b64"}', "base64"),
        ('{"method": "GET", "url": "/", "body": "x", "body_enc": "rot13"}', "body_enc"),
        ('{"method": "GET", "url": "/", "status": "fine"}', "status"),
        ('{"method": "GET", "url": "/", "response_ms": -1}', "response_ms"),
        ('{"method": "GET", "url": "/", "response_ms": NaN}', "response_ms"),
        ('{"method": "GET", "url": "/", "label": 2}', "label"),
        ('{"method": "GET", "url": "/", "client": []}', "client"),
        ('{"method": "GET", "url": "/", "meta": ' + "[" * 100_000, "not JSON"),
        ('{"method": "GET", "url": "/", "ts": ' + "9" * 10_000 + "}", ""),
    ],
)
def test_bad_json_lines(tmp_path: Path, raw: str, what: str) -> None:
    reader = read(lines(tmp_path, raw), "jsonl")
    assert list(reader) == []
    assert reader.reports[0].bad == 1
    assert what in reader.reports[0].mistakes[0].what
    assert any("probably the wrong format" in message for message in reader.messages())


def test_text_that_is_not_unicode_is_repaired(tmp_path: Path) -> None:
    record = one(tmp_path, rb'{"method": "GET", "url": "/\ud83d\ude00\ud800", "headers": {"a": "\udfff"}}')
    assert record.url == "/\U0001f600\ufffd"
    assert record.headers == [("a", "\ufffd")]
    assert one(tmp_path, b'{"method": "GET", "url": "/\xff"}').url == "/\ufffd"


# -- Envoy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "2025-12-31T17:37:40.493035218+01:00 stdout F "])
def test_envoy(tmp_path: Path, prefix: str) -> None:
    record = one(tmp_path, prefix + json.dumps(ENVOY))
    assert (record.method, record.url, record.status, record.response_ms) == ("GET", "/asked?x=1", 404, 12.0)
    assert (record.client, record.id, record.ts) == ("10.0.0.12", "abc", 1767199060.479)
    assert record.header("host") == "app.example"
    assert record.header("user-agent") == "curl/8"


def test_envoy_spellings(tmp_path: Path) -> None:
    record = one(
        tmp_path,
        json.dumps(
            {
                "timestamp": "2025-12-31T16:37:40Z",
                ":METHOD": "PUT",
                ":path": "/p",
                "status_code": "503",
                "duration_ms": "7",
                "x-forwarded-for": "6.6.6.6, 192.0.2.7",
                "request_id": "-",
                "user-agent": None,
                "response_flags": "UF",
            }
        ),
    )
    assert (record.method, record.url, record.status, record.response_ms) == ("PUT", "/p", 503, 7.0)
    assert (record.client, record.id) == (
        "192.0.2.7",
        None,
    )  # the hop nearest to us: the others can be forged
    record = one(
        tmp_path,
        json.dumps(
            {
                "time_iso8601": "2025-12-31T16:37:40Z",
                "remote_addr": "2001:db8::2",
                "request": "POST /n HTTP/2.0",
                "status": "200",
                "request_time": "0.5",
            }
        ),
    )
    assert (record.method, record.url, record.client, record.response_ms) == (
        "POST",
        "/n",
        "2001:db8::2",
        500.0,
    )


@pytest.mark.parametrize(
    ("address", "client"),
    [("[2001:db8::1]:80", "2001:db8::1"), ("::1", "::1"), ("10.0.0.1:1", "10.0.0.1"), ("pipe", "pipe")],
)
def test_envoy_addresses(tmp_path: Path, address: str, client: str) -> None:
    assert one(tmp_path, json.dumps(ENVOY | {"downstream_remote_address": address})).client == client


def test_envoy_lines_without_a_request(tmp_path: Path) -> None:
    tcp = {
        "start_time": "2025-12-31T16:37:40Z",
        "method": None,
        "path": None,
        "response_code": 0,
        "response_flags": "-",
    }
    reader = read(lines(tmp_path, json.dumps(ENVOY), json.dumps(tcp), "{}", '{"method": 5}'))
    assert len(list(reader)) == 1
    assert (reader.reports[0].without_request, reader.reports[0].bad) == (1, 2)


# -- HAR -------------------------------------------------------------------------------------------------


def har(*entries: object) -> dict[str, object]:
    return {"log": {"version": "1.2", "creator": {"name": "x", "version": "1"}, "entries": list(entries)}}


ENTRY = {
    "startedDateTime": "2025-12-31T16:37:40.5Z",
    "time": 12.5,
    "response": {"status": 201},
    "request": {
        "method": "POST",
        "url": "https://u@api.example:8443/p/a?x=%20#frag",
        "headers": [{"name": ":authority", "value": "api.example:8443"}, {"name": "Accept", "value": "*/*"}],
        "postData": {"mimeType": "application/json", "text": '{"a":1}'},
    },
}


@pytest.mark.parametrize("indent", [None, 2])
def test_har(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "x"
    path.write_text(json.dumps(har(ENTRY, {"request": 5}), indent=indent))
    reader = read(path)
    (record,) = reader
    assert record == RequestRecord(
        "POST",
        "/p/a?x=%20",
        None,
        1767199060.5,
        None,
        None,
        [("Host", "api.example:8443"), ("Accept", "*/*")],
        b'{"a":1}',
        201,
        12.5,
    )
    assert (reader.reports[0].format, reader.reports[0].bad, reader.reports[0].mistakes[0].line) == (
        "har",
        1,
        2,
    )


def test_har_form_and_odd_urls(tmp_path: Path) -> None:
    form = {
        "request": {
            "method": "POST",
            "url": "http://h",
            "postData": {"params": [{"name": "a b", "value": "ü&"}, {"name": "c"}]},
        }
    }
    path = tmp_path / "x.har"
    path.write_text(
        json.dumps(
            har(
                form,
                {"request": {"method": "GET", "url": "http://h?q=/x"}},
                {"request": {"method": "GET", "url": "http://[::1"}},
            )
        )
    )
    records = list(read(path))
    assert [r.url for r in records] == ["/", "/?q=/x", "http://[::1"]
    assert records[0].body == b"a+b=%C3%BC%26&c="


@pytest.mark.parametrize(
    "text", ['{"log": {"entries": [', '{"log": {"entries": 5}}', '{"log": []}', "[]", ""]
)
def test_har_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.har"
    path.write_text(text)
    with pytest.raises(RecordsError):
        list(read(path, "har"))


def test_har_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.records.har.HAR_BYTES_MAX", 100)
    path = tmp_path / "x.har"
    path.write_text(json.dumps(har(ENTRY)))
    with pytest.raises(RecordsError, match="larger than"):
        list(read(path, "har"))


# -- files -----------------------------------------------------------------------------------------------


def test_gzip_is_known_by_content_and_cut_files_are_told(tmp_path: Path) -> None:
    data = gzip.compress((COMBINED + "\n").encode() * 5000)
    whole = tmp_path / "misnamed.log"
    whole.write_bytes(data)
    assert sum(1 for _ in read(whole)) == 5000
    cut = tmp_path / "cut.gz"
    cut.write_bytes(
        gzip.compress(b"".join(b"%s %d\n" % (COMBINED.encode(), i) for i in range(50_000)))[:60_000]
    )
    got: list[RequestRecord] = []
    with pytest.raises(RecordsError, match="cut short or damaged"):
        got.extend(read(cut))
    assert len(got) > 1000


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BufferedReader(io.BytesIO((COMBINED + "\n").encode()))

    monkeypatch.setattr("sys.stdin", Stdin)
    reader = read("-")
    assert len(list(reader)) == 1
    assert reader.reports[0].path == "<stdin>"


def test_several_files_of_different_formats(tmp_path: Path) -> None:
    a = lines(tmp_path, COMBINED, name="a")
    b = lines(tmp_path, json.dumps(ENVOY), name="b")
    c = lines(tmp_path, '{"method": "GET", "url": "/"}', name="c")
    empty = lines(tmp_path, name="d")
    reader = read([a, b, c, empty])
    assert len(list(reader)) == 3
    assert [r.format for r in reader.reports] == ["combined", "envoy", "jsonl", "empty"]


def test_unknown_format_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match="not recognised") as caught:
        list(read(lines(tmp_path, "hello", "world")))
    assert "--format" in caught.value.remedy
    with pytest.raises(RecordsError, match="No such file"):
        list(read(tmp_path / "absent"))
    with pytest.raises(RecordsError, match="directory"):
        list(read(tmp_path))
    with pytest.raises(ValueError, match="unknown format"):
        read("x", "pcap")


def test_lines_without_end_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.records.lines.LINE_BYTES_MAX", 1000)
    reader = read(lines(tmp_path, COMBINED, "x" * 5000, COMBINED, "y" * 1000, COMBINED))
    assert len(list(reader)) == 3
    assert [m.line for m in reader.reports[0].mistakes] == [2, 4]


def test_long_fields_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.records.jsonlines.BODY_BYTES_MAX", 10)
    record = one(
        tmp_path,
        json.dumps(
            {
                "method": "M" * 1000,
                "url": "/" + "u" * 100_000,
                "body": "b" * 11,
                "headers": {f"h{i}": "v" for i in range(1000)},
            }
        ),
    )
    assert (len(record.method), len(record.url), len(record.headers)) == (256, 65536, 256)
    assert record.body == b"b" * 10
    assert record.body_cut


def test_messages_cannot_drive_a_terminal(tmp_path: Path) -> None:
    reader = read(lines(tmp_path, COMBINED, "\x1b[2J\x1b]0;owned\x07\u202e evil"))
    list(reader)
    text = "\n".join(reader.messages())
    assert not any(c in text for c in "\x1b\x07\u202e")
    assert printable("a\nb\x00\ud800", 3) == "a\\nb…"


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert one(tmp_path, b'\xef\xbb\xbf{"method": "GET", "url": "/"}').url == "/"


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (b"", None),
        (b"\n\n" + COMBINED.encode(), "combined"),
        (b'{"log": {"entries": [{"request": {"method', "har"),
        (b'{"method": "GET", "url": "/", "body": "' + b"x" * 300_000, "jsonl"),
        (b'junk\n{"method": "GET", "url": "/"}\n', "jsonl"),
        (b"\x00\xff" * 1000, None),
    ],
)
def test_detection(head: bytes, format: str | None) -> None:
    assert detect(head) == format


def test_real_logs(data_dir: Path) -> None:
    reader = read(sorted(data_dir.glob("log_*.jsonl.gz")))
    assert sum(1 for _ in reader) == 34_042
    assert all(report.bad == 0 for report in reader.reports)
    folder = data_dir / "crowdsec_hub_scenarios"
    for name in (
        "nginx-http-sqli-probing",
        "apache-http-probing",
        "http-bf-wordpress-bf",
        "envoy-http-crawl-non_statics",
        "bunkerweb-logs",
        "traefik_clf",
    ):
        reader = read(folder.joinpath(name).glob("*.log"))
        assert all(record.ts and record.client for record in reader)
        assert reader.reports[0].records > 0
        assert reader.reports[0].bad == 0
