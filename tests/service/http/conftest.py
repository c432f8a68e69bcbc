"""A live service of this folder's files, and OpenAI's client of it.

The folder is a package (`__init__.py`), so that the service ends with its last test; ONE_PROCESS in tests/conftest.py gives one
process all of its files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import ray

from blockroll.rollout.cluster.ray_start import start_ray
from blockroll.service.lifecycle import Service

sys.path.insert(0, str(Path(__file__).parent))

from http_parts import KEY, live_service, url_of
from step_gate import StepGate


@pytest.fixture(scope="package")
def started_ray() -> Iterator[None]:
    """The Ray that the services of this folder and of `dialects` join: each would take seconds to start its own."""
    started = start_ray(None, 4)
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="package")
def gate(tmp_path_factory: pytest.TempPathFactory) -> StepGate:
    """In front of the engines of these services."""
    return StepGate(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="package")
def service(started_ray: None, gate: StepGate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with gate.guards(), live_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="package")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url_of(service)}/v1", api_key=KEY, max_retries=0) as client:
        yield client
