"""A service for as long as a block lasts: real Ray, a real engine, real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from blockroll.errors import BlockrollError, StorageError, TransportError
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.service import runtime_file
from blockroll.service.config import ServiceConfig
from blockroll.service.lifecycle import serve
from blockroll.settings import parse
from blockroll.trainer_bridge.client import connect


def config(ledger: Path, policy: str = "tiny-reasoner", **sections: object) -> ServiceConfig:
    delivery = {"ledger": str(ledger), **sections.pop("delivery", {})}  # type: ignore[dict-item]
    return parse({"policy": policy, "engines": {"count": 1, "batch": 4}, **sections, "delivery": delivery}, ServiceConfig, "test")


@pytest.mark.slow
def test_a_service_serves_within_its_block_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Ray is its own, also where the machine belongs to a cluster."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    options = config(tmp_path / "ledger.sqlite", metrics={"port": 0})
    with serve(options) as service:
        assert runtime_file.read(options.ledger) == service.record
        with pytest.raises(StorageError, match=f"is up at {service.address}"), serve(options):
            pass
        with connect(service.address, client_id="t") as client:
            [found] = client.generate([RolloutRequest("a", (5, 6, 7), SamplingParams(max_tokens=8))], timeout=60)
            assert found.key == ("a", 0) and 0 < len(found.tokens) <= 8
        from urllib.request import urlopen

        assert service.record.metrics is not None
        lines = urlopen(service.record.metrics, timeout=20).read().decode().splitlines()
        assert {"blockroll_up 1.0", "blockroll_requested_total 1.0", "blockroll_unique_total 1.0"} <= set(lines)
        assert any(line.startswith('blockroll_engine_version{') for line in lines)
    assert not ray.is_initialized()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.sqlite"]
    with pytest.raises(TransportError, match="not answered"):
        connect(service.address, timeout=0.5)
    with pytest.raises(StorageError, match="belongs to another policy .tiny-reasoner, "):
        with serve(config(options.ledger, "tiny-reasoner-terse")):
            pass


@pytest.mark.parametrize(("delivery", "said"), [
    ({"bind": "tcp://127.0.0.1:1x"}, "delivery.bind: 'tcp://127.0.0.1:1x' is not an address"),
    ({"bind": "tcp://0.0.0.0:5555"}, "delivery.keys: missing, and tcp://0.0.0.0:5555 is not an address that only"),
])
def test_an_address_that_cannot_be_used_is_refused_at_once(delivery: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(BlockrollError, match=said):
        config(tmp_path / "ledger.sqlite", delivery=delivery)


@pytest.mark.slow
def test_a_service_that_does_not_start_leaves_no_ray(tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    directory.mkdir()
    from blockroll.service.policy_files import find

    for path in find("tiny-reasoner").iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BlockrollError, match="corrupt"), serve(config(tmp_path / "ledger.sqlite", str(directory))):
        pass
    assert not ray.is_initialized() and runtime_file.read(tmp_path / "ledger.sqlite") is None
