"""verl's rollout of a worker: the end that takes weights from the trainer, or from a checkpoint engine, to the service."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from verl.workers.rollout.base import BaseRollout

from ....errors import InvalidInput
from .publisher import Publisher
from .settings import NAME, service_settings


class ServiceRollout(BaseRollout):
    """The rollout `blockroll`. It holds no weights and no K/V, so it neither sleeps nor wakes up.

    Args:
        replica_rank: which replica; -1 to make it of the worker's rank.

    Attributes:
        is_leader_rank: whether this worker is the first of its replica.
    """

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        size = self.config.tensor_model_parallel_size * self.config.data_parallel_size * self.config.pipeline_model_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // size if replica_rank == -1 else replica_rank
        self.is_leader_rank = rank % size == 0
        # Replicas are doors to one service, so one of their workers pushes for all.
        self._publisher = Publisher(service_settings(self.config.engine_kwargs), self.is_leader_rank and self.replica_rank == 0)

    async def resume(self, tags: list[str]) -> None:
        """Nothing: the service has its own memory."""

    async def release(self) -> None:
        """Nothing."""

    async def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], wire_format: str = "named_tensors",
                             global_steps: int | None = None, peft_config: Any = None, **_: Any) -> None:
        """Makes these serve; returns when every engine has them.

        Args:
            wire_format: `named_tensors`, or `blockroll` when the checkpoint engine has pushed them already.
            global_steps: verl's step that they are of.
        """
        if peft_config is not None:
            raise InvalidInput("model.lora", "adapters cannot be sent", "set actor_rollout_ref.model.lora.merge=True")
        if wire_format not in ("named_tensors", NAME):
            raise InvalidInput("rollout.checkpoint_engine.backend", f"sends {wire_format}",
                               f"use {NAME}, or one that sends whole tensors")
        if wire_format == NAME:
            async for _item in weights:  # type: ignore[attr-defined]
                pass
            return
        await self._publisher.publish(weights, global_steps)
