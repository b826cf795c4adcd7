"""Model bundles: a folder with `manifest.json`, the linear text model and Treelite checkpoints.

    manifest.json            schemas, hashes, combination, calibration, training data, metrics
    linear.bin               n-gram weights (native/text.pxd reads them)
    xgboost.treelite.gz      text: margin from the lexical features and the linear score
    forest.treelite.gz       text: probability from the same
    isolation.treelite.gz    behaviour: anomaly score from the window features

Either side may be absent. Everything read from a bundle is checked before use: a bundle may come
from anywhere, and a bad one is refused as a whole with a BundleError that says what, where and the
remedy. What is made of the trees for a machine is no part of a bundle (see sidecar/engines.py); the
manifest says which engine is to score them.
"""
from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zlib import error as ZlibError

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sidecar import engines
from sidecar.compilers import CompileError, build_cached, cache_root, runtime_key

MANIFEST = "manifest.json"
LINEAR = "linear.bin"
TREES = ("xgboost", "forest", "isolation")
SUBSETS = ("linear", "linear+xgboost", "linear+forest", "all")
# score that a benign false-positive rate is mapped to: what makes scores comparable across models
ANCHORS: tuple[tuple[float, float], ...] = ((0.1, 0.2), (0.01, 0.5), (0.001, 0.8), (0.0005, 0.9))
DEFAULT = Path(__file__).resolve().parent / "default_bundle"

MANIFEST_BYTES_MAX = 1 << 20
FILE_BYTES_MAX = 32 << 20         # of each file as stored
CHECKPOINT_BYTES_MAX = 128 << 20  # of a checkpoint once unpacked
FILES_MAX = 8


class BundleError(Exception):
    """A bundle that is refused; the text says what is wrong, where, and what to do."""


# ---------------------------------------------------------------- schemas of the features

def text_schema() -> tuple[int, list[str]]:
    """(number, feature names) of the text features that this build computes."""
    text = importlib.import_module("native.text")
    return int(text.SCHEMA), list(text.FEATURE_NAMES)


def behaviour_schema() -> tuple[int, list[str]]:
    """(number, feature names) of the window features that this build computes."""
    engine, models = importlib.import_module("native.engine"), importlib.import_module("native.models")
    return int(models.BEHAVIOUR_SCHEMA_NUMBER), list(engine.BEHAVIOUR_FEATURE_NAMES)


def schema_hash(number: int, names: list[str]) -> str:
    """SHA-256 over a schema's number and its feature names in order."""
    return hashlib.sha256("\n".join([str(number), *names]).encode()).hexdigest()


# ---------------------------------------------------------------- the manifest

class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Knots = Annotated[list[tuple[float, float]], Field(max_length=16)]


class FileEntry(_Strict):
    sha256: Digest
    bytes: Annotated[int, Field(ge=1, le=FILE_BYTES_MAX)]


class Schema(_Strict):
    number: Annotated[int, Field(ge=0, le=2**31)]
    features: Annotated[list[Annotated[str, Field(max_length=80)]], Field(min_length=1, max_length=128)]
    sha256: Digest

    @model_validator(mode="after")
    def _own_hash(self) -> Self:
        if schema_hash(self.number, self.features) != self.sha256:
            raise ValueError("the hash is not that of the features listed")
        return self


class Combination(_Strict):
    """raw = linear * linear score + xgboost * margin + forest * logit(probability) + bias."""
    linear: float
    xgboost: float = 0.0
    forest: float = 0.0
    bias: float = 0.0


class Calibration(_Strict):
    """Raw output -> score; straight lines between knots."""
    knots: Knots

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if len(self.knots) < 2:
            raise ValueError("a calibration has at least 2 knots")
        for (x0, y0), (x1, y1) in zip(self.knots, self.knots[1:], strict=False):
            if x1 <= x0 or y1 < y0:
                raise ValueError("knots must rise")
        if not all(0.0 <= y <= 1.0 for _, y in self.knots):
            raise ValueError("scores lie within 0 and 1")
        return self


