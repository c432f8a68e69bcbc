"""CUDA and HIP graphs of calls: the device repeats a captured call without the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def capture(call: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of `call`. The call runs twice before the capture, because Triton compiles on the first run.

    Args:
        pool: memory shared with other graphs (`torch.cuda.graph_pool_handle`). The results of one graph are valid until the
            next graph is replayed.
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
    """A graph, and the bytes of device memory that its capture took."""

    graph: torch.cuda.CUDAGraph
    bytes: int


class GraphBudget:
    """A bound on the number and the memory of the graphs that are kept.

    Args:
        most: most graphs. most_bytes: most device memory; the graph that exceeds it is still kept, and is the last one.

    Attributes:
        graphs, bytes: number and memory of the graphs that are kept.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.graphs = self.bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether one more graph may be captured."""
        return self.graphs < self.most and self.bytes < self.most_bytes

    def capture(self, call: Callable[[], object], pool: Any = None) -> Captured:
        """As the function `capture`. The graph counts until `drop`."""
        before = free_memory()
        graph = capture(call, pool)
        captured = Captured(graph, max(before - free_memory(), 0))
        self.graphs, self.bytes = self.graphs + 1, self.bytes + captured.bytes
        return captured

    def drop(self, captured: Captured) -> None:
        """Stop counting a graph that is not kept."""
        self.graphs, self.bytes = self.graphs - 1, self.bytes - captured.bytes


def free_memory() -> int:
    """Free bytes of the device, after all its queued work is done."""
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]
