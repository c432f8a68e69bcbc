"""Numbers as tables and their conclusions write them."""

from __future__ import annotations

from collections.abc import Iterable

NEAR = 16
"""Batch that a one-line conclusion speaks of: the nearest one that was measured or predicted."""


def kibi(count: int) -> str:
    """A context's length: 2048 as 2k, 100 as 100."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def span(values: Iterable[float], digits: int = 1) -> str:
    """The smallest and the largest of some numbers; one number where both look alike."""
    ordered = sorted(values)
    low, high = f"{ordered[0]:.{digits}f}", f"{ordered[-1]:.{digits}f}"
    return low if low == high else f"{low}-{high}"


def nearest(batches: Iterable[int]) -> int:
    """The batch that is nearest to NEAR, as a factor."""
    return min(batches, key=lambda batch: (max(batch / NEAR, NEAR / batch), batch))
