"""How much memory this machine has for processes. Imports no torch, so that a command can ask before anything is started."""

from __future__ import annotations

import os
import re
from pathlib import Path

_CGROUPS = (("memory.max", "memory.current", "memory.stat", "inactive_file"),
            ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"))
"""Files of the limit, the use, and the statistics that say which part of the use is cache; of version 2, then version 1."""


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes that processes may still take, and all bytes. What the system would give up counts as free.

    Args:
        root: where `proc` and `sys` lie.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (known := _number(root / "proc/meminfo", r"^MemAvailable:\s+(\d+) kB")) is not None:
        free = known * 1024
    for limit_file, use_file, statistics, cache in _CGROUPS:
        folder = root / "sys/fs/cgroup"
        limit, use = _number(folder / limit_file, r"^(\d+)$"), _number(folder / use_file, r"^(\d+)$")
        if limit is not None and use is not None:
            free = min(free, max(limit - use + (_number(folder / statistics, rf"^{cache} (\d+)$") or 0), 0))
    return free, total


def _number(path: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])
