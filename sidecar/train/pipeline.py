"""From data files to a bundle: read, train both sides, calibrate, time the engines, write, report."""
from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sidecar import bundle as bundles
from sidecar import engines
from sidecar.bundle import Bundle, BundleError, pack_checkpoint, prepare_runtime, write_bundle
from sidecar.compilers import CompileError
from sidecar.records import Reader, RecordsError
from sidecar.simulate import ATTACKS, Attack, Scenario, simulate
from sidecar.train import behaviour, calibrate, text_side
from sidecar.train.dataset import Dataset, LabelledRequest, load
from sidecar.train.report import SCORES, Report, slice_table, write_report

Tell = Callable[[str, float], None]

SOURCES = Path(__file__).with_name("default_sources.json")
FILES_MAX = 100
FILE_BYTES_MAX = 2 << 30
FOLDS_MAX = 20
SIMULATED_TEXT_REQUESTS = 6000    # benign simulated requests that the text side learns from, per scenario
# an XML declaration that lost its name to the scrambling of secrets: no client sends that
SCRAMBLED = re.compile(r"\s*<\?[0-9a-f]{6,}")
EVERY_ATTACK = tuple(Attack(name, variant) for name, variants in ATTACKS.items() for variant in variants)


class TrainingError(Exception):
    """Training isn't possible with these data or into this place; the text says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """What to train from and to where.

    data: text side; behaviour: logs with times and clients. licences: file name -> licence, for the
    manifest. simulate: scenarios (without attacks) that join both sides. report: folder, None for
    `<out>/report`. cache: of prepared models, None for the default. engine: what scores the trees; with auto,
    packed and compiled trees are timed here and the figures go into the manifest."""
    out: Path
    data: Sequence[Path] = ()
    behaviour: Sequence[Path] = ()
    simulate: Sequence[Scenario] = ()
    licences: Mapping[str, str] = field(default_factory=dict)
    name: str = ""
    seed: int = 0
    folds: int = 4
    grammar_texts: int = 60_000
    report: Path | None = None
    cache: Path | None = None
    jobs: int = 2
    engine: Literal["auto", "packed", "compiled"] = "auto"


@dataclass(frozen=True)
class Outcome:
    bundle: Bundle
    report: Path
    runtime: Path


def default_plan(data_dir: Path, out: Path, **options: Any) -> Plan:
    """The plan for the bundle that ships: the permissively licensed sets found in data_dir, and the simulator.
    Raises TrainingError naming files that are missing."""
    wanted = json.loads(SOURCES.read_text())
    missing = sorted(name for side in ("text", "behaviour") for name in wanted[side]
                     if not (data_dir / name).is_file())
    if missing:
        raise TrainingError(f"{data_dir}: missing: {', '.join(missing)}; --default-data wants the folder with the "
                            f"sets listed in {SOURCES.name}")
    return Plan(out=out, data=[data_dir / name for name in wanted["text"]],
                behaviour=[data_dir / name for name in wanted["behaviour"]],
                simulate=[Scenario(**entry) for entry in wanted["simulate"]],
                licences={**wanted["text"], **wanted["behaviour"]}, name=wanted["name"], **options)


# ---------------------------------------------------------------- reading

def check_files(paths: Sequence[Path]) -> None:
    """Every file is there, not empty and not enormous; all problems are reported together."""
    problems = []
    for path in paths:
        try:
            if not path.is_file():
                problems.append(f"{path}: no such file")
            elif path.stat().st_size == 0:
                problems.append(f"{path}: empty")
            elif path.stat().st_size > FILE_BYTES_MAX:
                problems.append(f"{path}: larger than {FILE_BYTES_MAX >> 30} GiB; divide it")
        except OSError as e:
            problems.append(f"{path}: cannot read: {e.strerror}")
    if len(paths) > FILES_MAX:
        problems.append(f"{len(paths)} files, at most {FILES_MAX}")
    names = Counter(path.name for path in paths)
    problems += [f"{name}: given twice; sources are told apart by their file names" for name, n in names.items()
                 if n > 1]
    if problems:
        raise TrainingError("; ".join(problems))


def read_text_data(plan: Plan) -> Dataset:
    """The text side's dataset, simulated benign requests included. Raises TrainingError."""
    check_files(plan.data)
    try:
        data = load(plan.data, plan.seed, plan.grammar_texts)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as e:
        raise TrainingError(
            f"cannot read the data: {e}. Known are request records (.jsonl), payload lists, texts, user agents and "
            "CSV with payload,length,attack_type,label; each may be compressed (.gz)") from e
    whole = len(data.requests)
    data.requests = [r for r in data.requests if r.label == 1 or not SCRAMBLED.match(str(r.record.get("body") or ""))]
    data.skipped["damaged when secrets were scrambled"] += whole - len(data.requests)
    for scenario in plan.simulate:
        source = f"simulated-{scenario.seed}"
        rng = np.random.default_rng(scenario.seed)
        # every distinct request once: what people rarely send must be among them, too
        benign = list({(r.url, r.body): r for r in simulate(scenario) if r.label != 1}.values())
        chosen = sorted(rng.choice(len(benign), min(len(benign), SIMULATED_TEXT_REQUESTS), replace=False))
        for r in (benign[i] for i in chosen):
            record = {"method": r.method, "url": r.url, "headers": r.headers, "body": r.body}
            data.requests.append(LabelledRequest(record, 0, source, r.client or "", "train", r.cls or ""))
    return data


