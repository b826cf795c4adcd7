"""Building the plugins: the core once more, without an interpreter, linked into a module for Envoy or NGINX.

Cython makes C of native/plugins/core.pyx; compiled with a section per function and linked so that only the proxy's
hooks are roots, all that needs Python is left out by the linker. `check_symbols` makes sure of it. Built modules are
kept in a cache by the hash of everything they are made of.
"""
from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[1] / "native"
SOURCES = NATIVE / "plugins"
NAMES = {"envoy": "liboutrider.so", "nginx": "ngx_http_outrider_module.so"}
NGINX_SOURCE = Path("/usr/share/nginx/src")  # of Debian's nginx-dev; $OUTRIDER_NGINX_SOURCE names another
DIRECTIVES = (
    "language_level=3,boundscheck=False,wraparound=False,cdivision=True,initializedcheck=False,cpow=True,"
    "emit_code_comments=False"
)
CFLAGS = (
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-semantic-interposition",
    "-ffunction-sections",
    "-fdata-sections",
    "-DNDEBUG",
)
# the library stays when a proxy lets go of it: its threads and its fault handler may still be in it
LDFLAGS = ("-Wl,--gc-sections", "-Wl,-z,relro,-z,now,-z,noexecstack,-z,nodelete", "-lm")
# without a register of globals, which would keep alive what the linker is to leave out
SANITIZE = ("-fsanitize=address,undefined", "--param", "asan-globals=0", "-fno-omit-frame-pointer", "-g")
COMMAND_TIMEOUT_S = 600


class PluginError(Exception):
    """A plugin can't be built here; the text says why and what to do."""


def build(kind: str, out: Path | None = None, sanitize: bool = False) -> Path:
    """The module for "envoy" or "nginx", built where the cache has none; with `out`, a copy in that folder.

    sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer, for tests; the proxy then needs their runtimes
    preloaded. Raises PluginError."""
    if kind not in NAMES:
        raise PluginError(f"there is no plugin for {kind!r}; there are {', '.join(NAMES)}")
    if out is not None and not out.is_dir():
        raise PluginError(f"{out} is no folder")
    cached = cache_folder() / f"{kind}-{fingerprint(kind, sanitize)}" / NAMES[kind]
    if not cached.exists():
        make(kind, cached, sanitize)
    if out is None:
        return cached
    try:
        fresh = out / f".{NAMES[kind]}.{os.getpid()}"
        shutil.copyfile(cached, fresh)
        fresh.chmod(0o644)
        fresh.replace(out / NAMES[kind])  # in one step: a proxy may have the old one mapped
    except OSError as error:
        raise PluginError(f"can't write to {out}: {error.strerror}") from error
    return out / NAMES[kind]


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "outrider" / "plugins"


def fingerprint(kind: str, sanitize: bool) -> str:
    """Of all that goes into the module: sources, flags, tools, and for NGINX what it is configured with."""
    digest = hashlib.sha256(repr((kind, CFLAGS, LDFLAGS, DIRECTIVES, sanitize, compiler(), cython_version())).encode())
    files = [Path(__file__), *NATIVE.glob("*.pxd"), *SOURCES.glob("*.*"), *(SOURCES / kind).iterdir()]
    if kind == "nginx":
        source = nginx_source()
        files += [source / "conf_flags", source / "src/core/nginx.h"]
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:24]


def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "gcc"))
    if found is None:
        raise PluginError("a C compiler is needed (Debian: apt-get install gcc libc6-dev)")
    return found


def cython_version() -> str:
    if importlib.util.find_spec("Cython") is None:
        raise PluginError("Cython is needed to build plugins: pip install 'outrider[plugins]'")
    return importlib.metadata.version("cython")


def nginx_source() -> Path:
    """NGINX's source tree as configured for the installed binary."""
    folder = Path(os.environ.get("OUTRIDER_NGINX_SOURCE", NGINX_SOURCE))
    if not (folder / "conf_flags").exists():
        raise PluginError(
            f"NGINX's headers aren't at {folder} (Debian: apt-get install nginx-dev; elsewhere: set "
            "OUTRIDER_NGINX_SOURCE to a source tree of the very version that runs, with its conf_flags)"
        )
    return folder


