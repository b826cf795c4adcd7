"""One row at a time through tree models: packed and compiled trees as the pipeline calls them, and their peers.

    python -m bench.models [--rounds N] [--rows N] [--quick] [--skip ENGINE] [--bundle FOLDER] [--json]

Models: three of the usual sizes, trained here and now on generated data of 32 features, and the bundle's own. Rows are
20,000 different ones for what is called natively (in a loop in C, one row a call), some hundreds of the same for what
is called from Python (one call a row, as a Python service would). All engines take turns in rounds, so that noise of
the machine hits all alike.

mean: of all calls. p50 and p99: of single calls between two readings of the clock (some 0.02 us are the clock's).
Compiled trees are TL2cgen's C through a function pointer, float32, compiled with -O2 (the deep forest with -O1: GCC
takes minutes for more) and kept in a cache. Peers use one thread.
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import treelite
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from native.models import Models
from sidecar import compilers, engines
from sidecar.bundle import BundleError, checkpoints_of, load_bundle

FEATURES = 32
TRAINING_ROWS = 20_000
ENGINES = ("packed", "packed portable", "compiled", "tl2cgen.Predictor", "GTIL", "scikit-learn", "XGBoost",
           "ONNX Runtime")
CALL_SECONDS = 0.5                # about as long a round of calls from Python takes


class Unavailable(Exception):
    """An engine that can't be measured for this model here; the text says why."""


class NotOfThisModel(Unavailable):
    """An engine for models of another kind, or for models that are trained here."""


@dataclass
class Model:
    """One model: as Treelite has it (float32), and as the library that trained it has it."""
    name: str
    treelite: Any
    rows: Any                     # (n, features) float32
    sklearn: Any = None
    xgboost: Any = None
    flags: str = "-O2"

    @property
    def ratio(self) -> float:
        header = self.treelite.get_header_accessor()
        isolation = header.get_field("postprocessor") == "exponential_standard_ratio"
        return float(header.get_field("ratio_c")[0]) if isolation else 0.0

    def reference(self, rows: Any) -> Any:
        raw = compilers.reference(self.treelite, rows)
        return np.exp2(-raw / self.ratio) if self.ratio else raw


@dataclass
class Times:
    means_us: list[float] = field(default_factory=list)
    calls_us: list[Any] = field(default_factory=list)

    def row(self, model: str, engine: str, difference: float | None) -> dict[str, Any]:
        calls = np.concatenate(self.calls_us)
        return {"model": model, "engine": engine, "p50_us": round(float(np.percentile(calls, 50)), 3),
                "p99_us": round(float(np.percentile(calls, 99)), 3), "mean_us": round(float(np.mean(self.means_us)), 3),
                "best_round_us": round(min(self.means_us), 3), "max_difference": difference}


@dataclass
class Runner:
    """time() -> (mean us, us of each call); outputs(rows) -> (n,), comparable with Model.reference."""
    time: Callable[[], tuple[float, Any]]
    outputs: Callable[[Any], Any]


# ---------------------------------------------------------------- the models

