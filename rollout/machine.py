"""What a measurement is made with: the part of a figure that its reader cannot guess."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers


def describe(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, cores this process may use, torch threads, the device that runs the policy (None: the CPU), versions and date
    (UTC); nothing that names a host."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu" if device is None or device.type == "cpu" else torch.cuda.get_device_name(device),
        "versions": {
            "blockroll": version("blockroll"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many torch threads, and threads of an engine's passes on a CPU (`placed`); None for as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
