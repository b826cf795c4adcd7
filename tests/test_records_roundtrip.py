"""What is written is read back the same; what is random never breaks a reader."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.records import RecordsError, RequestRecord, clf, envoy, jsonlines, read, write
from sidecar.records.model import BadLine, NoRequest, clean, printable

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
word = text.filter(bool)
records = st.builds(
    RequestRecord,
    method=word,
    url=word,
    id=st.none() | word,
    client=st.none() | word,
    principal=st.none() | word,
    ts=st.none() | st.floats(0, 1e10),
    headers=st.lists(st.tuples(text, text), max_size=6),
    body=st.none() | st.binary(min_size=1, max_size=60),
    status=st.none() | st.integers(1, 999),
    response_ms=st.none() | st.floats(0, 1e9),
    label=st.none() | st.sampled_from([0, 1]),
    cls=st.none() | word,
    src=st.none() | word,
    meta=st.none() | st.dictionaries(text, text, max_size=2),
)


def grouped(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """JSON keeps repeated headers together, at the first one's place."""
    out: dict[str, list[str]] = {}
    for name, value in headers:
        out.setdefault(name, []).append(value)
    return [(name, value) for name, values in out.items() for value in values]


@given(records)
def test_json_lines(record: RequestRecord) -> None:
    again = jsonlines.parse(jsonlines.dump(record))
    record.headers = grouped(record.headers)
    assert again == record
    assert jsonlines.dump(again) == jsonlines.dump(record)


def escaped(value: bytes) -> str:
    """As NGINX writes a variable into its log."""
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02X}" for b in value)


@given(
    target=st.binary(min_size=1, max_size=60).filter(lambda b: not b.isspace() and b.strip(b" ") == b),
    agent=word,
    user=st.text(st.characters(codec="ascii", exclude_characters="\x00"), max_size=12),
)
def test_whatever_is_requested_survives_an_access_log(target: bytes, agent: str, user: str) -> None:
    line = (
        f'192.0.2.1 - {escaped(user.encode()) or "-"} [10/Oct/2025:13:55:36 +0000] '
        f'"GET {escaped(target)} HTTP/1.1" 200 1 "-" "{escaped(agent.encode())}"'
    )
    record = clf.parse(line.encode())
    try:
        assert record.url == target.decode()
    except UnicodeDecodeError:
        from urllib.parse import unquote_to_bytes

        # odd bytes come back percent-encoded: the same request
        assert unquote_to_bytes(record.url) == unquote_to_bytes(target)
    assert record.header("user-agent") == (None if agent == "-" else agent)


@given(
    st.binary(max_size=200)
    | st.builds(
        lambda parts: b"".join(parts),
        st.lists(
            st.sampled_from(
                [
                    b"192.0.2.1",
                    b" - ",
                    b"[10/Oct/2025:13:55:36 +0000]",
                    b'"',
                    b"\\",
                    b"GET / HTTP/1.1",
                    b" 200 ",
                    b"\\x4",
                    b"\xff",
                    b"{",
                    b"}",
                    b'{"method":',
                    b'"path":',
                    b'"url":',
                    b"null",
                    b"1e999",
                    b"[",
                    b"]",
                    b",",
                    b"\\ud800",
                ]
            ),
            max_size=12,
        ),
    )
)
def test_no_line_breaks_a_parser(line: bytes) -> None:
    for parse in (jsonlines.parse, clf.parse, envoy.parse):
        try:
            record = parse(line)
        except (BadLine, NoRequest):
            continue
        jsonlines.dump(record)


@given(st.text(max_size=50), st.integers(1, 30))
def test_cleaned_and_printable_text(value: str, most: int) -> None:
    assert len(clean(value, most)) <= most
    clean(value, most).encode()
    assert printable(value, most).isprintable()


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.gz"
    some = [RequestRecord("GET", f"/{i}", ts=float(i)) for i in range(10)]
    assert write(path, some) == 10
    assert list(read(path)) == some
    before = path.read_bytes()
    assert gzip.decompress(before).count(b"\n") == 10
    def broken() -> Iterator[RequestRecord]:
        yield some[0]
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write(path, broken())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl.gz"]
    assert write(path, some) == 10
    assert path.read_bytes() == before  # nothing of the time of writing is in it


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(RecordsError):
            write(path, [])


def test_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdout:
        buffer = io.BytesIO()

    monkeypatch.setattr("sys.stdout", Stdout)
    assert write("-", [RequestRecord("GET", "/")]) == 1
    assert Stdout.buffer.getvalue() == b'{"method":"GET","url":"/"}\n'
