"""A service for as long as a block lasts: real Ray, a real engine, real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from blockroll.errors import TransportError
from blockroll.rollout.engine import EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.service.lifecycle import serve
from blockroll.trainer_bridge.client import connect


def test_a_service_serves_within_its_block_and_leaves_nothing(tmp_path: Path) -> None:
    config = EngineConfig(max_batch=4)
    with serve("tiny-reasoner", config, tmp_path / "ledger.sqlite", actors=1) as address:
        with connect(address, client_id="t") as client:
            [found] = client.generate([RolloutRequest("a", (5, 6, 7), SamplingParams(max_tokens=8))], timeout=60)
            assert found.key == ("a", 0) and 0 < len(found.tokens) <= 8
    assert not ray.is_initialized()
    with pytest.raises(TransportError, match="not answered"):
        connect(address, timeout=0.5)


def test_a_service_that_cannot_bind_leaves_no_ray(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="tcp://nowhere"):
        with serve("tiny-reasoner", EngineConfig(), tmp_path / "ledger.sqlite", actors=1, bind="tcp://nowhere"):
            pass
    assert not ray.is_initialized()
