"""The fork server, one per test process, and `harness` made importable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import ForkServer


@pytest.fixture(scope="session")
def edges() -> Iterator[ForkServer]:
    """Runs cases (see `harness`)."""
    server = ForkServer()
    yield server
    server.close()
