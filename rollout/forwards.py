"""One pass of the network over the rows of a step: layout and plan made on the host, sent in one copy, and run.

Invariants:
- Nothing here waits for the device.
- What is captured computes what runs eagerly: the inputs of a shape lie in one place, which every step fills again.
- The vocabulary head sees the rows that are asked for, and no others.
- Graphs are few, and their memory is bounded.

Legend: T rows, D hidden or, first of several, decoding sequences; M most drafts, R rows whose logits are asked for,
V vocabulary, N rows whose tokens are drafts, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.dispatch import batch_invariant
from ..kernels.graphs import Captured, GraphBudget
from ..kernels.transfer import upload
from ..model.backends import Backend, choose
from ..model.layout import DecodeRows, decode
from ..model.policy import Policy, Routing
from .cache import Held, PagedCache
from .recurring import RecurringInputs, bucket

Fill = Callable[[torch.Tensor], object]
"""Writes, into token_T on the device, the tokens that the host does not know."""
_OFTEN = 3
"""A shape is captured when it is met so many times."""
_MOST_SHAPES = 128
"""Shapes whose inputs, and graphs, are kept."""
_GRAPH_SHARE = 32
"""Graphs take at most this part of the device's memory: 1 / 32."""
_LATELY = 2000
"""A graph that was not replayed in so many passes gives way to another one. Others stay, and what finds no room runs eagerly:
shapes that take turns would else capture again and again, which takes as long as hundreds of steps."""
_log = logging.getLogger(__name__)


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
    """Forwards of one shape: their inputs, and what they give once they are captured.

    Attributes:
        captured: the graph, once there is one. last: number of the pass it was run in last.
    """

    def __init__(self, policy: Policy, backend: Backend, inputs: RecurringInputs, routed: bool) -> None:
        self._backend, self.inputs, self._routed = backend, inputs, routed
        self.parcel = inputs.parcel(policy.device)
        self.captured: Captured | None = None
        self.last = self._met = 0
        self._hidden_TD: torch.Tensor | None = None
        self._expert_TL: torch.Tensor | None = None

    def forward(self) -> None:
        """Run it on the inputs as they are."""
        layout, plan = self.parcel.contents
        routing = Routing([], []) if self._routed else None
        self._hidden_TD = self._backend.forward(layout, plan, self.inputs.view, routing)
        self._expert_TL = None if routing is None else torch.stack(routing.expert_LT, dim=1)

    def run(self, capture: Callable[[Callable[[], None]], Captured | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_TD, and the experts if they are wanted. From a graph, which `capture` gives if it may, when the shape has been
        met often."""
        self._met += 1
        if self.captured is None and self._met >= _OFTEN:
            self.captured = capture(self.forward)
        if self.captured is None:
            self.forward()
        else:
            self.captured.graph.replay()
        hidden_TD, expert_TL = self._hidden_TD, self._expert_TL
        assert hidden_TD is not None
        if self.captured is None:
            self._hidden_TD = self._expert_TL = None  # of use to nobody once the step is over
        elif expert_TL is not None:
            expert_TL = expert_TL.clone()  # it is read after the next graph, which may write over it
        return hidden_TD, expert_TL


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
        total = torch.cuda.get_device_properties(self._device).total_memory if self._graphs else 0
        self._budget, self._warned = GraphBudget(_MOST_SHAPES, total // _GRAPH_SHARE), False
        self._shapes: dict[Hashable, _Shape] = {}
        self._passes = 0
        self._backend = choose(policy)
        self.head, self.markov = self._backend.head, self._backend.markov

    def take_weights(self) -> None:
        """To be called when the policy's weights have changed; what is captured reads them where they lie."""
        self._backend.refresh()
        self.markov = self._backend.markov

    def run(self, asked: Asked) -> Pass:
        """One pass. Its hidden states hold until the next one."""
        lead_D = np.array(asked.lead_D, dtype=np.int64)
        whole = len(asked.where) == len(asked.held) and not lead_D.any()
        again = whole and self._captured and self._backend.recurs
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

        hidden_TD, expert_TL = self._again(asked, fill) if again else self._once(plans, asked, fill)
        logits_DRV = self.head(hidden_TD[index_DR]) if asked.where else hidden_TD[:0]
        # Rows of drafts that a sequence lacks count as its own: their positions are run again before they are committed.
        spans = [slice(a, a + n) for a, n in zip(first_S.tolist(), clean_S.tolist(), strict=True)] if asked.routed else []
        return Pass(hidden_TD, first_D, clean_S[asked.where] - lead_D, logits_DRV, expert_TL, spans, also)

    def _once(
        self, plans: Sequence[DecodeRows], asked: Asked, fill: Fill | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_TD of every row, whatever each sequence runs, and the experts if they are wanted."""
        layout = decode(plans, self._policy.mask_token_id)
        view = self._cache.view(asked.held, layout)
        routing = Routing([], []) if asked.routed else None
        layout, plan = self._backend.prepare(layout, view)
        if fill is not None:
            fill(layout.token_T)
        hidden_TD = self._backend.forward(layout, plan, view, routing)
        return hidden_TD, None if routing is None else torch.stack(routing.expert_LT, dim=1)

    def _again(self, asked: Asked, fill: Fill | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same where every sequence runs the full rows. The shape is one of few: sequences are padded to a `bucket`, the
        table of pages to a power of two."""
        rows, held = asked.full, asked.held
        sequences, width = bucket(len(held)), 1 << (max(1, *(len(each.pages) for each in held)) - 1).bit_length()
        key = len(rows.clean), rows.proposals, rows.block_length, sequences, width, batch_invariant(), asked.routed
        shape = self._shapes.pop(key, None)
        if shape is None:
            if len(self._shapes) >= _MOST_SHAPES:  # the one that was used longest ago goes
                self._drop_graph(self._shapes.pop(next(iter(self._shapes))))
            inputs = RecurringInputs(self._policy, self._cache, rows, sequences, width)
            shape = _Shape(self._policy, self._backend, inputs, asked.routed)
        self._shapes[key] = shape
        self._passes += 1
        shape.last = self._passes
        shape.inputs.at(held, asked.start_D, asked.first_D)
        shape.parcel.send()
        if fill is not None:
            fill(shape.parcel.contents[0].token_T)
        return shape.run(self._capture)

    def _capture(self, forward: Callable[[], None]) -> Captured | None:
        """A graph of the forward; None where the device has no graphs, or all that fit were replayed lately."""
        if not self._graphs:
            return None
        budget = self._budget
        idle = (shape for shape in self._shapes.values() if shape.captured and self._passes - shape.last > _LATELY)
        while not budget.has_room and (shape := next(idle, None)) is not None:
            self._drop_graph(shape)
        if budget.has_room:
            return budget.capture(forward, self._memory)
        if not self._warned:
            _log.warning("%d captured graphs take %d MB, which is the bound: other shapes of steps run without a graph",
                         budget.graphs, budget.bytes >> 20)  # fmt: skip
            self._warned = True
        return None

    def _drop_graph(self, shape: _Shape) -> None:
        if shape.captured is not None:
            self._budget.drop(shape.captured)
            shape.captured = None
