"""Where a policy runs and as what: names of devices and dtypes, resolved once, and the device that kernels are launched on.

A GPU of either maker is `cuda` to torch. Triton launches on torch's current device, wherever the tensors lie, and so do graphs
and their streams: whatever runs a policy does so within `current`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import InvalidInput

NAMES = "auto, cpu, cuda or cuda:N"
_NAME = re.compile(r"auto|cpu|cuda(?::(\d+))?")


def is_name(text: str) -> bool:
    """Whether `resolved` knows the name, on a machine that has the device."""
    return _NAME.fullmatch(text) is not None


def resolved(name: str | torch.device | None) -> torch.device:
    """The device of a name; None is `auto`, which is a GPU where torch sees one. `cuda` is torch's current GPU.

    Raises:
        InvalidInput: an unknown name, or a GPU that is not here.
    """
    text = "auto" if name is None else str(name)
    known = _NAME.fullmatch(text)
    if known is None:
        raise InvalidInput("device", f"{text!r} is unknown", f"use {NAMES}")
    if text == "cpu" or (text == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not seen:
        raise InvalidInput("device", f"{text}, and torch {torch.__version__} sees no GPU here",
                           "use cpu, or a torch for this machine's GPU, or check the visible devices")  # fmt: skip
    index = torch.cuda.current_device() if known[1] is None else int(known[1])
    if index >= seen:
        raise InvalidInput("device", f"{text}, and torch sees {seen} GPU{'s' if seen > 1 else ''} here",
                           f"use cuda:0{f' to cuda:{seen - 1}' if seen > 1 else ''}, or check the visible devices")  # fmt: skip
    return torch.device("cuda", index)


def dtype_on(device: torch.device, dtype: str | None) -> str:
    """The dtype, or what a policy has by default there: bfloat16 on a GPU, float32 on a CPU."""
    return dtype or ("float32" if device.type == "cpu" else "bfloat16")


def placement(device: str | torch.device | None, dtype: str | None) -> tuple[str, torch.device]:
    """dtype and device as `load_policy` takes them. Raises InvalidInput as `resolved` does."""
    where = resolved(device)
    return dtype_on(where, dtype), where


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Within it, kernels are launched on `device`, and graphs are captured there."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