def read_behaviour_data(plan: Plan, tell: Tell) -> dict[str, behaviour.Rows]:
    """Window features per source. Raises TrainingError."""
    check_files(plan.behaviour)
    stage = "replaying for behaviour"
    total = max(1, len(plan.behaviour) + len(plan.simulate))
    out: dict[str, behaviour.Rows] = {}

    def add(name: str, records: Any) -> None:
        done = len(out)
        tell(stage, done / total)
        rows = behaviour.behaviour_rows(records)
        if int((rows.labels == 0).sum()) < calibrate.ROWS_MIN:
            raise TrainingError(
                f"{name}: {int((rows.labels == 0).sum())} benign records with a time and a client, at least "
                f"{calibrate.ROWS_MIN} are needed to learn what is usual ({rows.without_time} lack one of the two)")
        out[name] = rows

    for path in plan.behaviour:
        reader = Reader([path])
        try:
            add(path.name, reader)
        except RecordsError as e:
            raise TrainingError(str(e)) from e
        if any(report.probably_wrong_format for report in reader.reports):
            raise TrainingError("; ".join(reader.messages()))
    for scenario in plan.simulate:
        whole = Scenario(users=scenario.users, hours=scenario.hours, seed=scenario.seed,
                         start_hour=scenario.start_hour, attacks=EVERY_ATTACK)
        add(f"simulated-{scenario.seed}", simulate(whole))
    tell(stage, 1.0)
    return out


# ---------------------------------------------------------------- putting it together

def _schema(number: int, names: list[str]) -> dict[str, Any]:
    return {"number": number, "features": names, "sha256": bundles.schema_hash(number, names)}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sources(plan: Plan, side: text_side.TextSide | None, rows: Mapping[str, behaviour.Rows]) -> list[dict[str, Any]]:
    """The manifest's account of what was trained from."""
    by_stem = {path.name.removesuffix(".gz").rsplit(".", 1)[0]: path for path in plan.data}
    by_name = {path.name: path for path in plan.behaviour}
    out = []

    def entry(name: str, path: Path | None, which: str, benign: int, attack: int) -> None:
        own = "made here by a generator of this project" if path is None else "not stated"
        out.append({"name": path.name if path else name, "sha256": _file_hash(path) if path else "",
                    "licence": plan.licences.get(path.name, own) if path else own, "side": which,
                    "benign": benign, "attack": attack})

    for name, (benign, attack) in sorted((side.counts if side else {}).items()):
        entry(name, by_stem.get(name), "text", benign, attack)
    for name, part in rows.items():
        entry(name, by_name.get(name), "behaviour", int((part.labels == 0).sum()), int(part.labels.sum()))
    return out


def _metrics(side: text_side.TextSide | None, beh: behaviour.BehaviourSide | None,
             behaviour_scores: tuple[Mapping[str, Any], Mapping[str, Any]]) -> dict[str, Any]:
    def table(benign: Mapping[str, Any], attacks: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"slice": row.name, "label": row.label, "rows": row.rows,
                 **{f"at_{s}": round(share, 5) for s, share in zip(SCORES, row.shares, strict=True)}}
                for row in slice_table(benign, attacks)]

    out: dict[str, Any] = {"note": "shares of requests at or above a score, by models that haven't seen the source's "
                                   "group (site, repository, payload file)"}
    if side is not None:
        out["text"] = table(side.benign, side.attacks)
        out["text_refused_with_thresholds_of_other_groups"] = {k: round(v, 5) for k, v in side.nested.items()}
        out["text_linear_alone"] = {k: round(v, 5) for k, v in side.raw_linear.items()}
    if beh is not None:
        out["behaviour"] = table(*behaviour_scores)
    return out


