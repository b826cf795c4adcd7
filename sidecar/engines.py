"""How a bundle's trees are scored: packed (data that native/packed.pxd walks) or compiled (TL2cgen, a C compiler).

A bundle's manifest says `packed`, `compiled` or `auto`. Auto means, for each model:

- on the processor that `outrider train` or `outrider bundle measure` measured both on: the faster one;
- elsewhere packed, which needs no compiler and opens no foreign code;
- the other one where the first can't be had: no compiler here, or a model that can't be packed.

Packing runs in a child process (`python -m sidecar.packing`), as compiling does, and is checked there against
Treelite's own interpreter.
"""
from __future__ import annotations

import os
import platform
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sidecar import compilers
from sidecar.compilers import CompileError, TreeLibrary

Engine = Literal["packed", "compiled"]
ENGINES: tuple[Engine, ...] = ("packed", "compiled")
ROUNDS = 7                        # of a measurement; the median counts
ROWS_MIN = 200


@dataclass(frozen=True)
class PackedTrees:
    """One packed tree model. file: name within its folder."""
    file: str
    features: int
    ratio: float                  # > 0: score = 2^(-output / ratio)
    trees: int


@dataclass(frozen=True)
class Choice:
    """The engine of one model, and the other where auto allows it."""
    first: Engine
    second: Engine | None = None


Built = PackedTrees | TreeLibrary


class Unpackable(CompileError):
    """A model that packed trees can't express."""


def cpu_name() -> str:
    """The processor's name, to tell whether a measurement was made on its kind; at most 120 characters."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    fields = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    parts = [fields.get("model name", ""), *(f"{k} {fields[k]}" for k in ("cpu family", "model", "CPU part")
                                              if k in fields)]
    return (", ".join(filter(None, parts)) or platform.machine() or "unknown")[:120]


def has_compiler() -> bool:
    try:
        compilers.find_compiler()
    except CompileError:
        return False
    return True


def choose(engine: str, slots: Mapping[str, Any] | list[str], measured_us: Mapping[str, Mapping[str, float]] | None,
           measured_cpu: str = "") -> dict[str, Choice]:
    """The engine of each model here. engine: of the manifest; measured_us: slot -> engine -> us."""
    out = {}
    for slot in slots:
        if engine == "packed":
            out[slot] = Choice("packed")
            continue
        if engine == "compiled":
            out[slot] = Choice("compiled")
            continue
        us = (measured_us or {}).get(slot, {})
        faster = "compiled" in us and "packed" in us and us["compiled"] < us["packed"]
        only = "compiled" in us and "packed" not in us
        if (faster or only) and measured_cpu == cpu_name() and has_compiler():
            out[slot] = Choice("compiled", "packed")
        else:
            out[slot] = Choice("packed", "compiled")
    return out


def plan_text(plan: Mapping[str, Choice]) -> str:
    """The plan as a part of a cache key."""
    return ",".join(f"{slot}={choice.first}/{choice.second or ''}" for slot, choice in sorted(plan.items()))


# ---------------------------------------------------------------- building

def pack_trees(checkpoints: Mapping[str, Path], folder: Path) -> dict[str, PackedTrees | CompileError]:
    """Pack checkpoints into folder, all in one child process; for each the result or why it can't be."""
    if not checkpoints:
        return {}
    answer = compilers.run_child("sidecar.packing", [str(folder), *(f"{slot}={path}"
                                                                    for slot, path in checkpoints.items())])
    out: dict[str, PackedTrees | CompileError] = {}
    for slot in checkpoints:
        entry = answer.get(slot, {"error": answer.get("error", "packing gave no answer")})
        if "error" not in entry:
            out[slot] = PackedTrees(**entry)
        elif entry.get("unpackable"):
            out[slot] = Unpackable(f"{slot}: can't be packed: {entry['error']}")
        else:
            out[slot] = CompileError(f"{slot}: {entry['error']}")
    return out


