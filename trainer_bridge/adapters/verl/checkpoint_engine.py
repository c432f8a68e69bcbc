"""verl's checkpoint engine for a trainer apart from its rollouts: the trainer pushes to the service, rollouts receive nothing.

    actor_rollout_ref.rollout.checkpoint_engine.backend=blockroll
    +actor_rollout_ref.rollout.checkpoint_engine.engine_kwargs.blockroll.address=tcp://HOST:PORT
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

import torch
from verl.checkpoint_engine.base import CheckpointEngine

from .publisher import Publisher
from .settings import NAME, service_settings


class ServiceCheckpointEngine(CheckpointEngine):
    """Ends of all workers. One of the trainer's, the master, pushes.

    Args:
        bucket_size: not used: chunks are those of the wire.
        is_master: whether this is the trainer's first worker.
        section: the fields of `settings.ServiceSettings`.
    """

    wire_format = NAME
    """What `rollout.ServiceRollout.update_weights` knows that the weights arrived by."""

    def __init__(self, bucket_size: int, is_master: bool = False, **section: Any) -> None:
        settings = service_settings({NAME: section}, "rollout.checkpoint_engine.engine_kwargs")
        self._publisher = Publisher(settings, is_master)

    def prepare(self) -> dict[str, Any]:
        """Nothing to know of each other: all connect to the service."""
        return {}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int,
                       metadata: list[dict[str, Any]]) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """The ranks of trainer and rollouts, which `init_process_group` ignores."""
        return {"rank": list(range(actor_wg_world_size))}, {"rank": list(range(rollout_world_size))}

    def init_process_group(self, **kwargs: Any) -> None:
        """Nothing: there is no group."""

    def finalize(self) -> None:
        """Nothing: no memory is held between two updates."""

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]],
                           global_steps: int | None = None) -> dict[str, float]:
        """Makes these serve; returns figures for verl's log when every engine has them."""
        version = await self._publisher.publish(weights, global_steps)
        return {} if version is None else {"rollout/weight_version": float(version)}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Nothing: the service has them."""
        nothing: tuple[tuple[str, torch.Tensor], ...] = ()
        for item in nothing:
            yield item
