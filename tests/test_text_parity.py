"""The core agrees with the plain reference, step by step and as a whole."""

from __future__ import annotations

import base64
import json
import math
from typing import Any
from urllib.parse import quote, quote_plus

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import text as core
from tests import reference_text as ref

PIECES = [
    b"select",
    b"<script>",
    b"%27",
    b"%2527",
    b"&lt;",
    b"&#39;",
    b"&#x3c;",
    b"&#60",
    b"\\u003c",
    b"\\x3c",
    b"\\u{3c}",
    b"%u0027",
    b"../",
    b"/*",
    b"*/",
    b"''",
    b"${",
    b"$IFS",
    b"\xc0\xaf",
    b"\xe0\x80\xaf",
    b"\xef\xbc\x9c",
    b"\r\n",
    b"  ",
    b"\x00",
    b"\xff",
    b"\xe2\x88\x96",
    b"%",
    b"&",
    b"\\",
    b"+",
    b"onerror",
    b"0x41",
    b"alert(1)",
    b"\xc0a",
    b"%2",
    b"&#",
]
hostile = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)), max_size=24).map(b"".join)


@given(hostile, st.booleans())
def test_one_round_of_decoding(text: bytes, plus: bool) -> None:
    assert core.decode(text, plus)[0] == ref.decode(text, plus)


@given(hostile)
def test_no_further_round_is_promised_in_vain(text: bytes) -> None:
    out, changed, again = core.decode(text)
    if not again:
        assert ref.decode(out) == out or not changed
    if not changed:
        assert out == text


@given(hostile)
def test_folding(text: bytes) -> None:
    assert core.fold(text) == ref.fold(text)


@given(hostile.map(lambda b: b[:176]))
def test_tokens(text: bytes) -> None:
    text = ref.fold(text)[:176]
    assert core.tokens(text) == ref.tokens(text)


@given(hostile.map(lambda b: b[:160]))
def test_buckets(text: bytes) -> None:
    text = ref.fold(text)[:160]
    assert core.buckets(text) == ref.buckets(text)


def test_every_keyword_has_its_class() -> None:
    for word, token in ref.KEYWORDS.items():
        if len(word) <= 20:
            assert core.tokens(word.encode()) == [token], word


def test_the_keyword_table_is_the_generated_one() -> None:
    path = ref.Path(__file__).resolve().parent.parent / "native" / "keywords.pxd"
    assert path.read_text() == ref.keywords.render(), "run python native/make_keywords.py"


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    data = core.weights_bytes(rng.normal(size=core.N_TRIGRAMS), rng.normal(size=core.N_TOKEN_GRAMS), -0.5)
    parsed: dict[str, Any] = core.parse_weights(data)
    parsed["data"] = data
    return parsed


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([p for p in PIECES if p != b"&"]), st.binary(max_size=6)),
        min_size=1,
        max_size=60,
    ).map(b"".join)
)
def test_a_query_value_scores_as_its_worst_window(weights: dict[str, Any], value: bytes) -> None:
    host = core.TextHost(weights["data"])
    record = {"method": "GET", "url": "/?q=" + quote_plus(value)}
    decoded = ref.fold(ref.decode_all(quote_plus(value).encode(), plus=True))
    got = [w for place, w in host.values(record) if place == "query.q"]
    if got:
        assert got[: len(ref.windows(decoded))] == ref.windows(decoded)
        worst = max(ref.linear(weights, w) for _, w in host.values(record))
        assert host.explain(record)["linear"] == pytest.approx(worst, abs=1e-3)


@settings(max_examples=200, deadline=None)
@given(hostile.filter(bool))
def test_lexical_features(weights: dict[str, Any], value: bytes) -> None:
    host = core.TextHost(weights["data"])
    record = {"method": "GET", "url": "/" + quote(value)}
    seen = host.values(record)
    e = host.explain(record)
    scores = [ref.linear(weights, w) for _, w in seen]
    best = max(scores)
    if sum(s > best - 1e-3 for s in scores) > 1:
        return  # float32 and float64 may choose differently between equals
    place, window = seen[scores.index(best)]
    f = e["features"]
    expected = ref.lexical(
        window,
        best,
        round(2 ** f["value_length"]) - 1,
        int(f["rounds"]),
        int(f["variant"]),
        "path" if place == "path" else "",
    )
    assert e["place"] == place
    for name in core.FEATURE_NAMES:
        assert f[name] == pytest.approx(expected[name], abs=2e-3), name
    assert len(core.FEATURE_NAMES) == len(expected) == len(f)


json_text = st.text(st.characters(codec="utf-8", exclude_characters="%&\\+"), min_size=1, max_size=30)
names = st.text("abcdefghij_", min_size=1, max_size=8)
documents = st.recursive(
    json_text | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    st.dictionaries(names.filter(lambda n: n != "query"), documents, min_size=1, max_size=4), st.booleans()
)
def test_json_leaves_and_their_places(doc: dict[str, Any], escaped: bool) -> None:
    record = {
        "method": "POST",
        "url": "/",
        "headers": {"content-type": "application/json"},
        "body": json.dumps(doc, ensure_ascii=escaped),
    }
    got = []
    for place, window in core.TextHost(None).values(record):
        if place.startswith("json") and (place, window) not in got:
            got.append((place, window))
    for place, text in ref.json_leaves(doc):
        if text[0] in "[{":
            continue  # may be a document of its own: tests/test_text_values.py
        folded = ref.fold(ref.decode_all(text.encode("utf-8", "surrogatepass")))
        number = text.replace(".", "", 1).removeprefix("-")
        if not all(c in "0123456789" for c in number) and ref.decode(text.encode()) == text.encode():
            assert (place[:96], ref.windows(folded)[0]) in got


@given(st.binary(min_size=9, max_size=60), st.booleans())
def test_base64(raw: bytes, urlsafe: bool) -> None:
    coded = (base64.urlsafe_b64encode if urlsafe else base64.b64encode)(raw)
    odd = sum(not (32 <= b <= 126 or b in b"\t\n\r") for b in raw)
    digits = len(coded.rstrip(b"="))
    assert (core.unbase64(coded) == raw) == (odd <= digits * 3 // 4 // 20)


def test_reference_agrees_with_the_standard_library_on_entities() -> None:
    for n in (34, 38, 39, 47, 60, 62, 96):
        for form in (f"&#{n};", f"&#x{n:x};"):
            assert ref.decode(form.encode()).decode() == ref.unescape_html(form)


def test_quantised_weights_keep_their_order() -> None:
    rng = np.random.default_rng(1)
    tri = rng.normal(size=core.N_TRIGRAMS)
    parsed = core.parse_weights(core.weights_bytes(tri, np.zeros(core.N_TOKEN_GRAMS), 0.25))
    assert np.abs(parsed["trigram"] - tri).max() <= np.abs(tri).max() / 127 / 2 + 1e-6
    assert not parsed["token"].any()
    assert math.isclose(parsed["bias"], 0.25)
