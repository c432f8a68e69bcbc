"""Makes `bridge_parts` importable and gives tests a running gateway."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bridge_parts import Served, ToyBackend

from blockroll.trainer_bridge.gateway import Gateway


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """serve(backend, **gateway options) -> a started gateway on a free loopback port; stopped after the test."""
    with ExitStack() as stack:
        def start(backend: ToyBackend, address: str = "tcp://127.0.0.1:*", **options: Any) -> Gateway:
            gateway = Gateway(backend, address, tmp_path / "ledger.sqlite", **options).start()
            stack.callback(gateway.stop)
            return gateway

        yield start


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """served(rate, die) -> a gateway in a process of its own, killed after the test."""
    with ExitStack() as stack:
        def start(rate: float, die: str = "") -> Served:
            made = Served(tmp_path / "ledger.sqlite", rate, die)
            stack.callback(made.kill)
            return made

        yield start
