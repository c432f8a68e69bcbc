"""A live service of a test file, and OpenAI's client of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from blockroll.service.lifecycle import Service

sys.path.insert(0, str(Path(__file__).parent))

from http_parts import KEY, live_service, url_of


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with live_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url_of(service)}/v1", api_key=KEY, max_retries=0) as client:
        yield client