def sample(n: int, seed: int) -> tuple[Any, Any]:
    """Rows (n, 32) float32 of several shapes, and labels 0 or 1 that depend on some of them."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, FEATURES))
    rows[:, 8:16] = np.exp(rows[:, 8:16])                    # sizes
    rows[:, 16:24] = rng.poisson(3.0, size=(n, 8))           # counts
    signal = rows[:, 0] * rows[:, 1] + np.log(rows[:, 8]) - 0.3 * (rows[:, 16] - 3) + np.sin(2 * rows[:, 2])
    labels = (signal + 0.7 * rng.normal(size=n) > 0).astype(int)
    return rows.astype(np.float32), labels


def usual_models(rows: int, seed: int) -> dict[str, Callable[[], Model]]:
    """The three, by name; each is trained when it is asked for."""
    train, labels = sample(TRAINING_ROWS, seed)
    test = sample(rows, seed + 1)[0]

    def isolation() -> Model:
        from sklearn.ensemble import IsolationForest

        own = IsolationForest(n_estimators=100, max_samples=256, random_state=seed).fit(train)
        return Model(name, compilers.to_float32(treelite.sklearn.import_model(own)), test, sklearn=own)

    def boosted() -> Model:
        import xgboost

        own = xgboost.train({"objective": "binary:logistic", "max_depth": 6, "eta": 0.1, "nthread": 1, "verbosity": 0,
                             "seed": seed}, xgboost.DMatrix(train, labels), 200)
        return Model(names[1], treelite.frontend.from_xgboost(own), test, xgboost=own)

    def forest() -> Model:
        from sklearn.ensemble import RandomForestRegressor

        # a regressor on 0 and 1, as `outrider train` does: its output is the probability
        own = RandomForestRegressor(n_estimators=100, max_depth=10, max_features=0.33, random_state=seed,
                                    n_jobs=len(os.sched_getaffinity(0))).fit(train, labels)
        own.n_jobs = 1
        return Model(names[2], compilers.to_float32(treelite.sklearn.import_model(own)), test, sklearn=own, flags="-O1")

    names = ["Isolation Forest 100x256", "XGBoost 200xd6", "random forest 100xd10"]
    name = names[0]
    return dict(zip(names, (isolation, boosted, forest), strict=True))


def bundle_models(path: str, rows: int) -> dict[str, Callable[[], Model]]:
    """A bundle's own models, on rows near their thresholds."""
    bundle = load_bundle(path)

    def make(slot: str, content: bytes) -> Model:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = Path(scratch) / "model"
            checkpoint.write_bytes(content)
            return Model(f"{bundle.manifest.name}: {slot}", treelite.Model.deserialize(checkpoint),
                         engines.threshold_rows(checkpoint, rows))

    return {f"{bundle.manifest.name}: {slot}": lambda slot=slot, content=content: make(slot, content)
            for slot, content in checkpoints_of(bundle).items()}


# ---------------------------------------------------------------- engines that are called natively

def native(model: Model, folder: Path, built: engines.Built, portable: bool = False) -> Runner:
    engines.single_runtime(folder, built)
    models = Models(folder)
    return Runner(lambda: models.time_rows("isolation", model.rows, portable),
                  lambda rows: models.predict("isolation", rows))


def packed(model: Model, folder: Path, portable: bool = False) -> Runner:
    (folder / "model").write_bytes(model.treelite.serialize_bytes())
    built = engines.build({"model": folder / "model"}, {"model": engines.Choice("packed")}, folder)["model"]
    return native(model, folder, built, portable)


