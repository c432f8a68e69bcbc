"""Forward passes that run again and again: their inputs keep their place, and graphs of them are captured when an engine starts.

Invariants:
- Nothing is captured while requests are served. A pass without a graph runs in a larger one that has one, else eagerly, and gives
  the same.
- Graphs are few, and their memory is bounded. A shape whose capture fails runs eagerly.
- The inputs of a shape lie in one place, which every pass fills again: that is where its graph reads them.

Legend: S sequences, T rows, D hidden size, L layers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence

import torch

from ...kernels.dispatch import batch_invariant
from ...kernels.graphs import Captured, GraphBudget, GraphPool, can_capture, without_garbage_collection
from ...model.backends import Backend
from ...model.layout import DecodeRows
from ...model.policy import Policy, Routing
from ..cache import BlockTable, PagedCache
from .recurring import RecurringInputs, bucket

Fill = Callable[[torch.Tensor], object]
"""Writes the tokens that the host does not know into token_T on the device."""
_MOST_SHAPES = 128
"""Shapes without a graph whose inputs are kept."""
_MOST_GRAPHS = 512
"""A capture takes about a tenth of a second, so these take less than a minute."""
GRAPH_SHARE = 32
"""Graphs take at most 1/32 of the device's memory."""
_PADDING = 2
"""A pass may run in a graph of at most this many times its sequences; with more it is faster eagerly."""
_NARROWEST, _WIDER = 8, 4
"""Pages per sequence of the narrowest graphs, and how much wider the next ones are. A wide table of pages costs a pass little."""
_log = logging.getLogger(__name__)


def captured_sizes(batches: Sequence[int], most_pages: int) -> list[tuple[int, int]]:
    """(sequences, columns of the table of pages) of the passes that are captured, narrow ones first.

    Args:
        batches: sequences of a pass, each rounded up to a `bucket`. most_pages: of a sequence.
    """
    sequences = sorted({bucket(count) for count in batches}, reverse=True)
    widths, widest = [_NARROWEST], power_of_two(most_pages)
    while widths[-1] < widest:
        widths.append(min(widths[-1] * _WIDER, widest))
    return [(count, width) for width in widths for count in sequences]


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below `count`; at least 1."""
    return 1 << (max(count, 1) - 1).bit_length()


class Shape:
    """Passes of one shape.

    Attributes:
        inputs: made on the host by each pass. copy: the same on the device. sequences: S.
        captured: the graph; None where the passes run eagerly. hidden_TH: where the graph leaves its result.
    """

    def __init__(self, policy: Policy, backend: Backend, inputs: RecurringInputs) -> None:
        self._backend, self.inputs = backend, inputs
        self.copy, self.sequences = inputs.pinned_copy(policy.device), len(inputs.layout.start_S)
        self.captured: Captured | None = None
        self.hidden_TH: torch.Tensor | None = None
        self._hidden_TD: torch.Tensor | None = None
        self._expert_TL: torch.Tensor | None = None
        self._drafts: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def forward(self, records: bool = True) -> None:
        """Run the backend on the inputs as they are. A graph always records the experts, so that it serves every batch."""
        layout, plan = self.copy.tree
        routing = Routing([], []) if records else None
        self._hidden_TD = self._backend.forward(layout, plan, self.inputs.view, routing)
        if self.hidden_TH is not None:
            self._hidden_TD = self.hidden_TH.copy_(self._hidden_TD)
        self._expert_TL = None if routing is None else torch.stack(routing.expert_LT, dim=1)

    def start(
        self, tables: Sequence[BlockTable], starts: Sequence[int], first: Sequence[int] | None, draft_SM: torch.Tensor | None
    ) -> None:
        """Replay the graph on these sequences; the result is `hidden_TH`.

        Args:
            draft_SM: int64, tokens of the clean rows behind the first one, of at least S sequences and as many rows; None where
                there are none.
        """
        assert self.captured is not None
        self.inputs.at(tables, starts, first)
        self.copy.send()
        if draft_SM is not None:
            if self._drafts is None or self._drafts[0] is not draft_SM:
                token_SR, clean = self.copy.tree[0].token_T.view(self.sequences, -1), self.inputs.clean
                self._drafts = draft_SM, token_SR[:, 1:clean], draft_SM[: self.sequences, : clean - 1]
            _, rows, waiting = self._drafts
            rows.copy_(waiting)
        self.captured.graph.replay()

    def run(self, records: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_TD, and the experts where they are wanted."""
        if self.captured is None:
            self.forward(records)
        else:
            self.captured.graph.replay()
        hidden_TD, expert_TL = self._hidden_TD, self._expert_TL if records else None
        assert hidden_TD is not None
        if self.captured is None:
            self.forget()
        elif expert_TL is not None:
            expert_TL = expert_TL.clone()  # read after the next graph has run, which may write over this memory
        return hidden_TD, expert_TL

    def forget(self) -> None:
        """Free the results: the memory is the step's, or that of a capture that failed."""
        self._hidden_TD = self._expert_TL = self.hidden_TH = None


