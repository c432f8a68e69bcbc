"""Block tables: pages come behind others, and what somebody holds of a table never changes."""

from __future__ import annotations

from blockroll.model.checkpoint import load_policy
from blockroll.rollout.cache import PagedCache


def test_tables_that_share_a_past_grow_apart():
    cache = PagedCache(load_policy("tiny-reasoner", "float32"), 64, 4, 4, 3)
    first = cache.open()
    assert cache.reserve(first, 4 * 5)
    first.length, held, pages = 4 * 5, first.pages, first.pages.tolist()
    second = cache.fork(first)
    assert second is not None and second.pages.tolist() == pages
    for positions in range(4 * 5, 4 * 40, 4):  # past the room that a table has at first
        assert cache.reserve(first, positions if positions < 4 * 20 else 4 * 20) and cache.reserve(second, positions)
    assert held.tolist() == first.pages[:5].tolist() == second.pages[:5].tolist() == pages
    own, other = first.pages[5:].tolist(), second.pages[5:].tolist()
    assert (len(own), len(other)) == (15, 34) and not {*own} & {*other} and not {*own, *other} & {*pages}
    cache.release(first)
    assert cache.free_pages == 64 - 39 and second.pages[:5].tolist() == pages
    cache.release(second)
    assert cache.free_pages == 64 and not any(cache._users)
