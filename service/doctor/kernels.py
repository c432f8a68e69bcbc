"""Each op of `kernels/` on this machine against its reference, on few numbers.

On a GPU the checks are those of `blockroll bench gpu`, with a captured decode step among them. On a CPU, engines run numba and
torch: ops that have numba kernels are compared one by one, the others within a forward pass of a shipped policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from .finding import Finding

_GPU_CHECKS = ("philox", "residual", "experts", "attention", "cca", "verify", "captured", "coupled")


def check() -> Iterator[Finding]:
    """One finding per op."""
    torch.set_num_threads(1)
    checks = _on_gpu() if torch.cuda.is_available() else _ON_CPU
    for name, run in checks.items():
        try:
            worst, limit = run()
        except Exception as error:  # a kernel that does not compile or launch raises anything
            yield Finding(f"kernel {name}", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "fail",
                          "run `blockroll kernels check`; match torch, triton and the driver")  # fmt: skip
            continue
        text = f"differs from its reference by {worst:.1e}, at most {limit:.1e} is allowed"
        if worst <= limit:  # false for NaN
            yield Finding(f"kernel {name}", text)
        else:
            yield Finding(f"kernel {name}", text, "fail",
                          "remove numba's and Triton's caches and run again; do not use this machine while it fails")  # fmt: skip


def _on_gpu() -> dict[str, Callable[[], tuple[float, float]]]:
    from ...rollout.bench.gpu.checks import checked
    from ...rollout.bench.gpu.sizes import DRY

    sizes, device = replace(DRY, dtype=torch.bfloat16), torch.device("cuda")

    def run(name: str) -> tuple[float, float]:
        result = checked(name, sizes, device)
        # Each error of the op has a limit of its own, and `ok` compares them.
        worst = float(result.get("worst", 0.0))
        return (worst, max(worst, 1e-2)) if result["ok"] else (max(worst, 1.0), 1e-2)

    return {name: (lambda name=name: run(name)) for name in _GPU_CHECKS}  # type: ignore[misc]


def _philox() -> tuple[float, float]:
    from ...kernels.philox import numba, reference

    seeds, positions = [2**40 + 17 * i for i in range(8)], list(range(8))
    expected = reference.uniform(torch.tensor(seeds), torch.tensor(positions), 1)
    got = torch.tensor([numba.uniform(seed, position, 1) for seed, position in zip(seeds, positions)], dtype=expected.dtype)
    return float((got - expected).abs().max()), 0.0


def _linear() -> tuple[float, float]:
    import numpy as np

    from ...kernels.linear import numba

    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(9, 128, generator=draw), torch.randn(128, 70, generator=draw)
    out = np.full((9, 70), np.nan, np.float32)
    numba.product(x.numpy(), numba.pack(weight), out)
    return float(np.abs(out - (x.double() @ weight.double()).numpy()).max()), 128 * 2e-6


def _verify() -> tuple[float, float]:
    from ...kernels.verify import numba

    logits = torch.randn(6, 274, generator=torch.Generator().manual_seed(0))
    token = torch.arange(6) * 40
    got = numba.logprobs(logits, token, torch.ones(6))
    expected = logits.double().log_softmax(-1)[torch.arange(6), token]
    return float((got.double() - expected).abs().max()), 1e-5


def _forward() -> tuple[float, float]:
    """CCA, attention, experts and residual, within one pass over the shipped policy: the engine's backend against torch's."""
    from ...model.checkpoint import load_policy
    from ...model.scoring import score
    from ...rollout.engine import Engine
    from ...rollout.types import RolloutRequest, SamplingParams

    asked = RolloutRequest("doctor", (5, 6, 7), SamplingParams(sampler="coupled", max_tokens=24), seed=1)
    [found] = Engine(load_policy("tiny-reasoner"), max_batch=1, schedule="fused").rollout([asked])
    # A float64 policy is served by torch alone.
    [expected] = score(load_policy("tiny-reasoner", "float64"), [(found.prompt_tokens, found.tokens)])
    return float(abs(found.logprobs.astype(float) - expected).max()), 1e-3


_ON_CPU: dict[str, Callable[[], tuple[float, float]]] = {
    "philox": _philox, "linear": _linear, "verify": _verify, "attention, cca, experts, residual": _forward,
}  # fmt: skip
