"""verl's FSDP engine with the draft loss: drafts follow the policy while verl trains it.

    loss = verl's loss of the micro-batch + draft_weight * L_draft * (its trained tokens / those of the mini-batch)

L_draft is that of the GRPO trainer (`model/conversion/objective.py`), a mean over the mask rows of a micro-batch. They run in the
forward pass of verl's own rows. verl finds the engine by its vendor, `blockroll`: `cpu_platform` says it, and so does
VERL_ENGINE_VENDOR. Weight and share are `draft_weight` and `draft_share` of `model.override_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from verl.utils import tensordict_utils
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from ....seeds import named_generator
from ....settings import parse
from ...trainers.grpo.config import DraftTraining
from ..policy_model import PolicyModel
from .engine_vendor import VENDOR
from .positions import answer_masks, trained_positions

_OWN = ("draft_weight", "draft_share")
"""Keys of `override_config` that are read here."""


def draft_training(override_config: Mapping[str, Any]) -> DraftTraining:
    """The form of the draft loss. Raises ConfigError for a value out of range."""
    own = {name: override_config[name] for name in _OWN if name in override_config}
    return parse(own, DraftTraining, "model.override_config")


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device=["cuda", "npu", "cpu"], vendor=VENDOR)
class DraftingEngine(FSDPEngineWithLMHead):
    """`FSDPEngineWithLMHead` whose micro-batches also train mask rows, where the model has them."""

    _micro_batches = 0

    def initialize(self) -> None:
        """As verl's."""
        self.drafts = draft_training(self.model_config.override_config)
        super().initialize()

    def forward_step(self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool) -> Any:
        """As verl's; with gradients the draft loss is added, and `draft/overlap` to the metrics: the mean of sum min(p, q)."""
        model = self.module
        if forward_only or not self.drafts.draft_weight or not isinstance(model, PolicyModel):
            return super().forward_step(micro_batch, loss_function, forward_only)
        self._micro_batches += 1
        draw = named_generator(self.engine_config.seed, f"blocks/{self._micro_batches}/{self.rank}")
        temperature = micro_batch["temperature"]
        at = float(temperature.flatten()[0] if isinstance(temperature, torch.Tensor) else temperature)
        packed = tensordict_utils.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)
        lengths = micro_batch["input_ids"].offsets().diff().tolist()
        trained_BN = trained_positions(lengths, answer_masks(micro_batch), packed)
        with model.drafting(trained_BN, draw, self.drafts.draft_share, (self.drafts.draft, at)) as drafting:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        drafted = drafting.found
        if drafted is None or not drafted.weight:
            return loss, output
        output["metrics"]["draft/overlap"] = drafted.overlap
        tokens = tensordict_utils.get_non_tensor_data(data=micro_batch, key="batch_num_tokens", default=None)
        part = 1.0 if tokens is None else float(trained_BN.sum()) * self.get_data_parallel_size() / tokens
        share = drafted.share(self.drafts.draft, drafted.weight, drafted.sampled_weight)
        return loss + self.drafts.draft_weight * part * share, output
