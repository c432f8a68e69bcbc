"""Steps whose samples are those of the step before: the host works out nothing twice."""

from __future__ import annotations

from collections.abc import Sequence

from .cache import PagedCache
from .sequence import Sample, SchedulerOutput


def steady(latest: SchedulerOutput | None, running: Sequence[Sample], cache: PagedCache, rows: int) -> SchedulerOutput | None:
    """`latest` again, where all running samples decoded in it and go on, and the cache has the pages they lack, which are
    reserved; else None, and nothing is reserved.

    Args:
        latest: what the scheduler gave last.
        rows: most positions a decode step writes per sample, the anchor included.
    """
    if latest is None or latest.prefills or set(latest.decoding) != set(running):
        return None
    size, short, missing = cache.page_size, [], 0
    for sample in latest.decoding:
        table, length = sample.block_table, len(sample.tokens)
        if table is None or table.length != length - 1:
            return None
        left = sample.limit - length + 1
        target = length - 1 + (rows if rows < left else left)
        if target > len(table.pages) * size:
            short.append((table, target))
            missing += cache.pages_for(target) - len(table.pages)
    if missing > cache.free_pages:
        return None
    for table, target in short:
        cache.reserve(table, target)
    return latest
