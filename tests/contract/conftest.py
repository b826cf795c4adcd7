"""One suite, all proxies: the same request gets the same decision and the same answer. Each is skipped only where it
isn't installed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_hosts import MARKER, SANITIZE
from proxy_harness import SETTINGS, make_bundle

from sidecar.demo.stack import merge
from sidecar.memory import memory_folder


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


@pytest.fixture(scope="session", autouse=True)
def sanitizer_reports() -> Iterator[None]:
    """With sanitizers, nothing may have been found, whatever the answers were."""
    yield
    reports = os.environ.get(SANITIZE)
    if reports:
        found = {path.name: path.read_text(errors="replace")[:4000] for path in Path(reports).iterdir()}
        assert not found, found


@pytest.fixture(scope="session")
def marked_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Laid over the demo's settings: models that know a marker only, and a client judged by this request alone."""
    bundle = make_bundle(tmp_path_factory.mktemp("marker") / "bundle", 0.1, MARKER.encode())
    models = {"bundle": str(bundle), "cache": str(tmp_path_factory.mktemp("cache"))}
    alone = {"models": models, "detectors": {"hold": "0s", "scanning": {"enabled": False}}}
    return merge(SETTINGS, alone)
