"""What a GRPO run is. Sections are frozen and strict; every quantity carries its unit."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ..errors import InvalidInput
from ..model.conversion.config import DraftLoss
from ..model.tasks import families
from ..rollout.backend import InFlightPolicy
from ..rollout.schedule import Schedule
from ..settings import Config


class Tasks(Config):
    """Prompts and their verifiers, from reasoning-gym."""

    families: tuple[str, ...] = Field((), description="families to draw from; empty for all")
    prompts_per_step: int = Field(16, ge=1)
    samples_per_prompt: int = Field(8, ge=2, description="size of a group; its mean reward is the baseline")

    @model_validator(mode="after")
    def _known(self) -> Tasks:
        if unknown := sorted(set(self.families) - set(families())):
            raise InvalidInput("families", f"unknown {unknown}", f"use some of {', '.join(families())}")
        return self


class Rollouts(Config):
    """The service that makes rollouts, and how tokens are drawn."""

    actors: int = Field(2, ge=1, description="engines, one Ray actor and one core each")
    sampler: Literal["ar", "lossless", "coupled", "mixed"] = "lossless"
    schedule: Literal["ar", "two_pass", "fused"] = "fused"
    levels: tuple[int, ...] = (0, 4)
    temperature: float = Field(1.0, gt=0)
    max_tokens: int = Field(192, ge=1)
    batch: int = Field(32, ge=1, description="most samples an engine decodes at once")
    in_flight: InFlightPolicy = Field("finish", description="what a weight version does to sequences in flight")
    ray_address: str | None = Field(None, description="an existing Ray cluster; none starts one on this machine")
    bind: str = Field("tcp://127.0.0.1:*", description="address of the gateway")

    @model_validator(mode="after")
    def _levels(self) -> Rollouts:
        Schedule(self.schedule, levels=self.levels)
        return self


class Loss(Config):
    """Clipped policy gradient, token by token, plus the draft loss that lets the draft follow the policy."""

    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0, description="wider above than below (DAPO, arXiv 2503.14476)")
    importance_cap: float = Field(2.0, ge=1, description="largest weight p / behaviour of a token")
    draft_weight: float = Field(0.3, ge=0)
    draft: DraftLoss = DraftLoss(ce=0.0, tv=1.0, slot_decay=0.95)


class Optimizer(Config):
    """AdamW."""

    learning_rate: float = Field(2e-4, gt=0)
    final_norm_learning_rate: float | None = Field(None, gt=0, description="of the last norm's gain, which scales all logits: "
        "how sure the policy is of what it knows. Few numbers, so their gradient is clear where that of a matrix is still "
        "noise. None: learning_rate")
    warmup_steps: int = Field(2, ge=0, description="steps of linear warm-up; then linear decay to zero at the last step")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    updates_per_step: int = Field(2, ge=1, description="optimiser steps over one batch of trajectories")
    pack_rows: int = Field(4096, ge=64, description="clean tokens per forward; bounds memory")


class Evaluation(Config):
    """Held-out tasks, before and after."""

    tasks: int = Field(200, ge=1)
    seed: int = Field(0, ge=0)


class GrpoConfig(Config):
    """One run of `blockroll grpo`."""

    output: str = Field(description="directory of the run")
    policy: str = Field("tiny-reasoner", description="converted policy to start from: a shipped name or a directory")
    steps: int = Field(30, ge=1)
    seed: int = Field(0, ge=0)
    tasks: Tasks = Tasks()
    rollouts: Rollouts = Rollouts()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    save_policy: bool = Field(True, description="write the trained policy to OUTPUT/policy")
