"""Which positions of verl's micro-batches are trained. Imports torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def answer_masks(micro_batch: Any) -> list[torch.Tensor]:
    """Of each sample, 1 for a token of its answer that is trained, without padding.

    Args:
        micro_batch: verl's tensors by name. `loss_mask` is jagged; or it is padded to the right, and `prompts` and
            `attention_mask` say how long each answer is.
    """
    masks = micro_batch["loss_mask"]
    if masks.is_nested:
        return list(masks.unbind())
    lengths = micro_batch["attention_mask"][:, micro_batch["prompts"].shape[1] :].sum(1).tolist()
    return [mask[:length] for mask, length in zip(masks, lengths, strict=True)]


def trained_positions(lengths: Sequence[int], masks: Sequence[torch.Tensor], packed: bool) -> torch.Tensor:
    """bool[B, N], or bool[1, sum of lengths] where packed: positions whose next token is trained.

    Args:
        lengths: tokens of each sequence.
        masks: as `answer_masks`; an answer stands at the end of its sequence.
    """
    found = []
    for length, mask in zip(lengths, masks, strict=True):
        row = torch.zeros(length, dtype=torch.bool, device=mask.device)
        row[length - 1 - len(mask) : length - 1] = mask.bool()
        found.append(row)
    return torch.cat(found)[None] if packed else torch.nn.utils.rnn.pad_sequence(found, batch_first=True)
