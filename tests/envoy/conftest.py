"""A real Envoy in front of a real sidecar, on loopback; skipped only where Envoy isn't installed."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SETTINGS

from sidecar.demo.envoy import DemoError, find_envoy
from sidecar.demo.stack import Stack


@pytest.fixture(scope="session")
def envoy_binary() -> Path:
    try:
        return find_envoy()
    except DemoError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def stack(envoy_binary: Path) -> Iterator[Stack]:
    """One running stack per test module, failing open, with SETTINGS."""
    with Stack(SETTINGS, fixed_ports=False) as running:
        yield running
