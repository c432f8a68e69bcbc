"""Where the rows of one pack find their ancestors, and where they are kept.

Invariants: built on the host and moved once; nothing is read back. Tensors are int32, of sizes that depend only on T and
A: a captured step finds new values in the place of old ones.

Legend: T rows, A ancestors (hops + 1), K pool positions, G key heads, D head size, N tail entries, C q/k channels,
W width of the delayed value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

NOTHING = -1
"""In `source_TA`: before the document. In `write_T` and `tail_T`: not kept."""


class Pools(NamedTuple):
    """One layer's cache: k_KGD, v_KGD by position; x_NC and delayed_NW, the tail entries. All contiguous."""

    k: torch.Tensor
    v: torch.Tensor
    x: torch.Tensor
    delayed: torch.Tensor


@dataclass(frozen=True)
class Places:
    """One pack.

    Attributes:
        source_TA: each row and its ancestors, nearest first: a row of the pack, `NOTHING`, or -2 - n for tail entry n.
        write_T: pool position that keeps the row's key and value. tail_T: tail entry that keeps its x and delayed value.
        apart: some row may be kept in a tail entry that another one still reads, so that these writes have to wait.
    """

    source_TA: torch.Tensor
    write_T: torch.Tensor
    tail_T: torch.Tensor
    apart: bool

    @classmethod
    def of(
        cls, source_TA: torch.Tensor, write_T: torch.Tensor, tail_T: torch.Tensor, apart: bool,
        device: torch.device | str,
    ) -> Places:  # fmt: skip
        """From host tensors of any integer type."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.int32).contiguous().to(device)

        return cls(move(source_TA), move(write_T), move(tail_T), apart)
