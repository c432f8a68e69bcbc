"""CUDA and HIP graphs of calls: the device repeats a captured call without the host.

Invariants:
- Warm-up and capture run on one stream per device, for as long as the process lives. The libraries keep a handle and a workspace
  per stream, and make them at the first product there; on a stream of its own the capture would make them itself.
- No garbage is collected during a capture: it may destroy another graph, which waits for the device, and ends a process on ROCm.
- Other threads may use the device meanwhile (`thread_local`).
- A graph that cannot be captured leaves nothing behind.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_WARM_UP = 2
"""Calls before a capture: Triton compiles in the first, and a library may choose another algorithm in the second."""


@cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def can_capture(device: torch.device) -> bool:
    """Whether the device has graphs."""
    return device.type == "cuda" and torch.cuda.is_available()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collects now, and not again within it. Nests: only the outermost collects."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class GraphPool:
    """Graphs that share their memory, on the device that is current when it is made. The results of one graph are valid until the
    next graph of the pool is replayed, so those who replay them at the same time need a pool each.
    """

    def __init__(self) -> None:
        self._handle = torch.cuda.graph_pool_handle()
        # torch's allocator refuses a pool that lost its last graph; an empty graph keeps it.
        self._keeper = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*graph is empty.*")
            self._record(self._keeper, lambda: None)

    def capture(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of `call`, after calls that warm up.

        Raises: RuntimeError where the call cannot run, or cannot be captured.
        """
        stream, graph = _stream(torch.cuda.current_device()), torch.cuda.CUDAGraph()
        with without_garbage_collection():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            self._record(graph, call)
        return graph

    def _record(self, graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
        stream = _stream(torch.cuda.current_device())
        with without_garbage_collection():
            with torch.cuda.graph(graph, pool=self._handle, stream=stream, capture_error_mode="thread_local"):
                call()


@dataclass(frozen=True)
class Captured:
    """A graph, and the bytes of device memory that its capture took."""

    graph: Any
    bytes: int


class GraphBudget:
    """A bound on the number and the memory of the graphs that are kept.

    Args:
        most: most graphs. most_bytes: most device memory; the graph that exceeds it is still kept, and is the last one.

    Attributes:
        graphs, bytes: number and memory of the graphs so far.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.graphs = self.bytes = 0

    @property
    def has_room(self) -> bool:
        """Whether one more graph may be captured."""
        return self.graphs < self.most and self.bytes < self.most_bytes

    def capture(self, call: Callable[[], object], pool: GraphPool) -> Captured:
        """As `GraphPool.capture`."""
        before = free_memory()
        graph = pool.capture(call)
        captured = Captured(graph, max(before - free_memory(), 0))
        self.graphs, self.bytes = self.graphs + 1, self.bytes + captured.bytes
        return captured


def free_memory() -> int:
    """Free bytes of the current device, after all its queued work is done."""
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]
