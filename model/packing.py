"""`packs`: consecutive items in packs of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def packs(items: Iterable[Item], size: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """The items in their order. A pack takes the next item as long as the sizes of its items sum to at most `limit`; an item
    above the limit is a pack of its own."""
    pack: list[Item] = []
    held = 0
    for item in items:
        own = size(item)
        if pack and held + own > limit:
            yield pack
            pack, held = [], 0
        pack.append(item)
        held += own
    if pack:
        yield pack
