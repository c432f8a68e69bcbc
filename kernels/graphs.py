"""Calls captured in CUDA and HIP graphs, which the device then repeats without the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def capture(call: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of `call`, which has run before (Triton compiles on the first run) and may run again.

    Args:
        pool: memory shared with other graphs (`torch.cuda.graph_pool_handle`): what one of them computed holds until the
            next one is replayed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        call()
    return graph


@dataclass(frozen=True)
class Captured:
    """A graph, and by how many bytes of the device's memory its capture made free memory smaller."""

    graph: torch.cuda.CUDAGraph
    bytes: int


class GraphBudget:
    """A bound on graphs that are kept.

    Args:
        most: how many. most_bytes: memory of the device they may take; the graph that passes it is the last one.

    Attributes:
        graphs, bytes: what those that are kept take.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.graphs = self.bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether one more may be captured."""
        return self.graphs < self.most and self.bytes < self.most_bytes

    def capture(self, call: Callable[[], object], pool: Any = None) -> Captured:
        """As `capture`; the graph counts until it is dropped."""
        before = free_memory()
        graph = capture(call, pool)
        captured = Captured(graph, max(before - free_memory(), 0))
        self.graphs, self.bytes = self.graphs + 1, self.bytes + captured.bytes
        return captured

    def drop(self, captured: Captured) -> None:
        """The graph is not kept any more."""
        self.graphs, self.bytes = self.graphs - 1, self.bytes - captured.bytes


def free_memory() -> int:
    """Bytes of the device that nobody has taken, once what was asked of it is done."""
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]