def library(model: Model, cache: Path) -> tuple[Path, compilers.TreeLibrary]:
    """(folder, library) of the compiled model, from the cache or compiled now."""
    content = model.treelite.serialize_bytes()
    flags = tuple(model.flags if flag == "-O2" else flag for flag in compilers.CFLAGS)
    try:
        identity = compilers.compiler_identity(compilers.find_compiler())
    except compilers.CompileError as e:
        raise Unavailable(str(e)) from e
    key = hashlib.sha256(b"\n".join([content, *map(str.encode, flags), identity.encode(),
                                     version("tl2cgen").encode()])).hexdigest()[:32]
    folder = cache / key
    if not (folder / "library.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        (folder / "model").write_bytes(content)
        try:
            built = compilers.compile_checkpoint(folder / "model", folder, "model", len(os.sched_getaffinity(0)), flags)
        except compilers.CompileError as e:
            raise Unavailable(str(e)) from e
        (folder / "library.json").write_text(json.dumps(asdict(built)))
    return folder, compilers.TreeLibrary(**json.loads((folder / "library.json").read_text()))


# ---------------------------------------------------------------- engines that are called from Python

def called(model: Model, call: Callable[[Any], Any], outputs: Callable[[Any], Any]) -> Runner:
    """Time call(row (1, features)), as many rows as fit into a round; each round goes on with other rows."""
    position = 0
    call(model.rows[:1])
    started = time.perf_counter()
    for i in range(5):
        call(model.rows[i:i + 1])
    n = int(min(2000, max(20, CALL_SECONDS / ((time.perf_counter() - started) / 5))))

    def timed() -> tuple[float, Any]:
        nonlocal position
        out = np.empty(n)
        rows = [model.rows[(position + i) % len(model.rows)][None, :] for i in range(n)]
        position += n
        clock = time.perf_counter_ns
        for i, row in enumerate(rows):
            before = clock()
            call(row)
            out[i] = clock() - before
        return float(out.mean()) / 1000, out / 1000

    def each(rows: Any) -> Any:
        return np.array([float(np.asarray(outputs(row[None, :])).ravel()[-1]) for row in rows])

    return Runner(timed, each)


def predictor(model: Model, cache: Path) -> Runner:
    import tl2cgen

    folder, built = library(model, cache)
    own = tl2cgen.Predictor(str(folder / built.library), nthread=1)

    def call(row: Any) -> Any:
        return own.predict(tl2cgen.DMatrix(row), pred_margin=not model.ratio)

    return called(model, call, call)


def gtil(model: Model) -> Runner:
    def call(row: Any) -> Any:
        return treelite.gtil.predict(model.treelite, row, nthread=1, pred_margin=not model.ratio)

    return called(model, call, call)


def scikit_learn(model: Model) -> Runner:
    if model.sklearn is None:
        raise NotOfThisModel
    if model.ratio:
        return called(model, model.sklearn.score_samples, lambda row: -model.sklearn.score_samples(row))
    return called(model, model.sklearn.predict, model.sklearn.predict)


def xgboost_inplace(model: Model) -> Runner:
    if model.xgboost is None:
        raise NotOfThisModel

    def call(row: Any) -> Any:
        return model.xgboost.inplace_predict(row, predict_type="margin")

    return called(model, call, call)


def onnx_runtime(model: Model) -> Runner:
    if model.sklearn is None and model.xgboost is None:
        raise NotOfThisModel
    try:
        import onnxruntime
        from skl2onnx import to_onnx
        from skl2onnx.common.data_types import FloatTensorType as SklearnFloats
    except ImportError as e:
        raise Unavailable(f"{e.name or e} is not installed (pip install 'outrider[bench]')") from e
    try:
        if model.xgboost is not None:
            from onnxmltools import convert_xgboost
            from onnxmltools.convert.common.data_types import FloatTensorType

            graph = convert_xgboost(model.xgboost, initial_types=[("row", FloatTensorType([None, FEATURES]))])
        else:
            graph = to_onnx(model.sklearn, initial_types=[("row", SklearnFloats([None, FEATURES]))],
                            target_opset={"": 18, "ai.onnx.ml": 3})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as e:        # converters raise all kinds of things for versions that they don't know
        raise Unavailable(f"cannot convert: {type(e).__name__}: {str(e)[:200]}") from e
    last, feed = [session.get_outputs()[-1].name], session.get_inputs()[0].name

    def call(row: Any) -> Any:
        return session.run(last, {feed: row})[0]

    def outputs(row: Any) -> float:
        value = call(row)
        value = value[0] if isinstance(value, list) else np.asarray(value).ravel()[-1]
        value = float(value[1]) if isinstance(value, dict) else float(value)
        if model.ratio:
            return -(value + float(model.sklearn.offset_))
        return math.log(value / (1 - value)) if model.xgboost is not None else value

    return called(model, call, outputs)


def runner(model: Model, engine: str, folder: Path, cache: Path) -> Runner:
    """Raises Unavailable."""
    folder.mkdir(mode=0o700)
    if engine == "packed":
        return packed(model, folder)
    if engine == "packed portable":
        return packed(model, folder, portable=True)
    if engine == "compiled":
        return native(model, *library(model, cache))
    if engine == "tl2cgen.Predictor":
        return predictor(model, cache)
    return {"GTIL": gtil, "scikit-learn": scikit_learn, "XGBoost": xgboost_inplace,
            "ONNX Runtime": onnx_runtime}[engine](model)


# ---------------------------------------------------------------- measuring

def measure(model: Model, chosen: tuple[str, ...], rounds: int, cache: Path,
            tell: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[str]]:
    """(result rows, what was left out and why) of one model."""
    runners: dict[str, Runner] = {}
    left_out = []
    checked = np.ascontiguousarray(model.rows[:300])
    with tempfile.TemporaryDirectory(prefix="outrider-bench-") as scratch:
        for engine in chosen:
            tell(f"{model.name}: preparing {engine}")
            try:
                runners[engine] = runner(model, engine, Path(scratch) / engine.replace(" ", "-"), cache)
            except NotOfThisModel:
                continue
            except Unavailable as e:
                left_out.append(f"{model.name}: {engine}: {e}")
        want = model.reference(checked)
        times = {engine: Times() for engine in runners}
        for turn in range(rounds):
            tell(f"{model.name}: round {turn + 1} of {rounds}")
            for engine, one in runners.items():
                mean_us, calls_us = one.time()
                times[engine].means_us.append(mean_us)
                times[engine].calls_us.append(calls_us)
        rows = []
        for engine, one in runners.items():
            difference = float(np.max(np.abs(one.outputs(checked) - want)))
            rows.append(times[engine].row(model.name, engine, float(f"{difference:.2g}")))
    return rows, left_out


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="One row at a time (batch 1)")
    for heading in ("model", "engine"):
        table.add_column(heading, no_wrap=True)
    for heading in ("mean us", "p50 us", "p99 us", "to packed", "differs by"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = {r["model"]: r["mean_us"] for r in rows if r["engine"] == "packed"}
    before = None
    for r in rows:
        if before not in (None, r["model"]):
            table.add_section()
        ratio = f"{r['mean_us'] / base[r['model']]:.1f}x" if base.get(r["model"]) else "-"
        table.add_row(r["model"] if r["model"] != before else "", r["engine"],
                      *(f"{r[k]:,.2f}" if r[k] < 100 else f"{r[k]:,.0f}" for k in ("mean_us", "p50_us", "p99_us")),
                      ratio, f"{r['max_difference']:.1g}")
        before = r["model"]
    return table


@click.command(short_help="Tree models one row at a time: packed, compiled and their peers.")
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(1, 1000), help="Turns of each engine.")
@click.option("--rows", default=20_000, show_default=True, type=click.IntRange(300, 1_000_000),
              help="Different rows that native engines score in a round.")
