"""Data assembly and the linear model's training."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from native import text as core
from native import trainer
from sidecar.train import dataset as ds
from sidecar.train.attack_grammar import attack_texts
from sidecar.train.benign_grammar import benign_texts
from sidecar.train.linear import calibrate_threshold, threshold_at, train_linear

HOST: dict[str, Any] = {
    "method": "GET",
    "url": "/shop/list?page=2&sort=name",
    "headers": {"cookie": "sid=abc", "host": "h"},
    "meta": {"site": "s"},
}
# no bytes that a further round of decoding would change, no line ends (a header has none), nothing numeric, not
# letters alone (such a header or cookie is not read)
plain = st.text("abcdefghij <>'\"(){};:,|=#$@!?*[]~^`", min_size=4, max_size=40).filter(
    lambda t: t.strip() == t and "  " not in t and not t.startswith(("{", "[", '"')) and t.strip("abcdefghij~")
)


@settings(deadline=None)
@given(plain.map(lambda t: f"Zz{t}zZ"), st.integers(0, 10**6))
def test_a_transplanted_text_is_found_again(text: str, seed: int) -> None:
    record = ds.transplant(random.Random(seed), HOST, text)
    windows = b"\n".join(w for _, w in core.TextHost(None).values(record))
    assert core.fold(text.encode()) in windows
    assert "meta" not in record
    assert HOST["url"] == "/shop/list?page=2&sort=name"
    assert HOST["headers"] == {"cookie": "sid=abc", "host": "h"}


def test_transplants_go_everywhere() -> None:
    rng = random.Random(1)
    seen = {
        p.split(".")[0].split("[")[0]
        for _ in range(300)
        for p, w in core.TextHost(None).values(ds.transplant(rng, HOST, "zq'zq <zq"))
        if b"zq'zq" in w
    }
    assert seen == {"query", "path", "form", "json", "header", "cookie"}


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 500), min_size=1, max_size=30))
def test_splits_are_by_group_and_repeatable(sizes: dict[str, int]) -> None:
    splits = ds.split_groups(sizes)
    assert splits == ds.split_groups(dict(reversed(list(sizes.items()))))
    assert set(splits) == set(sizes)
    assert set(splits.values()) <= set(ds.SPLITS)


def test_large_sources_have_all_splits() -> None:
    splits = ds.split_groups({f"site {k}": 50 for k in range(40)})
    share = {s: sum(v == s for v in splits.values()) / 40 for s in ds.SPLITS}
    assert 0.15 <= share["holdout"] <= 0.3
    assert 0.1 <= share["calibrate"] <= 0.25


@pytest.mark.parametrize(
    ("cls", "text", "kept"),
    [
        ("sqli", "1' or 1=1--", True),
        ("xss", "onfocus", False),
        ("LFI", "web.config", False),
        ("LFI", "/etc/passwd", True),
        ("LFI", "../../x", True),
        ("LFI", "/humans.txt", False),
        ("x", "# a comment of the list", False),
        ("x", "ab", False),
        ("Open Redirect", "//x.test@y", False),
        ("Directory Traversal", "../{FILE}", True),
    ],
)
def test_only_attacks_are_taken_as_such(cls: str, text: str, kept: bool) -> None:
    assert (ds.attack_text(cls, text) is not None) == kept


def test_only_what_carries_the_attack_is_taken_from_a_request() -> None:
    record = {
        "method": "POST",
        "url": "/get?a=1%27--&ok=2",
        "body": "p=%3Cb%3E",
        "headers": {"User-Agent": "Mozilla/5.0 (X)", "Content-Type": "application/x-www-form-urlencoded"},
    }
    assert ds.carried_texts(record) == ["1'--", "2", "<b>"]
    assert ds.carried_texts({"method": "GET", "url": "/a/..%2f..%2fx"}) == ["/a/../../x"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    d = tmp_path_factory.mktemp("data")
    rng = random.Random(2)
    benign = [
        {
            "method": "GET",
            "url": f"/p{k}?q={rng.choice('abcdef')}{k}&lang=en",
            "headers": {"host": "h"},
            "label": 0,
            "meta": {"site": f"site{k % 12}"},
        }
        for k in range(240)
    ]
    attacks = [
        {"src": "s", "cls": "sqli", "file": f"f{k % 9}", "payload": f"{k}' or {k}={k} union select {k}--"}
        for k in range(90)
    ]
    texts = [
        {"src": f"board{k % 5}", "kind": "title", "text": f"How to use {rng.choice(['a', 'the'])} union {k}?"}
        for k in range(60)
    ]
    log = [
        {"ts": 1.0, "client": f"c{k}", "method": "GET", "url": f"/l/{k}", "status": 200, "ua": "Agent/1"}
        for k in range(30)
    ]
    agents = [
        {"src": "s", "kind": "bot", "pattern": f"p{k}", "ua": f"Bot{k}/1.0 (+http://b.test)"}
        for k in range(20)
    ]
    csv = d / "values.csv"
    csv.write_text(
        'payload,length,attack_type,label\nsome street 5,13,norm,norm\n"1\' and 1=1#",10,sqli,anom\n'
    )
    return [
        write(d / "benign.jsonl.gz", benign),
        write(d / "payloads.jsonl.gz", attacks),
        write(d / "texts.jsonl.gz", texts),
        write(d / "log.jsonl.gz", log),
        write(d / "agents.jsonl.gz", agents),
        csv,
    ]


@pytest.fixture(scope="module")
def data(files: list[Path]) -> ds.Dataset:
    return ds.load(files, seed=1, grammar_texts=2000)


def test_formats_are_told_apart(data: ds.Dataset) -> None:
    sources = {(r.source, r.label) for r in data.requests} | {(t.source, t.label) for t in data.texts}
    assert sources == {
        ("benign", 0),
        ("log", 0),
        ("agents", 0),
        ("payloads", 1),
        ("texts", 0),
        ("values", 0),
        ("values", 1),
        ("attack_grammar", 1),
        ("benign_grammar", 0),
    }


def test_no_group_is_in_two_splits(data: ds.Dataset) -> None:
    seen: dict[tuple[str, str, int], str] = {}
    for item in [*data.requests, *data.texts]:
        assert seen.setdefault((item.source, item.group, item.label), item.split) == item.split


def test_no_attack_text_is_in_two_splits(data: ds.Dataset) -> None:
    texts = [t.text.lower() for t in data.texts if t.label]
    assert len(texts) == len(set(texts))


def test_assembly_is_repeatable(files: list[Path], data: ds.Dataset) -> None:
    again = ds.load(files, seed=1, grammar_texts=2000)
    assert again.texts == data.texts
    assert again.labelled_requests("train", 3) == data.labelled_requests("train", 3)


def test_unknown_formats_and_broken_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown format"):
        ds.load([write(tmp_path / "a.jsonl.gz", [{"x": 1}])], grammar_texts=0)
    (tmp_path / "b.jsonl").write_text('{"method": "GET", "url": "/"}\n{broken\n')
    with pytest.raises(ValueError, match=r"b\.jsonl:2"):
        ds.load([tmp_path / "b.jsonl"], grammar_texts=0)


def test_training_separates_and_calibrates(data: ds.Dataset) -> None:
    weights = train_linear(data, seed=1)
    assert weights.data == train_linear(data, seed=1).data
    host = core.TextHost(weights.data)
    threshold = calibrate_threshold(host, data, request_rate=0.01, text_rate=0.02)
    rows = data.labelled_requests("holdout", 1)
    scores = host.linear([r.record for r in rows])
    labels = np.array([r.label for r in rows])
    assert (scores[labels == 1] >= threshold).mean() > 0.9
    assert (scores[labels == 0] >= threshold).mean() < 0.05


def test_training_needs_both_labels() -> None:
    with pytest.raises(ValueError, match="needs"):
        train_linear(ds.Dataset())


def test_grammars_draw_distinct_texts_of_every_class() -> None:
    for draw in (attack_texts, benign_texts):
        rows = draw(random.Random(1), 3000)
        assert len({text for _, text in rows}) == len(rows) == 3000
        assert len({cls for cls, _ in rows}) > 10
        assert not any("<<" in text and ">>" in text and "<<word" in text for _, text in rows)


def test_threshold_at_keeps_its_promise() -> None:
    scores = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, np.nan], dtype=np.float32)
    for rate in (0.0, 0.1, 0.25, 0.5, 1.0):
        assert (scores >= threshold_at(scores, rate)).mean() <= rate
    assert (scores >= threshold_at(scores, 0.2)).sum() == 2
    assert threshold_at(np.array([], dtype=np.float32), 0.1) == float("inf")


def test_trainer_learns_an_and_of_features_and_checks_its_input() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((400, 8)) < 0.5
    y = (x[:, 0] & ~x[:, 1]).astype(np.uint8)
    indices = np.concatenate([np.flatnonzero(r) for r in x]).astype(np.uint32)
    indptr = np.concatenate(([0], np.cumsum(x.sum(1))))
    w, bias = trainer.fit(indices, indptr, np.arange(401), y, np.ones(400), 8, epochs=30, rate=0.3)
    z = np.array([w[np.flatnonzero(r)].sum() / np.sqrt(r.sum() + 4) + bias for r in x])
    assert ((z > 0) == y).mean() > 0.95
    with pytest.raises(ValueError, match="beyond"):
        trainer.fit(indices, indptr, np.arange(401), y, np.ones(400), 4)
    with pytest.raises(ValueError, match="belong"):
        trainer.fit(indices, indptr, np.arange(301), y, np.ones(400), 8)