def run(line: Sequence[str], folder: Path, env: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            line,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
            env={**os.environ, **(env or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PluginError(f"{line[0]}: {error}") from error
    if done.returncode:
        raise PluginError(f"{' '.join(line[:3])} ... failed:\n{(done.stderr or done.stdout)[-3000:]}")


def compile_core(folder: Path, sanitize: bool = False) -> Path:
    """core.o in that folder."""
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise PluginError(f"Python's headers aren't at {headers} (Debian: apt-get install python3-dev)")
    shutil.copyfile(SOURCES / "core.pyx", folder / "core.pyx")
    cython = [sys.executable, "-m", "cython", "-3", "-X", DIRECTIVES, "-I", str(NATIVE.parent), "core.pyx"]
    run(cython, folder)
    flags = [*CFLAGS, *(SANITIZE if sanitize else ())]
    run([compiler(), *flags, "-w", f"-I{headers}", f"-I{SOURCES}", "-c", "core.c", "-o", "core.o"], folder)
    return folder / "core.o"


def make(kind: str, target: Path, sanitize: bool) -> None:
    """Build into the cache."""
    try:
        target.parent.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="build-", dir=target.parent.parent))
    except OSError as error:
        raise PluginError(f"can't write to {target.parent.parent}: {error.strerror}") from error
    try:
        core = compile_core(work, sanitize)
        built = (make_envoy if kind == "envoy" else make_nginx)(work, core, sanitize)
        check_symbols(built, sanitize)
        result = work / "result"
        result.mkdir()
        shutil.copyfile(built, result / NAMES[kind])
        if target.parent.exists():
            return  # another build was faster
        result.rename(target.parent)
    except OSError as error:
        raise PluginError(f"can't build in {work}: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def make_envoy(work: Path, core: Path, sanitize: bool) -> Path:
    flags = [*CFLAGS, "-Wall", "-Wextra", *(SANITIZE if sanitize else ())]
    source = SOURCES / "envoy"
    line = [compiler(), *flags, "-shared", "-o", NAMES["envoy"], str(source / "shim.c"), str(core)]
    run([*line, f"-Wl,--version-script={source / 'hooks.map'}", *LDFLAGS], work)
    return work / NAMES["envoy"]


def make_nginx(work: Path, core: Path, sanitize: bool) -> Path:
    """NGINX's own build for modules outside its tree. A module fits the very version and options it was made for, so
    the flags are those of the installed package."""
    if any(c.isspace() for c in str(work)):
        raise PluginError(f"NGINX's build can't take paths with spaces: set XDG_CACHE_HOME (now {work.parent})")
    source, tree, addon = nginx_source(), work / "tree", work / "addon"
    # the build writes where it stands, which the package's folder may not allow
    tree.mkdir()
    for name in ("auto", "configure", "src"):
        (tree / name).symlink_to(source / name)
    shutil.copytree(SOURCES / "nginx", addon)
    # NGINX looks its symbols up by name: exports.map hides the others
    flags = [flag for flag in CFLAGS if "visibility" not in flag] + ["-D_GNU_SOURCE", *(SANITIZE if sanitize else ())]
    link = ["-Wl,-z,nodelete", *(SANITIZE if sanitize else ())]
    script = (
        f'. "$1/conf_flags" && ./configure --with-cc-opt="$2" --with-ld-opt="$3" "${{NGX_CONF_FLAGS[@]}}" '
        f'--add-dynamic-module="$4" --builddir="$5" && {shutil.which("make") or "make"} -f "$5/Makefile" modules'
    )
    line = ["bash", "-c", script, "build", str(source), " ".join(flags), " ".join(link), str(addon), str(work / "objs")]
    run(line, tree, {"OUTRIDER_CORE": str(core), "OUTRIDER_INCLUDE": str(SOURCES), "CC": compiler()})
    return work / "objs" / NAMES["nginx"]


def check_symbols(library: Path, sanitize: bool = False) -> None:
    """PluginError where the library would need an interpreter."""
    nm = shutil.which("nm")
    if nm is None:
        raise PluginError("nm is needed (Debian: apt-get install binutils)")
    done = subprocess.run([nm, "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=False)
    names = [line.split()[-1] for line in done.stdout.splitlines() if line.strip()]
    wanted = [name for name in names if name.lstrip("_").startswith("Py")]
    if done.returncode or wanted:
        raise PluginError(f"{library.name} would need Python: {', '.join(wanted) or done.stderr}")
    done = subprocess.run([nm, "-D", "--defined-only", str(library)], capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        raise PluginError(f"{library.name} exports nothing: the proxy would find no hooks")
