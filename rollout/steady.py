"""A batch that goes on unchanged is scheduled again as it is: a step then costs the host a few operations per sample."""

from __future__ import annotations

from .cache import PagedCache
from .sequence import Sample, SchedulerOutput


def goes_on(latest: SchedulerOutput, running: list[Sample], cache: PagedCache, rows: int) -> bool:
    """Whether all samples that run decoded in the latest step and decode again, and have pages for that, which are reserved.
    Otherwise nothing is reserved.

    Args:
        latest: all its samples still run.
        rows: most positions a decode step writes per sample, the anchor included.
    """
    if latest.prefills or len(latest.decoding) != len(running):
        return False
    size, short, missing = cache.page_size, [], 0
    for sample in latest.decoding:
        table, length = sample.block_table, len(sample.tokens)
        if table is None or table.length != length - 1:
            return False
        left = sample.limit - length + 1
        target = length - 1 + (rows if rows < left else left)
        if target > len(table.pages) * size:
            short.append((table, target))
            missing += cache.pages_for(target) - len(table.pages)
    if missing > cache.free_pages:
        return False
    for table, target in short:
        cache.reserve(table, target)
    return True