class Threshold(_Strict):
    """From which score, and raw output per model, the stated share of benign requests was exceeded."""
    score: float
    benign_fpr: float
    raw: dict[str, float]


class Source(_Strict):
    name: Annotated[str, Field(max_length=120)]
    sha256: str
    licence: Annotated[str, Field(max_length=200)]
    side: Literal["text", "behaviour"]
    benign: int
    attack: int


class Measured(_Strict):
    """Mean us per row of each engine on one processor."""
    cpu: Annotated[str, Field(max_length=120)]
    us: dict[Literal["xgboost", "forest", "isolation"],
             dict[Literal["packed", "compiled"], Annotated[float, Field(gt=0, lt=1e6)]]]


class Manifest(_Strict):
    format: Literal["outrider-bundle"]
    version: Literal[1]
    name: Annotated[str, Field(max_length=120)]
    created: Annotated[str, Field(max_length=40)]
    text: Schema | None
    behaviour: Schema | None
    files: Annotated[dict[FileName, FileEntry], Field(min_length=1, max_length=FILES_MAX)]
    trees: dict[Literal["xgboost", "forest", "isolation"], FileName]
    combination: dict[Literal["linear", "linear+xgboost", "linear+forest", "all"], Combination]
    calibration: dict[Literal["linear", "linear+xgboost", "linear+forest", "all", "behaviour"], Calibration]
    thresholds: Annotated[list[Threshold], Field(max_length=16)]
    training: Annotated[list[Source], Field(max_length=200)]
    metrics: dict[str, Any]
    versions: dict[str, str]
    engine: Literal["auto", "packed", "compiled"] = "auto"
    measured: Measured | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.text is None and self.behaviour is None:
            raise ValueError("neither a text nor a behaviour side")
        if (self.text is not None) != (LINEAR in self.files):
            raise ValueError(f"a text side and {LINEAR} go together")
        if (self.behaviour is not None) != ("isolation" in self.trees):
            raise ValueError("a behaviour side and an isolation tree model go together")
        for slot, name in self.trees.items():
            if name not in self.files:
                raise ValueError(f"trees.{slot}: {name} is not among the files")
            if slot != "isolation" and self.text is None:
                raise ValueError(f"trees.{slot} without a text side")
        wanted = set(needed_subsets(self.text is not None, set(self.trees)))
        if set(self.combination) != wanted:
            raise ValueError("combination must be given for exactly: "
                             + (", ".join(sorted(wanted)) or "nothing"))
        if self.behaviour is not None:
            wanted.add("behaviour")
        if set(self.calibration) != wanted:
            raise ValueError(f"calibration must be given for exactly: {', '.join(sorted(wanted))}")
        return self


def needed_subsets(text: bool, trees: set[str]) -> list[str]:
    """Subsets of the text models that can occur with these tree models."""
    if not text:
        return []
    return [name for name in SUBSETS
            if (name not in ("linear+xgboost", "all") or "xgboost" in trees)
            and (name not in ("linear+forest", "all") or "forest" in trees)]


# ---------------------------------------------------------------- reading

@dataclass(frozen=True)
class Bundle:
    """A verified bundle. files: content by name, so that what was hashed is what gets used."""
    path: Path
    manifest: Manifest
    files: Mapping[str, bytes]
    sha256: str                   # of manifest.json, which holds the hashes of all files

    @property
    def generation(self) -> int:
        """First 8 bytes of the hash as a number: what the data plane tells apart bundles by."""
        return int(self.sha256[:16], 16)


