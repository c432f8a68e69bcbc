"""Copies between the host and the device: one copy up for a whole tree of tensors, one copy down.

Invariants:
- A copy up never waits: it starts from pinned memory, which torch's allocator keeps until the copy has finished.
- `download` and `Download.wait` make the host wait for the device. Nothing else here does.
- On a CPU nothing is copied: both directions return their arguments.

A tree consists of tensors in tuples, lists, dicts and dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

Tree = TypeVar("Tree")
_ALIGNMENT = 16
_NAMES: dict[type, tuple[str, ...]] = {}
"""Field names by dataclass."""


_apart = False


@contextmanager
def cpu_apart() -> Iterator[None]:
    """Within it a CPU is taken for a device with memory of its own: `PinnedCopy` copies there, from memory that is not pinned.
    For measuring the host's work where there is no device."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


class PinnedCopy(Generic[Tree]):
    """A copy of a host tree on an accelerator, in one piece of memory. On a CPU, the tree itself.

    Args:
        moving: contiguous tensors of the tree whose values `send` copies again; the other tensors keep their values.

    Attributes:
        tree: the tree on the device. Its tensors keep their addresses.
    """

    def __init__(self, tree: Tree, device: torch.device, moving: Sequence[torch.Tensor] = ()) -> None:
        if device.type == "cpu" and not _apart:
            self.tree: Tree = tree
            self._moving: list[tuple[np.ndarray, int, int]] = []
            return
        first = {id(part): part for part in moving}
        parts = [*first.values(), *(part for part in _unique(tree) if id(part) not in first)]
        spans, end = [], 0
        for part in parts:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + part.numel() * part.itemsize
            spans.append((start, end))
        self._moving = [(_bytes(part), *span) for part, span in zip(first.values(), spans)]
        packed = [(_bytes(part), *span) for part, span in zip(parts, spans, strict=True)]
        self._bytes = _packed(packed).to(device, non_blocking=True)
        places = zip(parts, spans, strict=True)
        there = {id(part): self._bytes[start:end].view(part.dtype).view(part.shape) for part, (start, end) in places}
        self.tree = _with(tree, there)

    def send(self) -> None:
        """Copy the present values of the moving tensors to the device."""
        if self._moving:
            self._bytes[: self._moving[-1][2]].copy_(_packed(self._moving), non_blocking=True)


def _packed(parts: Sequence[tuple[np.ndarray, int, int]]) -> torch.Tensor:
    """Pinned memory that holds these bytes, each at its (start, end)."""
    packed = torch.empty(parts[-1][2] if parts else 0, dtype=torch.uint8, pin_memory=not _apart)
    into = packed.numpy()
    for part, start, end in parts:
        into[start:end] = part
    return packed


def _bytes(part: torch.Tensor) -> np.ndarray:
    """The bytes of a host tensor: of its memory where it is contiguous, as it must be to be sent again; else a copy."""
    flat: np.ndarray = part.numpy().ravel()
    return flat.view(np.uint8)


def upload(tree: Tree, device: torch.device) -> Tree:
    """The tree on `device`. A host tree goes to an accelerator in one copy, for which nobody waits."""
    if device.type == "cpu" and not torch.cuda.is_initialized():
        return tree  # nothing can lie elsewhere; the walk over the tree would take longer than small steps of a CPU
    parts = _unique(tree)
    if all(part.device == device for part in parts):
        return tree
    if device.type == "cuda" and all(part.device.type == "cpu" for part in parts):
        return PinnedCopy(tree, device).tree
    return _with(tree, {id(part): part.to(device) for part in parts})


def download(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the host. Tensors of an accelerator come in one copy, for which the host waits."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    return _unpacked(_one_piece(tensors).cpu(), tensors)


class Download:
    """A copy of device tensors on the host, in pinned memory, that is made again and again from the same addresses.

    `pack` and `start` run on the device, and `pack` may be captured. Only `wait` makes the host wait, and it does not wait for
    what was launched after `start`.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._tensors: list[torch.Tensor] = []
        self._packed = self._here = torch.empty(0, dtype=torch.uint8)
        self._parts: list[torch.Tensor] = []
        self._event = None if self._on_cpu else torch.cuda.Event()

    def pack(self, tensors: Sequence[torch.Tensor]) -> None:
        """The tensors that are copied from now on."""
        self._tensors, self._parts = list(tensors), []
        if not self._on_cpu:
            self._packed = _one_piece(tensors)

    def start(self) -> None:
        """Launch the copy. The values of the copy before must have been read."""
        if self._event is not None:
            if self._here.shape != self._packed.shape:
                self._here = torch.empty(self._packed.shape, dtype=torch.uint8, pin_memory=True)
                self._parts = []
            self._here.copy_(self._packed, non_blocking=True)
            self._event.record()

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host; valid until the next `start`."""
        if self._event is None:
            return list(self._tensors)
        self._event.synchronize()
        if not self._parts:
            self._parts = _unpacked(self._here, self._tensors)
        return self._parts


def _wide_first(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Indices, those of wide items first: each tensor then begins at a multiple of its items' size."""
    return sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)


def _one_piece(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The bytes of all of them."""
    return torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in _wide_first(tensors)])


def _unpacked(piece: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors whose bytes `_one_piece` has put together."""
    out, order = list(like), _wide_first(like)
    for i, part in zip(order, piece.split([like[i].numel() * like[i].itemsize for i in order]), strict=True):
        out[i] = part.view(like[i].dtype).view(like[i].shape)
    return out


def _branches(tree: Any) -> Iterable[Any]:
    if isinstance(tree, tuple | list):
        return tree
    if isinstance(tree, dict):
        return tree.values()
    kind = type(tree)
    if kind not in _NAMES:
        _NAMES[kind] = tuple(field.name for field in fields(tree)) if is_dataclass(tree) else ()
    return [getattr(tree, name) for name in _NAMES[kind]]


def _unique(tree: Any) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    waiting = [tree]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            found[id(each)] = each
        else:
            waiting.extend(_branches(each))
    return list(found.values())


def _with(tree: Any, copies: dict[int, torch.Tensor]) -> Any:
    """The same tree with other tensors: `copies` maps the id of a tensor to the tensor that replaces it."""
    if isinstance(tree, torch.Tensor):
        return copies[id(tree)]
    if isinstance(tree, tuple | list):
        return type(tree)(_with(part, copies) for part in tree)
    if isinstance(tree, dict):
        return {key: _with(part, copies) for key, part in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: _with(getattr(tree, field.name), copies) for field in fields(tree)})
    return tree
