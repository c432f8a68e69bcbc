"""The vocabulary head over many rows, a few at a time.

Invariants:
- The logits that exist at once are bounded in bytes, however many rows there are. In training those of a chunk are dropped
  after the forward pass and computed again in the backward pass, so this holds for gradients too.
- Rows that fit within the bound are computed in one piece, and once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

HEAD_BYTES = {"cpu": 256 * 2**20}
"""Most bytes of logits, and of what is made of them, by type of device; `OTHER_BYTES` for the rest."""
OTHER_BYTES = 4 * 2**30

T = TypeVar("T")


def rows_at_once(vocab_size: int, copies: int, device: torch.device) -> int:
    """How many rows of logits fit.

    Args:
        copies: float32 values held per row and token: the logits, and each tensor of their size made of them.
    """
    return max(1, HEAD_BYTES.get(device.type, OTHER_BYTES) // (4 * copies * vocab_size))


def recomputed(compute: Callable[..., T], *arguments: Any) -> T:
    """compute(*arguments), keeping nothing but the arguments for the backward pass."""
    if not torch.is_grad_enabled():
        return compute(*arguments)
    return checkpoint(compute, *arguments, use_reentrant=False, preserve_rng_state=False)