@click.option("--quick", is_flag=True, help="3 rounds, without what has to be compiled first.")
@click.option("--skip", multiple=True, type=click.Choice(ENGINES), help="Leave an engine out; may be repeated.")
@click.option("--model", "only", multiple=True, metavar="TEXT", help="Only models with TEXT in their name.")
@click.option("--bundle", default="default", show_default=True, help="Bundle whose models are measured, too.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 2))
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), default=None, metavar="DIR",
              help="Cache of compiled models. Default: $XDG_CACHE_HOME/outrider.")
@click.option("--json", "as_json", is_flag=True, help="A list of rows: model, engine, p50_us, p99_us, mean_us, ...")
def command(rounds: int, rows: int, quick: bool, skip: tuple[str, ...], only: tuple[str, ...], bundle: str, seed: int,
            cache: Path | None, as_json: bool) -> None:
    """Time tree models one row at a time: packed and compiled trees as the pipeline calls them, scikit-learn,
    XGBoost, ONNX Runtime, Treelite's GTIL and tl2cgen.Predictor.

    The first run compiles for a minute or two; --quick doesn't.
    """
    if quick:
        rounds, skip = min(rounds, 3), (*skip, "compiled", "tl2cgen.Predictor")
    chosen = tuple(engine for engine in ENGINES if engine not in skip)
    errors = Console(stderr=True)
    try:
        kept = compilers.cache_root(cache) / "bench"
        kept.mkdir(mode=0o700, exist_ok=True)
        makers = {**usual_models(rows, seed), **bundle_models(bundle, rows)}
    except (compilers.CompileError, BundleError) as e:
        raise click.ClickException(str(e)) from e
    makers = {name: make for name, make in makers.items() if not only or any(text in name for text in only)}
    out: list[dict[str, Any]] = []
    left_out: list[str] = []
    # the libraries print notes about each other's versions, to either stream
    silent = contextlib.ExitStack()
    for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
        silent.enter_context(redirect(io.StringIO()))
    with silent, warnings.catch_warnings(), Progress(SpinnerColumn(), TextColumn("{task.description}"), console=errors,
                                             disable=not errors.is_terminal, transient=True) as progress:
        warnings.simplefilter("ignore")
        task = progress.add_task("", total=None)
        for name, make in makers.items():
            progress.update(task, description=f"{name}: training")
            done, missing = measure(make(), chosen, rounds, kept, lambda s: progress.update(task, description=s))
            out += done
            left_out += missing
    if as_json:
        click.echo(json.dumps(out, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 110).print(show(out))
        click.echo(f"{engines.cpu_name()}; {platform.system()} {platform.machine()}, Python "
                   f"{platform.python_version()}; {rounds} rounds, {rows:,} different rows natively; "
                   + ", ".join(f"{n} {version(n)}" for n in ("treelite", "tl2cgen", "scikit-learn")))
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)


if __name__ == "__main__":
    command()
