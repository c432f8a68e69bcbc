"""Whether a clean row of the packed backend depends on its prefix alone, and products under which it does not.

Run as a program, it prints what holds under the settings of its environment as one line of JSON: `forced`, the product that
runs; `library`, as of `library_differs`; `differing`, by random policy; `planted`, the same with projections by the library."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from blockroll.kernels.linear import numba as linear
from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.layout import CLEAN, DecodeRows, causal, decode
from blockroll.model.policy import Policy
from blockroll.rollout.cache import PagedCache

KINDS = [{"head_dim": 16}, {"head_dim": 64, "attention_bias": True}, {"head_dim": 16, "cca_time0": 3}]
_LENGTHS = 61, 9, 30, 2, 1, 3
_ALONE = [[[(s, 1, ())]] * _LENGTHS[s] for s in (0, 1, 3)]
_CHUNKS = [[(0, count, ())] for count in (2, 3, 1, 5, 4, 17, 29)]
_MIXED = [
    [(2, 13, ()), (0, 30, ()), (3, 1, ()), (4, 1, ())], [(2, 4, (1, 3)), (0, 1, (1,)), (1, 8, ())],
    [(3, 1, (1,)), (2, 1, ()), (0, 30, (2,)), (5, 3, ())], [(2, 12, ()), (1, 1, (1,))],
]  # fmt: skip


@torch.inference_mode()
def differing(policy: Policy) -> list[str]:
    """Names of the ways to compute clean rows whose logits differ in a bit from those of each text in a pass of its own."""
    packed = PackedBackend(policy)
    draw = np.random.default_rng(1)
    texts = [draw.integers(0, 40, count).tolist() for count in _LENGTHS]
    expected = [packed.head(packed.forward(*packed.prepare(causal([text])))) for text in texts]
    together = packed.head(packed.forward(*packed.prepare(causal(texts))))
    plain = policy.head(policy(causal(texts)))
    assert (together - plain).abs().max() < 2e-5 * plain.abs().max()

    def run(steps: list[list[tuple[int, int, tuple[int, ...]]]]) -> bool:
        """Steps of (text, rows, proposals): whether each clean row has the logits expected of it."""
        cache = PagedCache(policy, 40, 4, len(texts), 80)
        held, done, equal = [cache.open() for _ in texts], [0] * len(texts), True
        for step in steps:
            plans = []
            for s, count, proposals in step:
                plans.append(DecodeRows(texts[s][done[s] : done[s] + count], done[s], proposals, 5 if proposals else 0))
                assert cache.reserve(held[s], done[s] + count)
            layout = decode(plans, policy.mask_token_id)
            view = cache.view([held[s] for s, *_ in step], layout)
            logits = packed.head(packed.forward(*packed.prepare(layout, view), view))
            for number, (s, *_) in enumerate(step):
                got = logits[(layout.sequence_T == number) & (layout.block_T == CLEAN)]
                equal = equal and torch.equal(got, expected[s][done[s] : done[s] + len(got)])
                done[s] += len(got)
        return equal

    ways = {f"row by row, text {steps[0][0][0]}": steps for steps in _ALONE} | {"in chunks": _CHUNKS, "mixed": _MIXED}
    found = [name for name, steps in ways.items() if not run(steps)]
    return found if torch.equal(together, torch.cat(expected)) else ["together", *found]


@contextmanager
def multiplied_by(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Projections and heads through `multiply` of x_TD and w_DF, in place of the product in one order."""

    def product(x_TD: np.ndarray, panels_PDW: np.ndarray, out_TF: np.ndarray) -> None:
        weight_DF = torch.from_numpy(panels_PDW).transpose(0, 1).flatten(1)[:, : out_TF.shape[1]].contiguous()
        out_TF[:] = multiply(torch.from_numpy(x_TD), weight_DF).numpy()

    own, linear.product = linear.product, product
    try:
        yield
    finally:
        linear.product = own


def by_the_library(x_TD: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
    """As if no product had a single row, which is not enough."""
    return torch.mm(x_TD.expand(max(len(x_TD), 2), -1), weight_DF)[: len(x_TD)]


def few_rows_backwards(x_TD: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
    """A product that adds up 1 to 3 rows in another order, as libraries do: the summed features from the last to the first."""
    order = torch.arange(x_TD.shape[1]) if len(x_TD) > 3 else torch.arange(x_TD.shape[1]).flip(0)
    total = torch.zeros(len(x_TD), weight_DF.shape[1])
    for d in order.tolist():
        total += x_TD[:, d, None] * weight_DF[d]
    return total


def library_differs() -> list[int]:
    """Numbers of rows, up to 16, in which torch's product gives a row other bits than among 64."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 128, generator=draw), torch.randn(128, 448, generator=draw)
    among = torch.mm(x, weight)
    return [count for count in range(1, 17) if not torch.equal(torch.mm(x[:count], weight), among[:count])]


if __name__ == "__main__":
    from random_zaya import randomise, zaya_config

    torch.set_num_threads(1)
    policies = [Policy(zaya_config(**kind)).requires_grad_(False) for kind in KINDS]
    for policy in policies:
        randomise(policy, 4)
    found = {"forced": linear.name(), "library": library_differs(), "differing": [differing(p) for p in policies]}
    wide = Policy(zaya_config(hidden_size=128, head_dim=32)).requires_grad_(False)  # whose sums are long enough
    randomise(wide, 4)
    with multiplied_by(by_the_library):
        found["planted"] = differing(wide)
    print(json.dumps(found))
