"""One pass of the network over the rows of a step: layout and plan made on the host, sent in one copy, and run.

Invariants:
- Nothing here waits for the device.
- What is captured computes what runs eagerly: the inputs of a shape lie in one place, which every step fills again.
- The vocabulary head sees the rows that are asked for, and no others.

Legend: T rows, D hidden or, first of several, decoding sequences; M most drafts, R rows whose logits are asked for,
V vocabulary, N rows whose tokens are drafts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.dispatch import batch_invariant
from ..kernels.graphs import capture
from ..kernels.transfer import upload
from ..model.layout import DecodeRows, decode
from ..model.packed import packed_forward
from ..model.policy import Policy, Routing
from .cache import Held, PagedCache
from .recurring import RecurringInputs, bucket

Fill = Callable[[torch.Tensor], object]
"""Writes, into token_T on the device, the tokens that the host does not know."""
_OFTEN = 3
"""A shape is captured when it is met so many times."""
_MOST_SHAPES = 512


@dataclass
class Drafted:
    """Drafts that take rows of a pack: the first `count_D[d]` of row `of_D[d]` of `token_DM` stand in the d-th decoding
    sequence, from its clean row `first` on."""

    token_DM: torch.Tensor
    of_D: np.ndarray
    count_D: np.ndarray
    first: int

    def places(self, first_D: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pack rows, and entries of the flat token_DM that go there."""
        most = self.token_DM.shape[1]
        slot = np.arange(most)
        real = slot < self.count_D[:, None]
        row, entry = (first_D + self.first)[:, None] + slot, self.of_D[:, None] * most + slot
        return torch.from_numpy(row[real]), torch.from_numpy(entry[real])


@dataclass
class Asked:
    """What a pass is asked for.

    Attributes:
        held: its sequences, in order. where: those of them that decode; the others prefill.
        rows: what sequence s runs.
        lead_D: rows of a decoding sequence that it prefills first; all else here is about those behind them.
        full: what a decoding sequence runs with nothing left out.
        start_D, first_D: where the rows of a decoding sequence begin, and its first token; None where the host knows none.
        width: R, rows of a decoding sequence whose logits are wanted.
        drafted: rows whose tokens only the device knows.
        routed: the experts are wanted.
        also: numbers to send along.
    """

    held: list[Held]
    where: list[int]
    rows: Callable[[int], DecodeRows]
    lead_D: list[int]
    full: DecodeRows
    start_D: list[int]
    first_D: list[int] | None
    width: int
    drafted: Drafted | None
    routed: bool
    also: list[list[int]]


@dataclass
class Pass:
    """What it gives: final hidden states; first row and clean rows of each decoding sequence, behind what it prefilled; p's
    logits of the rows that were asked for (rows past a sequence's own hold anything); the experts of every row with the rows
    of each sequence; and what was sent along."""

    hidden_TD: torch.Tensor
    first_D: np.ndarray
    clean_D: np.ndarray
    logits_DRV: torch.Tensor
    expert_TL: torch.Tensor | None
    clean_rows: list[slice]
    also: list[torch.Tensor]


class _Shape:
    """Forwards of one shape: their inputs, and what they give once they are captured."""

    def __init__(self, policy: Policy, inputs: RecurringInputs) -> None:
        self._policy, self.inputs = policy, inputs
        self.parcel = inputs.parcel(policy.device)
        self._met = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden_TD: torch.Tensor | None = None

    def run(self, graphs: bool, memory: object) -> torch.Tensor:
        """hidden_TD; from a graph, with `graphs`, when the shape has been met often."""
        layout, plan = self.parcel.contents

        def forward() -> torch.Tensor:
            self._hidden_TD = self._policy(layout, self.inputs.view, None, plan)
            return self._hidden_TD

        self._met += 1
        if not graphs or self._met < _OFTEN:
            return forward()
        if self._graph is None:
            self._graph = capture(forward, memory)
        self._graph.replay()
        assert self._hidden_TD is not None
        return self._hidden_TD


