"""Time on a device, and the ceilings that times are held against.

Invariants:
- A time is the median over repeats of a captured graph, by device events; of the call itself where it cannot be captured, and the
  row says so. On a CPU it is the clock, as it is of an engine's steps (`running`).
- Inputs are random: zeros run faster than data.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ....kernels.graphs import GraphPool
from .sizes import Sizes

Call = Callable[[], object]
_log = logging.getLogger(__name__)


@cache
def graph_pool() -> GraphPool:
    """The memory of every graph of this process, which are replayed one after another."""
    return GraphPool()


def timed(call: Call, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """{"seconds": median, "fastest", "repeats", "captured"}."""
    if device.type != "cuda":
        return _figures([_clock(call) for _ in range(sizes.repeats)], False)
    call()
    torch.cuda.synchronize()
    run, captured = call, False
    try:
        run, captured = graph_pool().capture(call).replay, True
    except RuntimeError as error:  # torch's, of the capture; the call itself ran above
        _log.warning("timed without a graph: %s", " ".join(str(error).split())[:300])
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    repeats = max(sizes.repeats, min(200, int(sizes.seconds / (time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return _figures([begin.elapsed_time(end) / 1e3 for begin, end in events], captured)


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _figures(seconds: list[float], captured: bool) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {"seconds": median, "fastest": min(seconds), "repeats": len(seconds), "captured": captured}


def copy_ceiling(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Bytes read and written per second by torch's copy of a large tensor."""
    source = torch.randn(sizes.copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    row = timed(lambda: target.copy_(source), sizes, device)
    return row | {"copy_bytes_per_s": 2 * 4 * source.numel() / row["seconds"]}


def matmul_ceiling(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """FLOP/s of the library's square matrix product."""
    n = sizes.matmul
    a, b = (torch.randn(n, n, device=device).to(sizes.dtype) for _ in range(2))
    row = timed(lambda: a @ b, sizes, device)
    return row | {"matmul_flops_per_s": 2 * n**3 / row["seconds"], "size": n}


def launch_ceiling(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Seconds that one small kernel of a captured step takes."""
    count = 200 if device.type == "cuda" else 2
    x = torch.randn(1024, device=device)

    def many() -> None:
        for _ in range(count):
            x.mul_(1.0)

    row = timed(many, sizes, device)
    return row | {"seconds_per_launch": row["seconds"] / count}


CEILINGS = {"copy": copy_ceiling, "matmul": matmul_ceiling, "launch": launch_ceiling}
