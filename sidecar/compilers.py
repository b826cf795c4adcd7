"""From Treelite checkpoints to machine code: TL2cgen writes C, the C compiler makes libraries;
and the content-addressed cache of runtime folders, compiled or packed (see sidecar/engines.py).

Code generation and compilation of each tree model run in a child process
(`python -m sidecar.compilers`): a serving process needs neither treelite nor TL2cgen in its
memory, and a crash in either is an error text and not an outage. The child also checks the
finished library against Treelite's own interpreter (GTIL) before anybody else sees it.

Cache: `<cache>/runtime/<key>/`, key = hash of bundle, engines, machine and, where something is
compiled, of generator, compiler and flags.
A folder is complete when it has its final name (it is built beside and renamed), belongs to this
user with mode 0700, and is checked file by file before it is handed out.
"""
from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

CFLAGS = ("-std=c99", "-O2", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-w")
LDFLAGS = ("-shared", "-Wl,-z,relro,-z,now")
COMPILE_TIMEOUT_S = 600
KEPT_FOLDERS = 16                 # runtime folders kept in the cache; older ones go after a day
CHECK_ROWS = 512
SUMS = "sums.json"


class CompileError(Exception):
    """A model could not be compiled or cached; the text says what, where and the remedy."""


@dataclass(frozen=True)
class TreeLibrary:
    """One compiled tree model. library: file name within its folder (holds the content's hash)."""
    kind: str                     # "float32" or "float64": type of its rows
    features: int
    ratio: float                  # > 0: score = 2^(-margin / ratio); 0: the margin is the output
    library: str
    bytes: int
    sha256: str
    trees: int
    seconds: float


# ---------------------------------------------------------------- the C compiler

def find_compiler() -> list[str]:
    """The C compiler's command line: $CC, else cc, gcc or clang from PATH."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in ([given] if given else [["gcc"], ["cc"], ["clang"]]):
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    raise CompileError(
        f"no C compiler: {'CC=' + given[0] if given else 'neither gcc, cc nor clang'} is not in PATH; "
        "install one (Debian: apt-get install gcc libc6-dev) or set CC")


def compiler_identity(command: list[str]) -> str:
    """First line of `--version`; changes when the compiler is upgraded."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as e:
        raise CompileError(f"the C compiler {shlex.join(command)} does not run: {e}") from e
    return done.stdout.splitlines()[0] if done.stdout else "unknown"


def _gcc(command: list[str], cwd: Path) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as e:
        raise CompileError(f"{shlex.join(command[:1])} did not finish: {e}") from e
    if done.returncode != 0:
        raise CompileError(f"the C compiler failed ({shlex.join(command)}, status {done.returncode}):\n"
                           + done.stderr[-2000:])


# ---------------------------------------------------------------- float64 -> float32

def to_float32(model: Any) -> Any:
    """The same forest with float32 thresholds and leaves, twice as fast when compiled.

    Exact for float32 rows: `x <= t` equals `x <= floor(t)` and `x < t` equals `x < ceil(t)`, rounding to
    the nearest float32 below or above. Leaves are rounded to nearest. model: treelite.Model with
    numerical splits and scalar leaves; returns one as it is when it is float32 already.
    Raises CompileError for what it can't convert (categorical splits, vector leaves, infinite thresholds).
    """
    import numpy as np
    from treelite import model_builder as mb

    if model.input_type == "float32":
        return model
    header = model.get_header_accessor()

    def field(name: str) -> Any:
        value = header.get_field(name)
        return value if isinstance(value, str) else value.tolist()

    if field("leaf_vector_shape") != [1, 1]:
        raise CompileError("only trees with one number per leaf can be converted "
                           "(train a regressor on 0 and 1)")
    postprocessor = field("postprocessor")
    builder: Any = mb.ModelBuilder(
        threshold_type="float32", leaf_output_type="float32",
        metadata=mb.Metadata(
            num_feature=model.num_feature,
            task_type="kIsolationForest" if postprocessor == "exponential_standard_ratio" else "kRegressor",
            average_tree_output=bool(field("average_tree_output")[0]),
            num_target=1, num_class=[1], leaf_vector_shape=(1, 1)),
        tree_annotation=mb.TreeAnnotation(num_tree=model.num_tree, target_id=[0] * model.num_tree,
                                          class_id=[0] * model.num_tree),
        postprocessor=mb.PostProcessorFunc(name=postprocessor, ratio_c=field("ratio_c")[0])
        if postprocessor == "exponential_standard_ratio" else mb.PostProcessorFunc(name=postprocessor),
        base_scores=field("base_scores"))
    names = {2: "<", 3: "<="}
    for index in range(model.num_tree):
        tree = model.get_tree_accessor(index)
        left, right = tree.get_field("cleft"), tree.get_field("cright")
        if tree.get_field("has_categorical_split")[0]:
            raise CompileError("categorical splits can't be converted")
        threshold, compare = tree.get_field("threshold"), tree.get_field("cmp")
        split, default, leaf = (tree.get_field(n) for n in ("split_index", "default_left", "leaf_value"))
        builder.start_tree()
        for node in range(len(left)):
            builder.start_node(node)
            if left[node] < 0:
                builder.leaf(float(np.float32(leaf[node])))
            else:
                op = names.get(int(compare[node]))
                exact = float(threshold[node])
                near = np.float32(exact)
                if op == "<=" and float(near) > exact:
                    near = np.nextafter(near, np.float32(-np.inf))
                elif op == "<" and float(near) < exact:
                    near = np.nextafter(near, np.float32(np.inf))
                if op is None or not np.isfinite(near):
                    raise CompileError(f"tree {index}: a split that can't be converted "
                                       f"(operator {compare[node]}, threshold {exact!r})")
                builder.numerical_test(
                    int(split[node]), float(near), default_left=bool(default[node]), opname=op,
                    left_child_key=int(left[node]), right_child_key=int(right[node]))
            builder.end_node()
        builder.end_tree()
    return builder.commit()


def thresholds_of(model: Any) -> dict[int, list[float]]:
    """Feature index -> all thresholds that its splits compare with (for rows exactly on them)."""
    out: dict[int, list[float]] = {}
    for index in range(model.num_tree):
        tree = model.get_tree_accessor(index)
        left = tree.get_field("cleft")
        for feature, value, child in zip(tree.get_field("split_index"), tree.get_field("threshold"), left,
                                         strict=True):
            if child >= 0:
                out.setdefault(int(feature), []).append(float(value))
    return out


# ---------------------------------------------------------------- one model (in the child)

def check_rows(model: Any, n: int = CHECK_ROWS) -> Any:
    """Rows (n, features) float32 that reach far corners: values on, just beside and far from thresholds,
    missing values and infinities."""
    import numpy as np

    rng = np.random.default_rng(7)
    rows = rng.normal(size=(n, model.num_feature)).astype(np.float32)
    for feature, values in thresholds_of(model).items():
        on = rng.choice(np.asarray(values, np.float32), size=n)
        step = rng.integers(-1, 2, size=n)
        rows[:, feature] = np.where(step == 0, on, np.nextafter(on, np.where(step > 0, np.inf, -np.inf),
                                                                dtype=np.float32))
    odd = rng.random(rows.shape)
    rows[odd < 0.02] = np.nan
    rows[(odd >= 0.02) & (odd < 0.03)] = np.inf
    rows[(odd >= 0.03) & (odd < 0.04)] = -np.inf
    return rows


def reference(model: Any, rows: Any) -> Any:
    """GTIL's raw margins (n,) float64 for float32 rows; of two classes, the second's share."""
    import numpy as np
    import treelite

    x = np.ascontiguousarray(rows, dtype=np.float64 if model.input_type == "float64" else np.float32)
    # scikit-learn's and our averaged trees: GTIL's "raw" prediction has the average and the base score in it
    return np.asarray(treelite.gtil.predict(model, x, pred_margin=True), dtype=np.float64).reshape(len(x), -1)[:, -1]


def _call_library(path: Path, model: Any, rows: Any) -> Any:
    """The compiled margins (n,) for rows, called the way native/models.pxd does it."""
    import numpy as np

    wide = model.input_type == "float64"
    number = ctypes.c_double if wide else ctypes.c_float

    class Entry(ctypes.Union):
        _fields_ = (("missing", ctypes.c_int32), ("value", number))

    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    library.predict.argtypes = [ctypes.POINTER(Entry), ctypes.c_int, ctypes.POINTER(number)]
    library.predict.restype = None
    entries, result = (Entry * rows.shape[1])(), number(0)
    out = np.empty(len(rows))
    for i, row in enumerate(rows):
        for entry, value in zip(entries, row.tolist(), strict=True):
            entry.value = value if value == value else 0.0
            if value != value:
                entry.missing = -1
        result.value = 0
        library.predict(entries, 1, ctypes.byref(result))
        out[i] = result.value
    return out


def compile_checkpoint(checkpoint: Path, folder: Path, stem: str, jobs: int,
                       flags: tuple[str, ...] = CFLAGS) -> TreeLibrary:
    """Generate, compile, link and check one Treelite checkpoint; the library lands in folder.

    Raises CompileError."""
    import numpy as np
    import tl2cgen
    import treelite

    started = time.monotonic()
    compiler = find_compiler()
    try:
        model = treelite.Model.deserialize(checkpoint)
    except treelite.TreeliteError as e:
        raise CompileError(f"{checkpoint}: not a Treelite checkpoint: {e}") from e
    header: Any = model.get_header_accessor()
    if header.get_field("num_target").tolist() != [1] or header.get_field("num_class").tolist() != [1]:
        raise CompileError(f"{checkpoint}: gives more than one number per row; "
                           "train a regressor or a binary model")
    isolation = header.get_field("postprocessor") == "exponential_standard_ratio"
    source = folder / f".{stem}-source"
    source.mkdir(mode=0o700)
    units = max(1, min(8, model.num_tree // 8))
    try:
        tl2cgen.generate_c_code(model, dirpath=str(source), params={"parallel_comp": units})
        recipe = json.loads((source / "recipe.json").read_text())
        names = [entry["name"] for entry in recipe["sources"]]
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            list(pool.map(
                lambda name: _gcc([*compiler, *flags, "-c", f"{name}.c", "-o", f"{name}.o"], source), names))
        _gcc([*compiler, *LDFLAGS, "-o", "lib.so", *(f"{name}.o" for name in names), "-lm"], source)
        rows = check_rows(model)
        want, got = reference(model, rows), _call_library(source / "lib.so", model, rows)
        scale = np.maximum(1.0, np.abs(want))
        worst = float(np.max(np.abs(got - want) / scale))
        if not worst < 2e-5:
            raise CompileError(f"{checkpoint}: the compiled model differs from Treelite's own result by "
                               f"{worst:.3g}; this TL2cgen and this treelite do not fit together")
        content = (source / "lib.so").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        name = f"{stem}-{digest[:32]}.so"
        os.chmod(source / "lib.so", 0o600)
        os.replace(source / "lib.so", folder / name)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    return TreeLibrary(
        kind=model.input_type, features=model.num_feature,
        ratio=float(header.get_field("ratio_c")[0]) if isolation else 0.0,
        library=name, bytes=len(content), sha256=digest, trees=model.num_tree,
        seconds=round(time.monotonic() - started, 2))


def run_child(module: str, arguments: list[str]) -> dict[str, Any]:
    """Run a module of ours in a process of its own; the JSON object on the last line of its output, or one with
    the key `error`. Raises CompileError where it did not finish."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True,
                              timeout=COMPILE_TIMEOUT_S, env={**os.environ, "PYTHONPATH": paths})
    except (OSError, subprocess.SubprocessError) as e:
        raise CompileError(f"{module}: did not finish: {e}") from e
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        answer = None
    if not isinstance(answer, dict):
        return {"error": f"{module}: the process ended with status {done.returncode}: {done.stderr[-1000:]}"}
    return answer


def compile_tree(checkpoint: Path, folder: Path, stem: str, jobs: int = 2) -> TreeLibrary:
    """compile_checkpoint in a child process."""
    answer = run_child("sidecar.compilers", [str(checkpoint), str(folder), stem, str(jobs)])
    if "error" in answer:
        raise CompileError(str(answer["error"]))
    return TreeLibrary(**answer)


def compile_trees(checkpoints: Mapping[str, Path], folder: Path) -> dict[str, TreeLibrary | CompileError]:
    """Compile checkpoints (stem -> file) into folder, all at once; for each the library or why there is none."""
    jobs = max(1, len(os.sched_getaffinity(0)))

    def one(stem: str) -> TreeLibrary | CompileError:
        try:
            return compile_tree(checkpoints[stem], folder, stem, jobs)
        except CompileError as e:
            return e

    with ThreadPoolExecutor(max(1, len(checkpoints))) as pool:
        return dict(zip(checkpoints, pool.map(one, checkpoints), strict=True))


# ---------------------------------------------------------------- the cache

def cache_root(given: Path | None = None) -> Path:
    """The cache folder, made if need be: `given`, else $XDG_CACHE_HOME/outrider, else ~/.cache/outrider.

    Libraries in it are loaded as code, so it must belong to this user and be closed to others' writing."""
    if given is None:
        base = os.environ.get("XDG_CACHE_HOME", "")
        if not base.startswith("/"):          # the XDG specification: relative paths are ignored
            base = os.path.join(os.path.expanduser("~"), ".cache")
        given = Path(base) / "outrider"
    try:
        given.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = given.stat()
    except OSError as e:
        raise CompileError(f"{given}: cannot make the model cache: {e.strerror}; set models.cache or "
                           "XDG_CACHE_HOME to a folder that this user may write") from e
    if state.st_uid != os.geteuid() or state.st_mode & 0o022:
        raise CompileError(f"{given}: others may write this model cache (owner {state.st_uid}, mode "
                           f"{state.st_mode & 0o777:o}); what lies in it is run as code: chmod 700, or set "
                           "models.cache to a folder of this user")
    return given


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system gives it back if we die."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def verify_folder(folder: Path) -> str | None:
    """What is wrong with a runtime folder (missing, changed or foreign files), None when all is well."""
    try:
        state = folder.stat()
        sums = json.loads((folder / SUMS).read_text())
        if state.st_uid != os.geteuid() or state.st_mode & 0o077:
            return "others may enter it"
        present = {entry.name for entry in os.scandir(folder)} - {SUMS}
        if present != set(sums):
            return "files are missing or were added"
        for name, digest in sums.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"{name} was changed"
    except (OSError, ValueError, TypeError, AttributeError) as e:
        return f"unreadable ({e})"
    return None


def _prune(root: Path, keep: Path) -> None:
    """Drop the least recently used runtime folders beyond KEPT_FOLDERS that nobody used for a day."""
    folders = [entry for entry in root.iterdir() if entry.is_dir() and entry != keep]
    folders.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in folders[KEPT_FOLDERS - 1:]:
        if time.time() - entry.stat().st_mtime > 86400:
            shutil.rmtree(entry, ignore_errors=True)


def runtime_key(content: str, plan: str, compiled: bool) -> str:
    """Cache key of a bundle (by its hash) on this machine with these engines.

    compiled: whether the plan compiles anything, so that generator and compiler belong to the key."""
    parts = [content, plan, platform.machine(), platform.system(), native_version()]
    if compiled:
        compiler = find_compiler()
        parts += [version("tl2cgen"), compiler_identity(compiler), " ".join(CFLAGS + LDFLAGS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def native_version() -> str:
    """Format of runtime.bin that the built extension modules read."""
    from native.models import TEXT_FEATURE_COUNT, TEXT_SCHEMA_NUMBER, VERSION

    return f"runtime {VERSION} text {TEXT_SCHEMA_NUMBER}.{TEXT_FEATURE_COUNT}"


def build_cached(key: str, fill: Callable[[Path], None], cache: Path | None = None) -> Path:
    """The runtime folder of a key, from the cache or made now.

    fill(folder) writes what belongs into it (runtime.bin, libraries). Several processes may ask at once: one
    fills, the others wait. Raises CompileError; nothing half-made stays."""
    root = cache_root(cache) / "runtime"
    root.mkdir(mode=0o700, exist_ok=True)
    final = root / key
    with _lock(root / f".lock-{key}"):
        if final.exists():
            if verify_folder(final) is None:
                os.utime(final)
                return final
            shutil.rmtree(final)
        work = root / f".making-{key}-{secrets.token_hex(4)}"
        work.mkdir(mode=0o700)
        try:
            fill(work)
            sums = {entry.name: hashlib.sha256(Path(entry).read_bytes()).hexdigest()
                    for entry in os.scandir(work)}
            for name in sums:
                os.chmod(work / name, 0o600)
            (work / SUMS).write_text(json.dumps(sums, indent=1))
            os.rename(work, final)
        except OSError as e:
            raise CompileError(f"{root}: cannot write the model cache: {e}") from e
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _prune(root, final)
    return final


def main(arguments: list[str]) -> int:
    """The child: CHECKPOINT FOLDER STEM JOBS; one JSON object on the last line of its output."""
    checkpoint, folder, stem, jobs = arguments
    noise = io.StringIO()
    answer: dict[str, Any]
    try:
        # both libraries print notes about each other's version; agreement is checked above instead
        with contextlib.redirect_stdout(noise), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            answer = asdict(compile_checkpoint(Path(checkpoint), Path(folder), stem, int(jobs)))
    except CompileError as e:
        answer = {"error": str(e)}
    except Exception as e:
        answer = {"error": f"{checkpoint}: {type(e).__name__}: {e}"}
    print(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