class Forwards:
    """Forward passes of one policy over one cache.

    Args:
        captured: where kernels run, passes whose sequences all decode are padded to one of few shapes, and captured where the
            device can.

    Attributes:
        head: hidden states [..., D] to logits [..., V].
        markov: what a token adds to the logits of the mask row after it; None where the policy has no such head.
    """

    def __init__(self, policy: Policy, cache: PagedCache, captured: bool = True) -> None:
        self._policy, self._cache, self._captured = policy, cache, captured
        self._device = policy.device
        self._graphs = torch.cuda.is_available() and self._device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self._graphs else None
        self._shapes: dict[Hashable, _Shape] = {}
        self.take_weights()

    def take_weights(self) -> None:
        """To be called when the policy's weights have changed; what is captured reads them where they lie."""
        self._packed = packed_forward(self._policy)
        served = self._policy if self._packed is None else self._packed
        self.head = served.head
        self.markov = served.markov

    def run(self, asked: Asked) -> Pass:
        """One pass. Its hidden states hold until the next one."""
        lead_D = np.array(asked.lead_D, dtype=np.int64)
        whole = len(asked.where) == len(asked.held) and not lead_D.any()
        again = whole and self._captured and self._packed is None and not asked.routed and self._policy.paged
        plans: list[DecodeRows] = []
        if again:
            full = asked.full
            each = len(full.clean) + len(full.proposals) * full.block_length
            first_S, clean_S = np.arange(len(asked.held)) * each, np.full(len(asked.held), len(full.clean))
            total = bucket(len(asked.held)) * each
        else:
            plans = [asked.rows(s) for s in range(len(asked.held))]
            clean_S = np.array([len(plan.clean) for plan in plans])
            count_S = clean_S + np.array([len(plan.proposals) * plan.block_length for plan in plans])
            first_S, total = np.cumsum(count_S) - count_S, count_S.sum()
        first_D = first_S[asked.where] + lead_D
        index = np.minimum(first_D[:, None] + np.arange(asked.width), total - 1)
        fills = asked.drafted is not None and asked.drafted.count_D.any()
        places = list(asked.drafted.places(first_D)) if asked.drafted is not None and fills else []
        index_DR, places, also = upload(
            (torch.from_numpy(index), places, [torch.tensor(numbers) for numbers in asked.also]), self._device
        )
        fill = None
        if asked.drafted is not None and fills:
            row_N, token_N = places[0], asked.drafted.token_DM.flatten().index_select(0, places[1])

            def fill(token_T: torch.Tensor) -> None:
                token_T.index_copy_(0, row_N, token_N)

        routing = Routing([], []) if asked.routed else None
        hidden_TD = self._again(asked, fill) if again else self._once(plans, asked.held, fill, routing)
        logits_DRV = self.head(hidden_TD[index_DR]) if asked.where else hidden_TD[:0]
        expert_TL = None if routing is None else torch.stack(routing.expert_LT, dim=1)
        spans = [] if again else [slice(a, a + n) for a, n in zip(first_S.tolist(), clean_S.tolist(), strict=True)]
        return Pass(hidden_TD, first_D, clean_S[asked.where] - lead_D, logits_DRV, expert_TL, spans, also)

    def _once(
        self, plans: Sequence[DecodeRows], held: Sequence[Held], fill: Fill | None, routing: Routing | None
    ) -> torch.Tensor:
        """hidden_TD of every row, whatever each sequence runs."""
        layout = decode(plans, self._policy.mask_token_id)
        view = self._cache.view(held, layout)
        if self._packed is not None:
            if fill is not None:
                fill(layout.token_T)
            return self._packed(layout, view, routing)
        plan = self._policy.host_plan(layout, view)
        layout, plan = upload((layout, plan), self._device)
        if fill is not None:
            fill(layout.token_T)
        return self._policy(layout, view, routing, plan)

    def _again(self, asked: Asked, fill: Fill | None) -> torch.Tensor:
        """hidden_TD where every sequence runs the full rows. The shape is one of few: sequences are padded to a `bucket`, the
        table of pages to a power of two."""
        rows, held = asked.full, asked.held
        sequences, width = bucket(len(held)), 1 << (max(1, *(len(each.pages) for each in held)) - 1).bit_length()
        key = len(rows.clean), rows.proposals, rows.block_length, sequences, width, batch_invariant()
        shape = self._shapes.pop(key, None)
        if shape is None:
            if len(self._shapes) >= _MOST_SHAPES:  # the one that was used longest ago goes
                self._shapes.pop(next(iter(self._shapes)))
            shape = _Shape(self._policy, RecurringInputs(self._policy, self._cache, rows, sequences, width))
        self._shapes[key] = shape
        shape.inputs.at(held, asked.start_D, asked.first_D)
        shape.parcel.send()
        if fill is not None:
            fill(shape.parcel.contents[0].token_T)
        return shape.run(self._graphs, self._memory)
