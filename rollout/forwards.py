"""The network over the rows of a step: layout and plan made on the host, sent in one copy, and run.

Invariants:
- Nothing here waits for the device.
- What is captured computes what runs eagerly: the inputs of a shape lie in one place, which every step fills again.
- Padding changes nothing that counts: a sequence of padding holds no pages, and a row past its sequence's pages is kept
  nowhere.

Legend: T rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.dispatch import batch_invariant, takes_triton
from ..kernels.graphs import capture
from ..kernels.transfer import Parcel, signature, upload
from ..model.layout import DecodeRows, TokenLayout, decode
from ..model.packed import PackedForward
from ..model.paged import PagedPlan
from ..model.policy import Policy, Routing
from .cache import CacheView, Held, PagedCache

Fill = Callable[[torch.Tensor], object]
"""Writes, into token_T on the device, the tokens that the host does not know."""
_OFTEN = 3
"""A shape is captured when it is met so many times."""
_MOST_SHAPES = 512


def bucket(count: int) -> int:
    """The smallest of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... that is not below `count`."""
    size = 1 << (count - 1).bit_length()
    return size * 3 // 4 if size >= 32 and count <= size * 3 // 4 else size


def padded(
    plans: Sequence[DecodeRows], held: Sequence[Held], full: DecodeRows
) -> tuple[list[DecodeRows], list[Held]]:
    """A bucket of sequences with the rows of `full` each: first their own, then padding."""
    whole = [
        DecodeRows([*plan.clean, *full.clean[len(plan.clean) :]], plan.start, full.proposals, full.block_length)
        for plan in plans
    ]
    missing = bucket(len(plans)) - len(plans)
    return whole + [full] * missing, [*held, *(Held(0) for _ in range(missing))]


@dataclass
class _Shape:
    """Forwards of one shape: their inputs, and what they give once they are captured."""

    inputs: Parcel[tuple[TokenLayout, PagedPlan]]
    met: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    hidden_TD: torch.Tensor | None = None


class Forwards:
    """Forward passes of one policy over one cache.

    Attributes:
        captured: steps that recur are to be padded (`padded`); their forwards are captured where the device can.
        head: hidden states [..., D] to logits [..., V].
        markov: what a token adds to the logits of the mask row after it; None where the policy has no such head.
    """

    def __init__(self, policy: Policy, cache: PagedCache, captured: bool | None = None) -> None:
        self._policy, self._cache = policy, cache
        self.captured = takes_triton(policy.model.embed_tokens.weight) if captured is None else captured
        self._graphs = torch.cuda.is_available() and policy.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self._graphs else None
        self._shapes: dict[Hashable, _Shape] = {}
        self.take_weights()

    def take_weights(self) -> None:
        """To be called when the policy's weights have changed; what is captured reads them where they lie."""
        self._packed = PackedForward(self._policy) if PackedForward.serves(self._policy) else None
        served = self._policy if self._packed is None else self._packed
        self.head = served.head
        self.markov = None if self._policy.markov is None else served.markov

    def run(
        self, plans: Sequence[DecodeRows], held: Sequence[Held], fill: Fill | None, routing: Routing | None, recurs: bool
    ) -> torch.Tensor:
        """hidden_TD of every row.

        Args:
            recurs: the shape is one of few, so that it is worth capturing. What is returned then holds until the next run.
        """
        layout = decode(plans, self._policy.mask_token_id)
        view = self._cache.view(held, layout, in_few_sizes=recurs)
        if self._packed is not None:
            if fill is not None:
                fill(layout.token_T)
            return self._packed(layout, view, routing)
        plan = self._policy.host_plan(layout, view)
        if recurs and isinstance(plan, PagedPlan) and self._policy.device.type == "cuda":
            shape = self._shape((layout, plan))
            if shape is not None:
                if fill is not None:
                    fill(shape.inputs.contents[0].token_T)
                return self._again(shape, view)
        layout, plan = upload((layout, plan), self._policy.device)
        if fill is not None:
            fill(layout.token_T)
        return self._policy(layout, view, routing, plan)

    def _shape(self, inputs: tuple[TokenLayout, PagedPlan]) -> _Shape | None:
        """The shape of these inputs, filled with them; None when there are too many shapes already."""
        key = signature(inputs), batch_invariant()
        shape = self._shapes.get(key)
        if shape is not None:
            shape.inputs.fill(inputs)
        elif len(self._shapes) < _MOST_SHAPES:
            shape = self._shapes[key] = _Shape(Parcel(inputs, self._policy.device))
        return shape

    def _again(self, shape: _Shape, view: CacheView) -> torch.Tensor:
        layout, plan = shape.inputs.contents

        def run() -> torch.Tensor:
            shape.hidden_TD = self._policy(layout, view, None, plan)
            return shape.hidden_TD

        shape.met += 1
        if not self._graphs or shape.met < _OFTEN:
            return run()
        if shape.graph is None:
            shape.graph = capture(run, self._memory)
        shape.graph.replay()
        assert shape.hidden_TD is not None
        return shape.hidden_TD
