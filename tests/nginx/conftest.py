"""A real NGINX with the module before a real sidecar's arena, on loopback; skipped where NGINX or what building the
module needs isn't installed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nginx_stack import SANITIZED, NginxStack, nginx_binary
from proxy_harness import SETTINGS, make_bundle

from sidecar import plugins
from sidecar.demo.envoy import DemoError
from sidecar.demo.stack import merge
from sidecar.memory import memory_folder

MARKER = b"zqxjkvbw"  # folded text that harmless requests don't have


@pytest.fixture(scope="session")
def module() -> Path:
    try:
        nginx_binary()
        plugins.nginx_source()
        plugins.compiler()
        plugins.cython_version()
    except (DemoError, plugins.PluginError) as error:
        pytest.skip(str(error))
    return plugins.build("nginx", sanitize=SANITIZED)


@pytest.fixture(scope="session", autouse=True)
def run_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where all stacks of this run put their files; kept for a look at the logs when a test failed."""
    folder = Path(tempfile.mkdtemp(prefix="outrider-tests-", dir=memory_folder(160 << 20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTRIDER_RUN_DIR", str(folder))
        yield folder
    if request.session.testsfailed:
        print(f"\nlogs of the stacks: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Laid over the demo's settings: models that find requests with the marker hostile and all others harmless."""
    bundle = make_bundle(tmp_path_factory.mktemp("bundles") / "marked", 0.1, MARKER)
    models = {"bundle": str(bundle), "cache": str(tmp_path_factory.mktemp("cache"))}
    return merge(SETTINGS, {"models": models})


@pytest.fixture(scope="session")
def marker() -> bytes:
    return MARKER


MakeStack = Callable[..., NginxStack]


@pytest.fixture(scope="module")
def make_stack(module: Path, settings: dict[str, Any]) -> MakeStack:
    def make(over: dict[str, Any] | None = None, **options: Any) -> NginxStack:
        return NginxStack(module, merge(settings, over or {}), **options)

    return make
