"""The built modules as libraries: no Python in them, hooks and nothing else exported; and Envoy's hooks driven under
AddressSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from contract_hosts import require
from proxy_harness import make_bundle

from sidecar import plugins
from sidecar.config import Settings
from sidecar.core import open_core

DRIVER = Path(__file__).with_name("envoy_driver.c")
SEEDS = 3
REQUESTS = 1500  # of each of two threads
BENIGN = {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


@pytest.fixture(scope="module", params=["envoy", "nginx"])
def library(request: pytest.FixtureRequest) -> Path:
    require(f"{request.param}_plugin")
    return plugins.build(request.param)


def symbols(library: Path, which: str) -> set[str]:
    done = subprocess.run(["nm", "-D", f"--{which}-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


def test_no_symbol_of_python_is_wanted(library: Path) -> None:
    wanted = symbols(library, "undefined")
    assert wanted, "nm said nothing"
    assert not {name for name in wanted if name.lstrip("_").startswith("Py")}


def test_only_hooks_are_exported(library: Path) -> None:
    exported = symbols(library, "defined")
    if library.name.startswith("ngx_"):
        assert exported == {"ngx_modules", "ngx_module_names", "ngx_module_order"}
    else:
        assert len(exported) >= 20
        assert all(name.startswith("envoy_dynamic_module_on_") for name in exported)


def test_it_depends_on_the_c_library_only(library: Path) -> None:
    done = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True)
    needed = {line.split("[")[1].rstrip("]") for line in done.stdout.splitlines() if "(NEEDED)" in line}
    assert needed <= BENIGN, needed
    flags = [line for line in done.stdout.splitlines() if "FLAGS" in line]
    assert any("NODELETE" in line for line in flags)
    assert any("NOW" in line for line in flags), "a missing callback would crash at a request"


def test_a_library_that_wants_python_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.c"
    source.write_text("extern int PyErr_Occurred(void); int hook(void) { return PyErr_Occurred(); }")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(tmp_path / "a.so"), str(source)], check=True)
    with pytest.raises(plugins.PluginError, match="PyErr_Occurred"):
        plugins.check_symbols(tmp_path / "a.so")


def test_building_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(plugins.PluginError, match="no plugin for 'apache'"):
        plugins.build("apache")
    with pytest.raises(plugins.PluginError, match="no folder"):
        plugins.build("envoy", tmp_path / "nowhere")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(plugins.PluginError, match="apt-get install gcc"):
        plugins.build("envoy")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("OUTRIDER_NGINX_SOURCE", str(tmp_path))
    with pytest.raises(plugins.PluginError, match="nginx-dev"):
        plugins.build("nginx")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("envoy_plugin")
    program = tmp_path_factory.mktemp("driver") / "driver"
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-rdynamic"]
    subprocess.run(["gcc", *flags, "-o", str(program), str(DRIVER), "-lpthread", "-ldl"], check=True)
    return program


@pytest.fixture
def arena(tmp_path: Path) -> Any:
    """A sidecar's core without a sidecar: arena, policy and models, published for modules."""
    bundle = make_bundle(tmp_path / "bundle", 0.1, b"union select")
    settings = Settings.model_validate(
        {
            "service": {"name": "driver", "mode": "enforce"},
            "arena": {"path": str(tmp_path / "arena"), "clients": 1024, "events": 256},
            "lists": {"block": ["203.0.113.0/24"]},
            "models": {"bundle": str(bundle), "cache": str(tmp_path / "cache")},
            "answers": {"headers": "all", "metadata": "all"},
            "text": {"body": "32KiB"},
            "routes": [{"name": "read", "path": "/a/**", "body": "streamed", "body_limit": "4KiB"}],
        }
    )
    core = open_core(settings)
    yield core
    core.close()


def drive(driver: Path, arena: Path, seed: int, *more: str, failure: str = "open") -> str:
    module = plugins.build("envoy", sanitize=True)
    done = subprocess.run(
        [str(driver), str(module), f"arena={arena} failure={failure}", str(REQUESTS), str(seed), *more],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("seed", range(SEEDS))
def test_hooks_under_address_sanitizer(driver: Path, arena: Any, tmp_path: Path, seed: int) -> None:
    out = drive(driver, tmp_path / "arena", seed)
    counts = dict(zip(out.split()[::2], map(int, out.split()[1::2]), strict=True))
    assert counts["refused"] > 50, out  # the blocked range and the marker
    assert counts["passed"] > 200, out
    assert arena.arena.counters()["requests"] > REQUESTS


def test_hooks_while_the_arena_is_cut_short(driver: Path, arena: Any, tmp_path: Path) -> None:
    file = tmp_path / "arena"
    drive(driver, file, 99, str(file), "4096")


@pytest.mark.parametrize(
    "config",
    [
        "",
        "arena=",
        "arena=/x",
        "failure=open",
        "arena=x failure=open",
        "arena=/x failure=maybe",
        "arena=/x failure=open a=b",
        "arena=/x failure=open failure=open",
        "nonsense",
        "arena=/" + "x" * 5000 + " failure=open",
    ],
)
def test_a_wrong_configuration_is_refused(driver: Path, config: str) -> None:
    module = plugins.build("envoy", sanitize=True)
    line = [str(driver), str(module), config, "1", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "filter_config" in done.stderr
    assert "arena=/run/outrider/arena failure=open" in done.stderr
