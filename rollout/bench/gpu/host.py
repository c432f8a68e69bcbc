"""What a decode step costs the host, on a null device: kernels and graphs do nothing, and all else is the engine's own.

Invariants:
- The policy has ZAYA1-8B's layers, blocks and pages, and few features: what a tensor operation computes takes next to no time.
  Its launch is that of a CPU, which is cheaper than that of a GPU.
- Seconds are CPU time of the thread: it waits for nothing, and a busy machine does not count. What forced acceptance draws for
  itself does not count either.
- Every tensor holds zeros until somebody writes it, as no kernel does. Acceptance is forced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from transformers import ZayaConfig

from ....kernels import graphs, launch
from ....kernels.dispatch import using
from ....kernels.transfer import cpu_apart
from ...planning.roofline import geometric_survival
from ...schedule import Schedule
from ...steps import shapes
from ...steps.captured import Verifier
from ...steps.plan import StepPlan
from .parts import random_policy
from .running import engine_for, measure
from .sizes import FORCED

CONTEXT, BATCHES = 2048, (16, 64)
_NARROW = dict(
    vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, moe_intermediate_size=8,
    num_experts=4, router_hidden_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_hidden_layers=40,
    layer_types=["hybrid"] * 40, diffusion={"block_size": 16, "mask_token_id": 63},
)  # fmt: skip
_SCHEDULE, _WARM, _STEPS = Schedule("fused", levels=(0,)), 5, 25


class _Nothing(list[Any]):
    """Launches that are thrown away."""

    def append(self, _: Any) -> None:
        pass


class _NullGraph:
    def replay(self) -> None:
        pass


class _NullPool:
    def capture(self, call: Callable[[], object]) -> _NullGraph:
        call()
        return _NullGraph()


@contextmanager
def null_device() -> Iterator[None]:
    """Within it a policy on a CPU runs as on a device whose kernels and graphs do nothing."""
    empty, empty_like, new_empty = torch.zeros, torch.zeros_like, torch.Tensor.new_zeros
    with ExitStack() as stack:
        stack.enter_context(using("triton"))
        stack.enter_context(launch.record("gfx942"))
        stack.enter_context(cpu_apart())
        for place, name, value in (
            (launch, "_recording", _Nothing()), (torch, "empty", empty), (torch, "empty_like", empty_like),
            (torch.Tensor, "new_empty", new_empty), (shapes, "can_capture", lambda _: True), (shapes, "GraphPool", _NullPool),
            (graphs, "free_memory", lambda: 0), (torch.cuda, "mem_get_info", lambda _=None: (1 << 36, 1 << 37)),
        ):  # fmt: skip
            stack.enter_context(patch.object(place, name, value))
        yield


def host_seconds(batch: int, captured: bool, context: int = CONTEXT, steps: int = _STEPS, layers: int = 40) -> dict[str, Any]:
    """Median seconds of the host per `fused` step of `batch` samples, each with `context` cached positions."""
    config = ZayaConfig(**{**_NARROW, "num_hidden_layers": layers, "layer_types": ["hybrid"] * layers})
    policy = random_policy(config, torch.float32, torch.device("cpu"))
    schedule = _SCHEDULE.within(policy.block_size)
    with null_device():
        most = (_WARM + steps) * policy.block_size + 2 * (policy.block_size + 1)
        engine = engine_for(policy, schedule, batch, context, most, 32, captured)
        now = _clock_beside(engine.runner.verifier)
        row = measure(engine, geometric_survival(FORCED[-1], policy.block_size)[:1], _WARM, steps, now)
    return {"batch": batch, "context": context, "captured": captured, "schedule": schedule.label,
            **{name: row[name] for name in ("seconds", "fastest", "repeats", "tokens_per_step")}}  # fmt: skip


def _clock_beside(verifier: Verifier) -> Callable[[], float]:
    """The thread's clock, which stands still while the verifier prepares a step."""
    prepare, inside = verifier.prepare, [0.0]

    def timed(plan: StepPlan) -> None:
        start = time.thread_time()
        prepare(plan)
        inside[0] += time.thread_time() - start

    verifier.prepare = timed  # type: ignore[method-assign]
    return lambda: time.thread_time() - inside[0]


def items(dry: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name. `dry`: of a few layers and steps."""
    few: dict[str, int] = {"steps": 3, "layers": 2} if dry else {}
    return {
        f"{'captured' if captured else 'eager'} {batch}": partial(host_seconds, batch, captured, **few)
        for batch in BATCHES for captured in (True, False)
    }  # fmt: skip
