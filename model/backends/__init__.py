"""Backends: the ways to run a policy's network, behind one protocol. `choose` picks one when a policy is placed.

| backend | runs | serves |
|---|---|---|
| `plain` | torch | every policy; the one with gradients is `Policy.forward`, which it calls |
| `triton` | kernels on the cache's pages | policies on an accelerator |
| `packed` | folded weights and functions that numba compiles | small float32 policies on a CPU |

All follow the same layouts and caches, and their results are equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from ...errors import CheckpointError
from ...kernels.attention.tiles import MOST_GROUP
from ..layout import TokenLayout
from ..state import SequenceState
from . import packed
from .plain import PlainBackend
from .triton import TritonBackend

if TYPE_CHECKING:
    import numpy as np
    from transformers import ZayaConfig

    from ...kernels.verify.calls import Chain, Verification
    from ..policy import Policy, Routing


class DraftsBetween(NamedTuple):
    """What `Backend.forward_twice` draws between its passes. D sequences of the first pass decode: each runs its anchor and then,
    if it drafts, at least M mask rows. K of them are in the second pass, whose rows are drafts. All tensors are float32, to be
    written.

    Attributes:
        sequences: of the first pass.
        anchor_D: int64, row of each anchor. verify_K: int64, which of the D the second pass runs.
        hidden_NH: N = D R rows, R = M + 1.
        drawn_NV: logits of the anchors, then of the M rows behind each of them: q's.
        logits_DRV: p's logits of each anchor and of the drafts after it.
        draws: draws the drafts, from drawn_NV. verifies: verifies them, with logits_DRV; None where that comes later.
    """

    sequences: int
    anchor_D: np.ndarray
    verify_K: np.ndarray
    hidden_NH: torch.Tensor
    drawn_NV: torch.Tensor
    logits_DRV: torch.Tensor
    draws: Chain
    verifies: Verification | None


class Backend(Protocol):
    """One policy's network without gradients.

    Attributes:
        recurs: a step's plan can be filled again in place, and its forward captured.
        drafts_between: two passes can be one call, with drafts drawn between them (`forward_twice`).
        threads: how many a pass is divided among; None where that is left to torch. Results do not depend on it.
        markov: int64[...] tokens to what they add to the logits of the mask rows after them, [..., V]; None where the policy has
            no Markov head. With `head` it makes q.
    """

    recurs: bool
    threads: int | None
    markov: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def drafts_between(self) -> bool:
        """As said above; it may change with the weights."""

    def prepare(self, layout: TokenLayout, state: SequenceState | None = None) -> tuple[TokenLayout, Any]:
        """A host layout and its plan, both where the network runs. The layout's tokens may still change."""

    def forward(
        self, layout: TokenLayout, plan: Any, state: SequenceState | None = None, routing: Routing | None = None
    ) -> torch.Tensor:
        """Final hidden states, hidden_TD, of every row; the clean rows are kept in the cache.

        Args: layout and plan, of `prepare` with this state; routing, filled with the experts chosen.
        """

    def forward_twice(
        self, layout: TokenLayout, plan: Any, state: SequenceState | None, routing: Routing | None, drawing: DraftsBetween
    ) -> None:
        """`forward` of a layout that holds the sequences of two passes, those of the first one in front. Drafts that are drawn
        from its mask rows become the tokens of the second one. Only where `drafts_between`."""

    def head(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [..., D] to logits [..., V]: contiguous ones, written into `out` if it is given."""

    def fold(self, policy: Policy) -> Any:
        """What `refresh` makes of the weights of a policy of the same structure; None where there is nothing to make. It reads
        nothing that a pass writes: another thread may call it."""

    def refresh(self, folded: Any = None) -> None:
        """Must be called after the policy's weights have changed. `folded`: what `fold` made of the same weights, or None."""


def check_for_kernels(config: ZayaConfig) -> None:
    """Raise CheckpointError where the kernels of accelerators cannot serve a policy of this configuration."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads > MOST_GROUP * kv_heads:
        raise CheckpointError("num_attention_heads", f"{heads} query heads share {kv_heads} key heads, and kernels take at most "
                              f"{MOST_GROUP} for each", "serve this policy on a CPU")  # fmt: skip


def choose(policy: Policy) -> Backend:
    """The fastest backend that serves the policy where it lies. Raises CheckpointError where there is none."""
    if packed.serves(policy):
        from .packed.backend import PackedBackend  # numba takes a moment to import

        return PackedBackend(policy)
    if policy.paged:
        check_for_kernels(policy.config)
    with torch.no_grad():  # weights under training are run without gradients here
        return TritonBackend(policy) if policy.paged else PlainBackend(policy)


def products(policy: Policy) -> str:
    """The library that multiplies the clean rows of a policy in decoding and scoring. Benchmarks state it beside their
    figures."""
    if not packed.serves(policy):
        return "the library's, equal up to rounding"
    from ...kernels.linear.numba import name

    return name()