def _read(path: Path, bytes_max: int, where: str) -> bytes:
    """A regular file of at most bytes_max bytes, not through a link."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BundleError(f"{where}: missing; the bundle is incomplete, copy or train it again") from None
    except OSError as e:
        raise BundleError(f"{where}: cannot open ({e.strerror}); "
                          "a bundle holds plain files, no links") from None
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BundleError(f"{where}: not a regular file")
        data = file.read(bytes_max + 1)
    if len(data) > bytes_max:
        raise BundleError(f"{where}: larger than the {bytes_max} bytes allowed")
    return data


def _problems(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False, include_input=False)[:8]:
        place = ".".join(str(part)[:60] for part in item["loc"])
        lines.append(f"{place + ': ' if place else ''}{item['msg'][:200]}")
    return "; ".join(lines)


def _check_schema(path: Path, side: str, given: Schema, have: tuple[int, list[str]]) -> None:
    number, names = have
    if given.sha256 == schema_hash(number, names):
        return
    missing = [name for name in given.features if name not in names][:3]
    detail = f", for instance {missing[0]!r} is unknown here" if missing else ""
    raise BundleError(
        f"{path / MANIFEST}: {side}: trained for {side} features of schema {given.number} "
        f"({len(given.features)} features), this build computes schema {number} ({len(names)}){detail}; "
        "train the bundle again with this version (outrider train), or use the version that trained it")


def load_bundle(path: Path | str, *, schemas: bool = True) -> Bundle:
    """Read and verify a bundle folder ("default": the one that ships).

    Raises BundleError. schemas=False accepts a bundle made for other features (to look at it only)."""
    path = DEFAULT if str(path) == "default" else Path(path)
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; a bundle is a folder with {MANIFEST} in it, made by "
                          "`outrider train`" + (" (here: make default-models)" if path == DEFAULT else ""))
    raw = _read(path / MANIFEST, MANIFEST_BYTES_MAX, str(path / MANIFEST))
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as e:
        raise BundleError(f"{path / MANIFEST}: not a valid manifest: {_problems(e)}") from None
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{path / MANIFEST}: not valid JSON: {str(e)[:200]}") from None
    if schemas:
        if manifest.text is not None:
            _check_schema(path, "text", manifest.text, text_schema())
        if manifest.behaviour is not None:
            _check_schema(path, "behaviour", manifest.behaviour, behaviour_schema())
    files = {}
    for name, entry in manifest.files.items():
        data = _read(path / name, FILE_BYTES_MAX, str(path / name))
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(f"{path / name}: not the file that the manifest names ({len(data)} bytes, "
                              f"{entry.bytes} expected, or another hash); copy or train the bundle again")
        files[name] = data
    return Bundle(path, manifest, files, hashlib.sha256(raw).hexdigest())


# ---------------------------------------------------------------- preparing

def unpack_checkpoint(name: str, data: bytes) -> bytes:
    """A Treelite checkpoint as treelite reads it; raises BundleError where it unpacks to too much."""
    if not name.endswith(".gz"):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            out = file.read(CHECKPOINT_BYTES_MAX + 1)
    except (OSError, EOFError, ZlibError) as e:
        raise BundleError(f"{name}: not a gzip file: {e}") from None
    if len(out) > CHECKPOINT_BYTES_MAX:
        raise BundleError(f"{name}: unpacks to more than {CHECKPOINT_BYTES_MAX} bytes")
    return out


def engine_plan(manifest: Manifest) -> dict[str, engines.Choice]:
    """Which engine scores each tree model on this machine."""
    measured = manifest.measured
    return engines.choose(manifest.engine, [str(slot) for slot in manifest.trees],
                          {str(slot): {str(e): t for e, t in us.items()} for slot, us in measured.us.items()}
                          if measured else None,
                          measured.cpu if measured else "")


def checkpoints_of(bundle: Bundle) -> dict[str, bytes]:
    """Slot -> unpacked Treelite checkpoint. Raises BundleError."""
    return {str(slot): unpack_checkpoint(name, bundle.files[name]) for slot, name in bundle.manifest.trees.items()}


def prepare_runtime(bundle: Bundle, cache_dir: Path | None = None) -> Path:
    """The runtime folder of a bundle (runtime.bin and compiled libraries, if any), from the cache or made now.

    Milliseconds from the cache, a second or two to pack, up to a minute where something is compiled. Ends with
    opening the folder as the data plane will. Raises BundleError."""
    from native.models import Models, ModelsError, runtime_bytes

    m = bundle.manifest

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache_root(cache_dir), prefix=".unpacked-") as scratch:
            checkpoints = {}
            for slot, content in checkpoints_of(bundle).items():
                checkpoints[slot] = Path(scratch) / f"{slot}.treelite"
                checkpoints[slot].write_bytes(content)
            built = engines.build(checkpoints, plan, folder)
        try:
            content = runtime_bytes(
                generation=bundle.generation,
                behaviour_schema=m.behaviour.number if m.behaviour else 0,
                behaviour_features=len(m.behaviour.features) if m.behaviour else 0,
                linear=bundle.files.get(LINEAR, b""),
                trees={slot: engines.runtime_entry(model, folder) for slot, model in built.items()},
                weights={name: (c.linear, c.xgboost, c.forest, c.bias) for name, c in m.combination.items()},
                text={name: c.knots for name, c in m.calibration.items() if name != "behaviour"},
                behaviour=m.calibration["behaviour"].knots if "behaviour" in m.calibration else ())
        except ValueError as e:
            raise BundleError(f"{bundle.path / MANIFEST}: {e}") from None
        for model in built.values():
            if isinstance(model, engines.PackedTrees):
                (folder / model.file).unlink()          # it is in runtime.bin
        (folder / "runtime.bin").write_bytes(content)
        os.chmod(folder / "runtime.bin", 0o600)
        Models(folder).close()

    try:
        plan = engine_plan(m)
        compiled = any(choice.first == "compiled" for choice in plan.values())
        key = runtime_key(bundle.sha256, engines.plan_text(plan), compiled)
        folder = build_cached(key, fill, cache_dir)
        Models(folder).close()
    except CompileError as e:
        raise BundleError(f"{bundle.path}: {e}") from e
    except ModelsError as e:
        raise BundleError(f"{bundle.path}: the prepared bundle is refused: {e}") from e
    except OSError as e:
        raise BundleError(f"{bundle.path}: cannot prepare it: {e}; is there room in the model cache?") from e
    return folder


# ---------------------------------------------------------------- writing

def pack_checkpoint(data: bytes) -> bytes:
    """The same bytes for the same model (no time in the gzip header)."""
    return gzip.compress(data, 9, mtime=0)


def rewrite_manifest(bundle: Bundle, **changes: Any) -> Bundle:
    """Replace a bundle's manifest by one with some keys changed, and read the bundle back. Raises BundleError."""
    full = {**bundle.manifest.model_dump(mode="json"), **changes}
    text = json.dumps(full, indent=1, allow_nan=False)
    try:
        Manifest.model_validate_json(text)
    except ValidationError as e:
        raise BundleError(f"{bundle.path}: the manifest to be written is not valid: {_problems(e)}") from None
    fresh = bundle.path / f".{MANIFEST}-{secrets.token_hex(4)}"
    try:
        fresh.write_text(text + "\n")
        os.replace(fresh, bundle.path / MANIFEST)
    except OSError as e:
        raise BundleError(f"{bundle.path / MANIFEST}: cannot write it: {e.strerror}") from e
    finally:
        fresh.unlink(missing_ok=True)
    return load_bundle(bundle.path)


def write_bundle(path: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> Bundle:
    """Write a bundle folder, replacing a bundle that stands there, and read it back verified.

    manifest: all of Manifest but `format`, `version` and `files`. The new folder takes its place by renaming,
    so that a reader sees the old one or the new one. Raises BundleError."""
    entries = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
               for name, data in files.items()}
    full = {"format": "outrider-bundle", "version": 1, **manifest, "files": entries}
    text = json.dumps(full, indent=1, allow_nan=False)
    try:
        Manifest.model_validate_json(text)
    except ValidationError as e:
        raise BundleError(f"{path}: the manifest to be written is not valid: {_problems(e)}") from None
    path = path.absolute()
    if path.exists() and not ((path / MANIFEST).is_file() or (path.is_dir() and not any(path.iterdir()))):
        raise BundleError(f"{path}: exists and is no bundle; give a new folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    fresh, old = path.with_name(f".{path.name}-{token}"), path.with_name(f".{path.name}-old-{token}")
    fresh.mkdir()
    try:
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        (fresh / MANIFEST).write_text(text + "\n")
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return load_bundle(path)
