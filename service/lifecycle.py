"""A rollout service on this machine: a Ray cluster of engines behind a gateway, for as long as a `with` block lasts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..rollout.cluster import EngineSpec, RayCluster
from ..rollout.engine import EngineConfig
from ..trainer_bridge.gateway import Gateway

_log = logging.getLogger(__package__)
DISK_PATIENCE_S = 5.0
"""Seconds the disk under the ledger may stay full before the service ends."""


@contextmanager
def serve(policy: str, engines: EngineConfig, ledger: Path, *, actors: int, ray_address: str | None = None,
          bind: str = "tcp://127.0.0.1:*") -> Iterator[str]:
    """Starts the service and yields the address clients connect to.

    Args:
        policy: shipped name or directory of the policy to start from (weight version 0).
        ledger: SQLite file of the gateway's ledger.
        actors: engines, one Ray actor each.
        ray_address: an existing Ray cluster; None starts one on this machine.
        bind: address of the gateway.
    """
    cluster = RayCluster(EngineSpec(policy, engines, device="cpu"), engines=actors, address=ray_address)
    try:
        with Gateway(cluster, bind, ledger, disk_patience=DISK_PATIENCE_S) as gateway:
            _log.info("%d engines of %s serve at %s", actors, policy, gateway.address)
            yield gateway.address
    finally:
        cluster.close()
        _log.info("the service is down")
