"""The draft loss as a mixin of TRL's trainers: drafts follow the policy while TRL trains it.

    loss = TRL's loss of the micro-batch + draft_weight * L_draft / gradient accumulation steps

L_draft is that of the GRPO trainer (`model/conversion/objective.py`), a mean over the mask rows of a micro-batch. They run in the
forward pass of TRL's own rows. The model has to be a `PolicyModel`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from ...errors import InvalidInput
from ...seeds import named_generator
from ..trainers.grpo.config import DraftTraining
from .policy_model import PolicyModel, trained_positions

_KEPT = 4096
"""Micro-batches whose figures wait for the next line of the log."""


class DraftLossMixin:
    """Adds the draft loss to `compute_loss` of a trainer, and `draft/overlap` to its log: the mean of sum min(p, q), the chance
    that a draft is accepted. Stands before the trainer's class among the bases.

    Args:
        drafts: weight and form of the draft loss; a weight of 0 adds none.
    """

    def __init__(self, *arguments: Any, drafts: DraftTraining | None = None, **options: Any) -> None:
        self.drafts = DraftTraining() if drafts is None else drafts
        self._micro_batches, self._overlaps = 0, deque[float](maxlen=_KEPT)
        super().__init__(*arguments, **options)
        found = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if not isinstance(found, PolicyModel):
            raise InvalidInput("model", f"a {type(found).__name__} has no mask rows", "give load_model(policy), without LoRA")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # type: ignore[attr-defined]
            raise InvalidInput("trainer", "its parameters are sharded", "train on one device, or with DDP")

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> torch.Tensor:
        """The trainer's loss, and the draft loss where the model is in training."""
        trainer: Any = self

        def policy_loss() -> torch.Tensor:
            return super(DraftLossMixin, trainer).compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

        if not self.drafts.draft_weight or not model.training or not torch.is_grad_enabled():
            return policy_loss()
        self._micro_batches += 1
        place = f"blocks/{trainer.state.global_step}/{self._micro_batches}/{trainer.accelerator.process_index}"
        draw = named_generator(trainer.args.seed, place)
        policy: PolicyModel = trainer.accelerator.unwrap_model(model)
        with policy.drafting(_trained(inputs), draw, self.drafts.draft_share) as drafting:
            loss = policy_loss()
        drafted = drafting.losses(self.drafts.draft, trainer.temperature)
        if drafted is None or not drafted.weight:
            return loss
        self._overlaps.append(drafted.overlap)
        share = drafted.share(self.drafts.draft, drafted.weight, drafted.sampled_weight)
        return loss + self.drafts.draft_weight * share / trainer.current_gradient_accumulation_steps

    def log(self, logs: dict[str, Any], *arguments: Any, **options: Any) -> None:
        """Logs, with the mean overlap since the last line."""
        if self._overlaps:
            logs["draft/overlap"] = sum(self._overlaps) / len(self._overlaps)
            self._overlaps.clear()
        super().log(logs, *arguments, **options)  # type: ignore[misc]


def _trained(inputs: dict[str, Any]) -> torch.Tensor:
    """The positions whose next token is trained, of the rows that TRL gives to the model."""
    if "shift_labels" in inputs:  # AsyncGRPOTrainer: one packed row, without the padding between processes
        kept = inputs["attention_mask"].bool()
        return inputs["shift_labels"][kept][None] != -100
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    return trained_positions(mask, inputs["prompt_ids"].shape[1])
