"""The configuration of a GRPO run. Sections are frozen and strict; every quantity carries its unit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ....errors import InvalidInput
from ....model.arguments import MAX_TEMPERATURE, MIN_TEMPERATURE
from ....model.conversion.config import DraftLoss
from ....model.tasks import families
from ....model.tasks.own_config import TaskSource
from ....seeds import MAX_SEED
from ....settings import Config


class Tasks(Config):
    """Prompts and their verifiers, from reasoning-gym or from files of one's own."""

    families: tuple[str, ...] = Field((), description="reasoning-gym families to draw from; empty for all")
    source: TaskSource | None = Field(None, description="prompts of one's own, in place of reasoning-gym's")
    prompts_per_step: int = Field(16, ge=1, le=65_536)
    samples_per_prompt: int = Field(8, ge=2, le=65_536, description="size of a group; its mean reward is the baseline")
    dynamic_sampling: bool = Field(True, description="leave groups whose rewards are all equal out of the update: their "
                                   "advantages are zero, so they would only cost time (DAPO, arXiv 2503.14476)")
    max_generation_batches: int = Field(1, ge=1, le=1024, description="with dynamic_sampling: most batches of prompts rolled out "
                                        "per step until prompts_per_step groups have rewards that differ")

    @model_validator(mode="after")
    def _known(self) -> Tasks:
        if unknown := sorted(set(self.families) - set(families())):
            raise InvalidInput("families", f"unknown {unknown}", f"use some of {', '.join(families())}")
        if self.families and self.source is not None:
            raise InvalidInput("families", "given beside a source", "leave them out: they are reasoning-gym's")
        if self.max_generation_batches > 1 and not self.dynamic_sampling:
            raise InvalidInput("max_generation_batches", f"{self.max_generation_batches} without dynamic_sampling",
                               "set dynamic_sampling: true, or leave it at 1")
        return self


class Rollouts(Config):
    """How tokens are drawn, and how far rollouts may lag behind the trainer."""

    sampler: Literal["ar", "lossless", "coupled", "mixed"] = Field("coupled", description="with ar and coupled a run "
        "repeats whatever happens to its engines; see README for all four")
    temperature: float = Field(1.0, ge=MIN_TEMPERATURE, lt=MAX_TEMPERATURE)
    max_tokens: int = Field(192, ge=1, le=2**31)
    staleness: Literal[0, 1] = Field(0, description="optimiser steps by which rollouts may lag behind the weights that are "
        "trained. 0: roll out, then train. 1: train on one batch while the engines decode the next one; the loss corrects by "
        "the recorded log-probabilities. A run with 1 does not repeat to the bit: when a version arrives is a matter of time")
    in_flight: Literal["finish", "keep", "recompute"] = Field("keep", description="with staleness 1: what a weight version does "
        "to unfinished samples. keep: they go on, each token tagged with the version that made it. finish: the push waits for "
        "them. recompute: as keep, but their keys and values are computed again")


class DraftTraining(Config):
    """The draft loss beside a policy gradient, which lets the draft follow the policy."""

    draft_weight: float = Field(0.3, ge=0, le=1e6, description="weight of the draft loss; 0 leaves the mask rows untrained")
    draft_share: float = Field(1.0, gt=0, le=1, description="share of the samples that carry mask rows. The draft loss is "
        "a mean over them, so its weight does not depend on the share; its time does")
    draft: DraftLoss = DraftLoss(ce=0.0, tv=1.0, slot_decay=0.95)


class Loss(DraftTraining):
    """Clipped policy gradient, plus the draft loss."""

    scale_rewards: Literal["group", "none"] = Field("group", description="what a group's centred rewards are divided by: "
        "their standard deviation (arXiv 2402.03300), or nothing (Dr. GRPO, arXiv 2503.20783)")
    aggregation: Literal["token", "sequence"] = Field("token", description="token: mean over all tokens of the update "
        "(DAPO, arXiv 2503.14476). sequence: mean over samples of each one's mean over tokens (arXiv 2402.03300)")
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.28, gt=0, description="wider above than below (DAPO, arXiv 2503.14476)")
    importance_cap: float = Field(2.0, ge=1, le=1e6, description="largest weight p / behaviour of a token")
    kl_weight: float = Field(0.0, ge=0, le=1e6, description="weight of KL(p || p of the starting policy) per token, estimated by "
        "r - 1 - log r with r = p_start / p (http://joschu.net/blog/kl-approx.html); 0 computes none")


class Optimizer(Config):
    """AdamW."""

    learning_rate: float = Field(1e-4, gt=0, le=1)
    warmup_steps: int = Field(2, ge=0, description="steps of linear warm-up; then linear decay to zero at the last step")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    updates_per_step: int = Field(2, ge=1, le=1024, description="optimiser steps over one batch of trajectories")
    pack_rows: int = Field(2048, ge=64, le=2**28, description="clean tokens per forward; bounds memory")
    threads: int = Field(2, ge=1, le=1024, description="packs computed at once, each on one core. Sums of gradients follow their "
                         "order, so a run repeats only with the same number")


class Evaluation(Config):
    """Held-out tasks: one sample of each at the training temperature and one at temperature 0."""

    tasks: int = Field(400, ge=1, le=100_000, description="held-out tasks; all there are, where a source of one's own has fewer")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    every: int = Field(0, ge=0, description="steps between evaluations; 0 for none but before and after training")


class GrpoConfig(Config):
    """One run of `blockroll grpo`."""

    output: str = Field(min_length=1, description="directory of the run")
    policy: str = Field("tiny-reasoner-terse", description="converted policy to start from: a shipped name or a directory")
    steps: int = Field(30, ge=1)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    tasks: Tasks = Tasks()
    rollouts: Rollouts = Rollouts()
    service: dict[str, Any] | str | None = Field(None, description="the service that makes the rollouts: a section as `blockroll "
        "up` reads it, without policy, ledger and logging, or the name of such a file. Policy and ledger are those of the run. "
        "None for two engines on this machine")
    address: str | None = Field(None, description="instead: the gateway of a service that runs")
    keys: str | None = Field(None, description="with address: the directory of that service's keys")
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    log_groups: int = Field(4, ge=0, le=65_536, description="groups of each step written whole to OUTPUT/rollouts.jsonl, which "
                            "`blockroll inspect` shows; about 60 bytes per token. 0 writes none")
    save_policy: bool = Field(True, description="write the trained policy to OUTPUT/policy")

    @model_validator(mode="after")
    def _one_service(self) -> GrpoConfig:
        if self.address is not None and self.service is not None:
            raise InvalidInput("address", f"{self.address} beside a section service", "give one of the two")
        if self.keys is not None and self.address is None:
            raise InvalidInput("keys", f"{self.keys} without an address", "give address, or service.delivery.keys")
        return self