class ShapeCache:
    """The shapes of one policy over one cache. Of those without a graph, the one used longest ago makes room for another.

    Attributes:
        budget: of the graphs.
    """

    def __init__(self, policy: Policy, backend: Backend, cache: PagedCache) -> None:
        self._policy, self._backend, self._cache = policy, backend, cache
        self._graphs = can_capture(policy.device)
        total = torch.cuda.mem_get_info(policy.device)[1] if self._graphs else 0
        self.budget = GraphBudget(_MOST_GRAPHS, total // GRAPH_SHARE)
        self._pool: GraphPool | None = None
        self._hidden_TH: torch.Tensor | None = None
        self._captured: dict[Hashable, dict[tuple[int, int], Shape]] = {}
        self._serving: dict[Hashable, Shape | None] = {}
        self._eager: dict[Hashable, Shape] = {}

    def capture(self, passes: Sequence[DecodeRows], sizes: Sequence[tuple[int, int]]) -> None:
        """Capture passes, as many as the budget has room for, and log them. Does nothing where the device has no graphs.

        Args:
            passes: what each sequence runs; the most important ones first. sizes: as of `captured_sizes`.
        """
        if not self._graphs:
            return
        self._pool = self._pool or GraphPool()
        # The first passes count most, but the largest are captured first: their memory then serves the others.
        wanted = {(key_of(rows), *size): (rows, *size) for size in sizes for rows in passes}
        chosen = sorted(list(wanted.values())[: self.budget.most - self.budget.graphs], key=_rows_of, reverse=True)
        self._make_hidden(chosen)
        start, before, failed = time.perf_counter(), self.budget.graphs, 0
        with without_garbage_collection():
            for rows, sequences, width in chosen:
                if not self.budget.has_room:
                    break
                failed += not self._capture(rows, sequences, width)
        _log.log(
            logging.INFO if self.budget.graphs - before == len(wanted) else logging.WARNING,
            "captured %d of %d shapes of decode steps in %.1f s (%d failed): graphs take %d MB of at most %d MB; other "
            "shapes run in larger ones or eagerly", self.budget.graphs - before, len(wanted), time.perf_counter() - start, failed,
            self.budget.bytes >> 20, self.budget.most_bytes >> 20,
        )  # fmt: skip

    def _make_hidden(self, wanted: Sequence[tuple[DecodeRows, int, int]]) -> None:
        """Memory for the results of all graphs: one pass is sampled from before the next one runs."""
        rows = max((_rows_of(each)[0] for each in wanted), default=0)
        if self._hidden_TH is None or len(self._hidden_TH) < rows:
            policy = self._policy
            self._hidden_TH = torch.zeros(rows, policy.config.hidden_size, dtype=policy.dtype, device=policy.device)

    @property
    def pool(self) -> GraphPool:
        """The memory of the graphs; one of them must have been captured."""
        assert self._pool is not None
        return self._pool

    @property
    def captured_sizes(self) -> list[tuple[int, int]]:
        """(sequences, columns of the table of pages) of every graph."""
        return [size for known in self._captured.values() for size in known]

    def with_graphs(self, rows: DecodeRows) -> list[Shape]:
        """The captured shapes of these passes, one for each number of sequences, the largest first."""
        known = self._captured.get(key_of(rows), {})
        by_sequences = {size[0]: known[size] for size in sorted(known, reverse=True)}
        return list(by_sequences.values())

    def captured(self, rows: DecodeRows, tables: Sequence[BlockTable]) -> Shape | None:
        """The graph that serves a pass in which every sequence runs `rows`; None where there is none."""
        width = power_of_two(max(len(table.pages) for table in tables))
        return self._with_graph(key_of(rows), bucket(len(tables)), width)

    def run(
        self, rows: DecodeRows, tables: Sequence[BlockTable], starts: Sequence[int], first: Sequence[int] | None,
        fill: Fill | None, records: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """One pass in which every sequence runs `rows`. Sequences are padded to a `bucket`, the table of pages to a power of two;
        both further where only a larger pass has a graph.

        Args:
            tables: pages of each sequence. starts: position of its first row. first: token of that row; None where only the
                device knows it.
            fill: writes drafts into their rows. records: the experts are wanted.
        Returns: hidden_TD, and expert_TL where experts are wanted.
        """
        sequences, width = bucket(len(tables)), power_of_two(max(len(table.pages) for table in tables))
        key = key_of(rows)
        shape = self._with_graph(key, sequences, width) or self._without_graph(key, rows, sequences, width)
        shape.inputs.at(tables, starts, first)
        shape.copy.send()
        if fill is not None:
            fill(shape.copy.tree[0].token_T)
        return shape.run(records)

    def _with_graph(self, key: Hashable, sequences: int, width: int) -> Shape | None:
        """The smallest shape with a graph that takes the pass; None where there is none."""
        known, whole = self._captured.get(key), (key, sequences, width)
        if known is None:
            return None
        if whole not in self._serving:
            larger = [size for size in known if sequences <= size[0] <= _PADDING * sequences and width <= size[1]]
            self._serving[whole] = known[min(larger)] if larger else None
        return self._serving[whole]

    def _without_graph(self, key: Hashable, rows: DecodeRows, sequences: int, width: int) -> Shape:
        whole = key, sequences, width
        shape = self._eager.pop(whole, None)
        if shape is None:
            if len(self._eager) >= _MOST_SHAPES:
                self._eager.pop(next(iter(self._eager)))
            shape = self._new(rows, sequences, width)
        self._eager[whole] = shape
        return shape

    def _new(self, rows: DecodeRows, sequences: int, width: int) -> Shape:
        inputs = RecurringInputs(self._policy, self._cache, rows, sequences, width)
        return Shape(self._policy, self._backend, inputs)

    def _capture(self, rows: DecodeRows, sequences: int, width: int) -> bool:
        """Capture one shape over padding alone, which writes nothing into the cache; whether that succeeded."""
        assert self._hidden_TH is not None
        shape = self._new(rows, sequences, width)
        shape.hidden_TH = self._hidden_TH[: _rows_of((rows, sequences, width))[0]]
        shape.inputs.at([], [], None)
        shape.copy.send()
        try:
            shape.captured = self.budget.capture(shape.forward, self.pool)
        except RuntimeError as error:  # torch's, of the capture or of memory; an eager pass raises what is wrong with the pass
            shape.forget()
            _log.warning("%d sequences of %s over %d pages run without a graph: %s", sequences, key_of(rows), width,
                         " ".join(str(error).split())[:300])  # fmt: skip
            return False
        self._captured.setdefault(key_of(rows), {})[sequences, width] = shape
        self._serving.clear()
        return True


def key_of(rows: DecodeRows) -> Hashable:
    """What the passes of two decode steps must have in common to share a graph."""
    return len(rows.clean), rows.proposals, rows.block_length, batch_invariant()


def _rows_of(shape: tuple[DecodeRows, int, int]) -> tuple[int, int]:
    rows, sequences, width = shape
    return sequences * (len(rows.clean) + len(rows.proposals) * rows.block_length), width
