"""outrider version: what runs here, and what this machine can do."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import click

from sidecar.config.problems import printable

# What matters for reproducing a score or reading a bug report; (shown name, distribution).
LIBRARIES = (
    ("numpy", "numpy"),
    ("scikit-learn", "scikit-learn"),
    ("xgboost", "xgboost-cpu"),
    ("treelite", "treelite"),
    ("tl2cgen", "tl2cgen"),
    ("grpcio", "grpcio"),
    ("pydantic", "pydantic"),
)
CPU_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512vbmi",
    "avx512_vnni",
    "asimd",
    "sve",
)
OPTIONAL = {"http2"}  # built where libnghttp2 is
COMPILERS = ("gcc", "cc", "clang")
TIMEOUT_S = 5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(as_json: bool) -> None:
    """Print versions of Outrider and what it stands on, and what this machine can do.

    \b
    outrider version
    outrider version --json | jq .libraries
    """
    facts = collect()
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for key, below in value.items():
                click.echo(f"{key:<14}{printable(below or 'not installed')}")
        else:
            text = " ".join(value) if isinstance(value, list) else value
            click.echo(f"{name:<14}{printable(str(text)) if text else 'not found'}")


def collect() -> dict[str, str | list[str] | dict[str, str | None] | None]:
    """Versions and abilities as JSON data; None where something isn't there."""
    return {
        "outrider": installed("outrider") or "not installed (running from source)",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {platform.libc_ver()[0]} "
        f"{platform.libc_ver()[1]}",
        "cpu": f"{cpu_model()}, {len(os.sched_getaffinity(0))} usable cores",
        "cpu flags": cpu_flags(),
        "compiler": compiler(),
        "native core": native_core(),
        "transport": transport(),
        "libraries": {shown: installed(name) for shown, name in LIBRARIES},
        "envoy": envoy(),
    }


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo(*names: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in names:
                    return value.strip()
    except OSError:
        pass
    return ""


def cpu_model() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or "unknown"


def cpu_flags() -> list[str]:
    """Those of CPU_FLAGS that this processor has."""
    present = set(_cpuinfo("flags", "Features").split())
    return [flag for flag in CPU_FLAGS if flag in present]


def native_core() -> str:
    """Which extension modules of the core are built."""
    import native

    folder = Path(native.__file__).parent
    wanted = {path.stem for path in folder.glob("*.pyx")}
    built = {path.name.split(".")[0] for path in folder.glob("*.so")}
    missing = sorted(wanted - built)
    missing = [name for name in missing if name not in OPTIONAL]
    if missing:
        return f"not built: {', '.join(missing)} (make setup)"
    return f"built: {', '.join(sorted(built))}" if built else "not built (make setup)"


def transport() -> str:
    """What `listen.transport: auto` takes here."""
    try:
        from native.http2 import library_version
    except ImportError as error:
        return f"grpcio (native isn't available: {error}; install libnghttp2-dev and run make setup)"
    return f"native (libnghttp2 {library_version()})"


def compiler() -> str | None:
    """The C compiler that models would be compiled with: $CC or the first found, with its version."""
    for name in (os.environ.get("CC", ""), *COMPILERS):
        path = shutil.which(name.split()[0]) if name.strip() else None
        if path:
            return f"{path}: {_first_line([path, '--version']) or 'does not run'}"
    return None


def envoy() -> str | None:
    """The Envoy beside this interpreter or on the PATH."""
    path = shutil.which("envoy", path=os.path.dirname(sys.executable)) or shutil.which("envoy")
    if path is None:
        return None
    said = _first_line([path, "--version"])
    # "/usr/bin/envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL"
    found = re.search(r"version: [^/]*/([^/]+)/", said or "")
    return f"{path}: {found.group(1) if found else said or 'does not run'}"


def _first_line(arguments: list[str]) -> str | None:
    try:
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    return lines[0][:200] if lines else None