def _measured(plan: Plan, checkpoints: Mapping[str, bytes], rows: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's record of how fast the engines in question are here. Raises BundleError."""
    wanted = engines.ENGINES if plan.engine == "auto" else (plan.engine,)
    try:
        return {"cpu": engines.cpu_name(), "us": engines.measure(checkpoints, rows, wanted)}
    except CompileError as e:
        raise BundleError(f"{plan.out}: cannot be prepared with engine {plan.engine}: {e}") from e


def train(plan: Plan, tell: Tell) -> Outcome:
    """Train, write, prepare, report. Raises TrainingError, BundleError."""
    if not plan.data and not plan.behaviour and not plan.simulate:
        raise TrainingError("no data given")
    if not 2 <= plan.folds <= FOLDS_MAX:
        raise TrainingError(f"folds must be between 2 and {FOLDS_MAX}")
    check_files(plan.data)
    check_files(plan.behaviour)
    side: text_side.TextSide | None = None
    beh: behaviour.BehaviourSide | None = None
    rows: dict[str, behaviour.Rows] = {}
    try:
        if plan.data:
            tell("reading", 0.0)
            data = read_text_data(plan)
            tell("reading", 1.0)
            side = text_side.train_text(data, plan.seed, plan.folds, plan.jobs, tell)
        if plan.behaviour or plan.simulate:
            rows = read_behaviour_data(plan, tell)
            tell("Isolation Forest", 0.0)
            beh = behaviour.fit(rows, plan.seed, plan.jobs)
            tell("Isolation Forest", 1.0)
    except (text_side.TooLittle, calibrate.CalibrationError) as e:
        raise TrainingError(str(e)) from e

    files: dict[str, bytes] = {}
    trees: dict[str, str] = {}
    knots: dict[str, list[tuple[float, float]]] = {}
    checkpoints: dict[str, Any] = {}
    if side is not None:
        files[bundles.LINEAR] = side.linear
        checkpoints.update(xgboost=side.trees.xgboost, forest=side.trees.forest)
        knots.update(side.knots)
    if beh is not None:
        checkpoints["isolation"] = beh.model
        knots["behaviour"] = beh.knots
    for slot, model in checkpoints.items():
        trees[slot] = f"{slot}.treelite.gz"
        files[trees[slot]] = pack_checkpoint(model.serialize_bytes())
    tell("timing the engines", 0.0)
    sample = {"xgboost": side.sample, "forest": side.sample} if side else {}
    if rows:
        sample["isolation"] = np.concatenate([part.features[::max(1, len(part.features) // 2000)]
                                              for part in rows.values()])
    measured = _measured(plan, {slot: model.serialize_bytes() for slot, model in checkpoints.items()}, sample)
    tell("timing the engines", 1.0)
    seen = ({n: calibrate.apply(beh.knots, r) for n, r in beh.out_of_fold.items()},
            {n: calibrate.apply(beh.knots, r) for n, r in beh.attacks.items()}) if beh else ({}, {})
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    sources = _sources(plan, side, rows)
    manifest = {
        "name": plan.name or plan.out.name, "created": now,
        "text": _schema(*bundles.text_schema()) if side else None,
        "behaviour": _schema(*bundles.behaviour_schema()) if beh else None,
        "trees": trees,
        "combination": {n: c.model_dump() for n, c in side.combination.items()} if side else {},
        "calibration": {n: {"knots": pairs} for n, pairs in knots.items()},
        "thresholds": calibrate.stated(knots), "training": sources,
        "metrics": _metrics(side, beh, seen),
        "versions": {"python": platform.python_version(), "outrider": _version("outrider"),
                     **{n: _version(n) for n in ("treelite", "tl2cgen", "xgboost-cpu", "scikit-learn", "numpy")}},
        "engine": plan.engine, "measured": measured}
    tell("writing", 0.0)
    written = write_bundle(plan.out, manifest, files)
    folder = plan.report or plan.out / "report"
    report = write_report(folder, Report(
        title=f"Outrider model bundle: {manifest['name']}",
        benign=side.benign if side else {}, attacks=side.attacks if side else {},
        roc=side.roc if side else ({}, {}), behaviour_roc=(beh.out_of_fold, beh.attacks) if beh else ({}, {}),
        importance=side.importance if side else (), behaviour_benign=seen[0], behaviour_attacks=seen[1],
        sources=sources,
        facts=[("made", now), ("sha256", written.sha256),
               ("size", f"{sum(map(len, files.values())) / 1024:,.0f} KiB")]))
    tell("writing", 1.0)
    tell("preparing", 0.0)
    runtime = prepare_runtime(written, plan.cache)
    tell("preparing", 1.0)
    return Outcome(written, report, runtime)


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


__all__ = ["BundleError", "Outcome", "Plan", "TrainingError", "default_plan", "train"]
