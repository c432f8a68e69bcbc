"""A rollout service on this machine: a Ray cluster of engines behind a gateway, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..rollout.cluster import RayCluster
from ..rollout.engine import EngineConfig
from ..rollout.schedule import Schedule
from .gateway import Gateway
from .trainers.grpo.config import Rollouts

DISK_PATIENCE_S = 5.0
"""How long a full disk under the ledger may take to be freed before the service ends."""


@contextmanager
def serve(policy: str, rollouts: Rollouts, ledger: Path) -> Iterator[str]:
    """Starts the service and yields the address clients connect to.

    Args:
        policy: shipped name or directory of the policy to start from (weight version 0).
        ledger: SQLite file of the gateway's ledger.
    """
    config = EngineConfig(Schedule(rollouts.schedule, levels=rollouts.levels), max_batch=rollouts.batch)
    cluster = RayCluster(policy, config, actors=rollouts.actors, address=rollouts.ray_address)
    try:
        with Gateway(cluster, rollouts.bind, ledger, disk_patience=DISK_PATIENCE_S) as gateway:
            yield gateway.address
    finally:
        cluster.close()
