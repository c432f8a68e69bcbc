"""One live service with a real engine for all files of tests of trainers' routes.

The folder is a package (`__init__.py`), so that the service ends with its last test; ONE_PROCESS in tests/conftest.py gives one
process all of its files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockroll.service.config import ServiceConfig
from blockroll.service.lifecycle import serve
from blockroll.settings import parse

sys.path.insert(0, str(Path(__file__).parent))

from dialect_parts import POLICY, Live
from step_gate import StepGate


@pytest.fixture(scope="package")
def live(started_ray: None, gate: StepGate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("dialects")
    config = parse({
        "policy": POLICY, "engines": {"count": 1, "batch": 8}, "http": {}, "sampling": {"sampler": "coupled"},
        "delivery": {"ledger": str(folder / "ledger.sqlite")}}, ServiceConfig, "test")
    with gate.guards(), serve(config) as service:
        found = Live(service, folder, gate)
        yield found
        found.threads.shutdown()
        found.http.close()
