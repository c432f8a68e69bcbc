"""The check of cut-offs on the device: the sets of a sort, and the same set in a batch and alone."""

from __future__ import annotations

from typing import Any

import torch

from ....kernels import cutoffs
from .sizes import Sizes

_CUTS = ((0, 0.95, 0.0), (40, 1.0, 0.0), (100, 0.8, 0.0), (0, 1.0, 0.05), (0, 0.5, 0.0), (0, 0.999, 0.001))
"""top-k, top-p, min-p."""


def check_cutoffs(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Flat rows, and peaked ones, rounded as bfloat16 rounds, which makes ties."""
    top_k, top_p, min_p = (torch.tensor(column, device=device) for column in zip(*_CUTS, strict=True))
    columns = top_k, top_p.double(), min_p.double()
    logits = torch.randn(len(_CUTS), 1, sizes.zaya.vocab_size, device=device)
    logits[1::2] = (3 * logits[1::2]).bfloat16().float()
    temperature = torch.full((len(_CUTS),), 0.8, dtype=torch.float64, device=device)
    got, expected = (op(logits, temperature, *columns) for op in (cutoffs.edges, cutoffs.reference.edges))
    x = cutoffs.reference.scaled(logits, temperature)
    other = (cutoffs.inside(x, got) != cutoffs.inside(x, expected)).sum(-1)
    rows = [slice(i, i + 1) for i in range(2)]
    alone = [cutoffs.edges(*(each[row] for each in (logits, temperature, *columns))) for row in rows]
    alike = all(torch.equal(part[i], own[0]) for i, each in enumerate(alone) for part, own in zip(got, each, strict=True))
    cutoffs.cut_(logits, temperature, got)
    kept = bool(((logits > -torch.inf) == cutoffs.inside(x, got)).all())
    # The exponential of another library may be a last bit off, which may move a row's edge by a token.
    return {"ok": bool(other.max() <= 1) and alike and kept, "other_tokens": int(other.sum()), "alone_alike": alike, "cut": kept}
