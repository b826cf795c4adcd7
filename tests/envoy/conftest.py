"""A real Envoy in front of a real sidecar, on loopback; skipped only where Envoy isn't installed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import SETTINGS, make_bundle

from sidecar.demo.envoy import DemoError, find_envoy
from sidecar.demo.stack import Stack, merge
from sidecar.memory import memory_folder


@pytest.fixture(scope="session")
def envoy_binary() -> Path:
    try:
        return find_envoy()
    except DemoError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", autouse=True)
def run_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Where all stacks of this run put their files; kept for a look at the logs when a test failed."""
    place = memory_folder(160 << 20)
    folder = Path(tempfile.mkdtemp(prefix="outrider-tests-", dir=place))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTRIDER_RUN_DIR", str(folder))
        yield folder
    if request.session.testsfailed:
        print(f"\nlogs of the stacks: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def calm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that find every request harmless."""
    return make_bundle(tmp_path_factory.mktemp("bundles") / "calm", 0.1)


@pytest.fixture(scope="session")
def settings(calm_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Laid over the demo's settings: refusals by lists and counts, harmless models."""
    models = {"bundle": str(calm_bundle), "cache": str(tmp_path_factory.mktemp("cache"))}
    return merge(SETTINGS, {"models": models})


@pytest.fixture(scope="module")
def stack(envoy_binary: Path, settings: dict[str, Any]) -> Iterator[Stack]:
    """One running stack per test module, failing open."""
    with Stack(settings, fixed_ports=False) as running:
        yield running
