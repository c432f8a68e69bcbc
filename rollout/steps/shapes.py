"""Forward passes that run again and again: their inputs keep their place, and a graph is captured once a shape is frequent.

Invariants:
- Graphs are few, and their memory is bounded. A pass that finds no room for a graph runs eagerly and gives the same.
- The inputs of a shape lie in one place, which every pass fills again: that is where its graph reads them.

Legend: S sequences, T rows, D hidden size, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence

import torch

from ...kernels.dispatch import batch_invariant
from ...kernels.graphs import Captured, GraphBudget
from ...model.backends import Backend
from ...model.layout import DecodeRows
from ...model.policy import Policy, Routing
from ..cache import BlockTable, PagedCache
from .recurring import RecurringInputs, bucket

Fill = Callable[[torch.Tensor], object]
"""Writes the tokens that the host does not know into token_T on the device."""
_OFTEN = 3
"""A shape is captured at its third pass."""
_MOST_SHAPES = 128
"""Shapes whose inputs and graphs are kept."""
_GRAPH_SHARE = 32
"""Graphs take at most 1/32 of the device's memory."""
_LATELY = 2000
"""A graph that was not replayed in this many passes gives its room to another one. All other graphs stay: shapes that take turns
would capture again and again, and a capture takes as long as hundreds of steps."""
_log = logging.getLogger(__name__)


class _Shape:
    """Passes of one shape.

    Attributes:
        inputs: made on the host by each pass. copy: the same on the device.
        captured: the graph, once there is one. last: number of the latest pass of this shape.
    """

    def __init__(self, policy: Policy, backend: Backend, inputs: RecurringInputs, records: bool) -> None:
        self._backend, self.inputs, self._records = backend, inputs, records
        self.copy = inputs.pinned_copy(policy.device)
        self.captured: Captured | None = None
        self.last = self._passes = 0
        self._hidden_TD: torch.Tensor | None = None
        self._expert_TL: torch.Tensor | None = None

    def forward(self) -> None:
        """Run the backend on the inputs as they are."""
        layout, plan = self.copy.tree
        routing = Routing([], []) if self._records else None
        self._hidden_TD = self._backend.forward(layout, plan, self.inputs.view, routing)
        self._expert_TL = None if routing is None else torch.stack(routing.expert_LT, dim=1)

    def run(self, capture: Callable[[Callable[[], None]], Captured | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_TD, and the experts where they are recorded.

        Args:
            capture: gives a graph of a call, or None where there may be no graph.
        """
        self._passes += 1
        if self.captured is None and self._passes >= _OFTEN:
            self.captured = capture(self.forward)
        if self.captured is None:
            self.forward()
        else:
            self.captured.graph.replay()
        hidden_TD, expert_TL = self._hidden_TD, self._expert_TL
        assert hidden_TD is not None
        if self.captured is None:
            self._hidden_TD = self._expert_TL = None  # frees the memory when the step is over
        elif expert_TL is not None:
            expert_TL = expert_TL.clone()  # read after the next graph has run, which may write over this memory
        return hidden_TD, expert_TL


class ShapeCache:
    """The shapes of one policy over one cache. The shape that was used longest ago makes room for a new one."""

    def __init__(self, policy: Policy, backend: Backend, cache: PagedCache) -> None:
        self._policy, self._backend, self._cache = policy, backend, cache
        self._graphs = torch.cuda.is_available() and policy.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self._graphs else None
        total = torch.cuda.get_device_properties(policy.device).total_memory if self._graphs else 0
        self._budget, self._warned = GraphBudget(_MOST_SHAPES, total // _GRAPH_SHARE), False
        self._shapes: dict[Hashable, _Shape] = {}
        self._passes = 0

    def run(
        self, rows: DecodeRows, tables: Sequence[BlockTable], starts: Sequence[int], first: Sequence[int] | None,
        fill: Fill | None, records: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """One pass in which every sequence runs `rows`. Sequences are padded to a `bucket`, the table of pages to a power of two.

        Args:
            tables: pages of each sequence. starts: position of its first row. first: token of that row; None where only the
                device knows it.
            fill: writes drafts into their rows. records: the experts are wanted.
        Returns: hidden_TD, and expert_TL where experts are wanted.
        """
        sequences, width = bucket(len(tables)), 1 << (max(1, *(len(table.pages) for table in tables)) - 1).bit_length()
        key = len(rows.clean), rows.proposals, rows.block_length, sequences, width, batch_invariant(), records
        shape = self._shapes.pop(key, None)
        if shape is None:
            if len(self._shapes) >= _MOST_SHAPES:
                self._drop_graph(self._shapes.pop(next(iter(self._shapes))))
            inputs = RecurringInputs(self._policy, self._cache, rows, sequences, width)
            shape = _Shape(self._policy, self._backend, inputs, records)
        self._shapes[key] = shape
        self._passes += 1
        shape.last = self._passes
        shape.inputs.at(tables, starts, first)
        shape.copy.send()
        if fill is not None:
            fill(shape.copy.tree[0].token_T)
        return shape.run(self._capture)

    def _capture(self, forward: Callable[[], None]) -> Captured | None:
        """A graph of the forward; None where the device has no graphs, or where no graph is idle and the budget is spent."""
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
