"""Calls captured in CUDA and HIP graphs, which the device then repeats without the host."""

from __future__ import annotations

from collections.abc import Callable
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