def build(checkpoints: Mapping[str, Path], plan: Mapping[str, Choice], folder: Path) -> dict[str, Built]:
    """Pack or compile each checkpoint into folder, as planned. Raises CompileError."""
    out: dict[str, Built] = {}
    to_compile = {slot: path for slot, path in checkpoints.items() if plan[slot].first == "compiled"}
    to_pack = {slot: path for slot, path in checkpoints.items() if slot not in to_compile}
    failed: dict[str, CompileError] = {}
    for slot, packed in pack_trees(to_pack, folder).items():
        if isinstance(packed, PackedTrees):
            out[slot] = packed
        elif isinstance(packed, Unpackable) and plan[slot].second == "compiled":
            to_compile[slot], failed[slot] = checkpoints[slot], packed
        else:
            raise packed
    for slot, compiled in compilers.compile_trees(to_compile, folder).items():
        if isinstance(compiled, TreeLibrary):
            out[slot] = compiled
        elif slot in failed:
            raise CompileError(f"{failed[slot]}; nor compiled: {compiled}")
        elif plan[slot].second == "packed":
            again = pack_trees({slot: checkpoints[slot]}, folder)[slot]
            if not isinstance(again, PackedTrees):
                raise compiled
            out[slot] = again
        else:
            raise compiled
    return out


def runtime_entry(built: Built, folder: Path) -> dict[str, Any]:
    """What native.models.runtime_bytes wants to know of a built model."""
    from native.models import sip

    if isinstance(built, PackedTrees):
        return {"kind": "packed", "features": built.features, "ratio": built.ratio,
                "packed": (folder / built.file).read_bytes()}
    return {"kind": built.kind, "features": built.features, "ratio": built.ratio, "library": built.library,
            "library_bytes": built.bytes, "library_sip": sip((folder / built.library).read_bytes())}


# ---------------------------------------------------------------- measuring

def single_runtime(folder: Path, built: Built) -> None:
    """Make a folder that `built` lies in a runtime folder with this one model, in the place of isolation."""
    from native.models import runtime_bytes

    content = runtime_bytes(generation=1, behaviour_features=built.features,
                            trees={"isolation": runtime_entry(built, folder)})
    fd = os.open(folder / "runtime.bin", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)


def threshold_rows(checkpoint: Path, n: int, seed: int = 5) -> Any:
    """Rows (n, features) float32 with each value near one of the thresholds of its feature."""
    import numpy as np
    import treelite

    model = treelite.Model.deserialize(checkpoint)
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, model.num_feature)).astype(np.float32)
    for feature, values in compilers.thresholds_of(model).items():
        finite = np.asarray([v for v in values if np.isfinite(v)] or [0.0])
        spread = np.std(finite) * 0.2
        rows[:, feature] = rng.choice(finite, size=n) + rng.normal(size=n) * spread
    return rows


def measure(checkpoints: Mapping[str, bytes], rows: Mapping[str, Any],
            engines: tuple[Engine, ...] = ENGINES) -> dict[str, dict[str, float]]:
    """Mean us per row and model of each engine that can be had here, one row at a time, in interleaved rounds.

    checkpoints: slot -> Treelite checkpoint; rows: slot -> (n, features) float32, made up where there are fewer
    than ROWS_MIN. An engine that can't be had (no compiler) is left out. Raises CompileError where none can."""
    from native.models import Models

    out: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="outrider-measure-") as scratch:
        for slot, content in checkpoints.items():
            checkpoint = Path(scratch) / f"{slot}.treelite"
            checkpoint.write_bytes(content)
            given = rows.get(slot)
            x = given if given is not None and len(given) >= ROWS_MIN else threshold_rows(checkpoint, 4000)
            opened: dict[Engine, Any] = {}
            problem: CompileError | None = None
            for engine in engines:
                folder = Path(scratch) / f"{slot}-{engine}"
                folder.mkdir(mode=0o700)
                try:
                    single_runtime(folder, build({slot: checkpoint}, {slot: Choice(engine)}, folder)[slot])
                except CompileError as e:
                    problem = e
                    continue
                opened[engine] = Models(folder)
            if not opened and problem is not None:
                raise problem
            times: dict[str, list[float]] = {engine: [] for engine in opened}
            for _ in range(ROUNDS):
                for engine, models in opened.items():
                    times[engine].append(models.time_rows("isolation", x)[0])
            for models in opened.values():
                models.close()
            out[slot] = {engine: float(f"{statistics.median(values):.3g}") for engine, values in times.items()}
    return out


def describe(folder: Path) -> dict[str, str]:
    """Slot -> engine of a runtime folder."""
    from native.models import TREE_SLOTS, Models

    with Models(folder) as models:
        return {slot: models.engine(slot) for slot in TREE_SLOTS if models.engine(slot) != "none"}


