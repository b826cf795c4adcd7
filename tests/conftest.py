"""Fixtures shared by all tests."""
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real traffic kept outside the project; tests that need it skip without it."""
    path = Path(os.environ.get("OUTRIDER_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data at {path} (set OUTRIDER_DATA)")
    return path


@pytest.fixture(scope="module")
def factory_schema() -> Iterator[None]:
    """Bundles have the behaviour features of model_factory, not the engine's."""
    import model_factory

    from sidecar import bundle

    patch = pytest.MonkeyPatch()
    patch.setattr(bundle, "behaviour_schema", lambda: model_factory.BEHAVIOUR)
    yield
    patch.undo()
