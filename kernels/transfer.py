"""Between the host and the device: everything at once, one copy up and one copy down.

Invariants:
- The way up never waits: what is sent lies in pinned memory, which torch's allocator keeps until it has arrived.
- The way down is where the host waits for the device, and the only place.
- On a CPU nothing is copied: both ways give back what they are given.

What is sent is a tree: tensors in tuples, lists, dicts and dataclasses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch

Tree = TypeVar("Tree")
_ALIGNMENT = 16


class Parcel(Generic[Tree]):
    """The tensors of a host tree on an accelerator, side by side in one piece of memory.

    Attributes:
        contents: the tree there. Its tensors stay where they are when the parcel is filled again.
    """

    def __init__(self, tree: Tree, device: torch.device) -> None:
        parts = _unique(tree)
        self._spans: list[tuple[int, int]] = []
        end = 0
        for part in parts:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + part.numel() * part.itemsize
            self._spans.append((start, end))
        self._bytes = self._packed(parts).to(device, non_blocking=True)
        there = [
            self._bytes[start:end].view(part.dtype).view(part.shape)
            for part, (start, end) in zip(parts, self._spans, strict=True)
        ]
        self.contents: Tree = _with(tree, {id(part): copy for part, copy in zip(parts, there, strict=True)})

    def fill(self, tree: Tree) -> None:
        """Replace the values by those of `tree`, which has the parcel's `signature`."""
        self._bytes.copy_(self._packed(_unique(tree)), non_blocking=True)

    def _packed(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        packed = torch.empty(self._spans[-1][1] if parts else 0, dtype=torch.uint8, pin_memory=True)
        into = packed.numpy()
        for part, (start, end) in zip(parts, self._spans, strict=True):
            flat = part.numpy().ravel()
            into[start:end].view(flat.dtype)[:] = flat
        return packed


def upload(tree: Tree, device: torch.device) -> Tree:
    """The tree on `device`. A host tree goes to an accelerator in one copy that is not waited for."""
    parts = _unique(tree)
    if all(part.device == device for part in parts):
        return tree
    if device.type == "cuda" and all(part.device.type == "cpu" for part in parts):
        return Parcel(tree, device).contents
    return _with(tree, {id(part): part.to(device) for part in parts})


def download(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the host. From an accelerator they come in one copy, for which the host waits."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return list(tensors)
    # Wide items first: each then begins at a multiple of its own size.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].itemsize)
    flat = [tensors[i].contiguous().view(-1).view(torch.uint8) for i in order]
    here = torch.cat(flat).cpu().split([len(part) for part in flat])
    out = list(tensors)
    for i, part in zip(order, here, strict=True):
        out[i] = part.view(tensors[i].dtype).view(tensors[i].shape)
    return out


def signature(tree: Any) -> Hashable:
    """Equal for trees that differ in the values of their tensors alone."""
    if isinstance(tree, torch.Tensor):
        return tree.shape, tree.dtype
    if isinstance(tree, dict):
        return tuple((key, signature(value)) for key, value in tree.items())
    if isinstance(tree, tuple | list) or is_dataclass(tree):
        return type(tree), *(signature(part) for part in _branches(tree))
    return tree


def _branches(tree: Any) -> list[Any]:
    if isinstance(tree, tuple | list):
        return list(tree)
    if isinstance(tree, dict):
        return list(tree.values())
    return [getattr(tree, field.name) for field in fields(tree)] if is_dataclass(tree) else []


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    else:
        for branch in _branches(tree):
            yield from _tensors(branch)


def _unique(tree: Any) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in _tensors(tree)}.values())


def _with(tree: Any, copies: dict[int, torch.Tensor]) -> Any:
    """The same tree of other tensors, by the id of those they stand for."""
    if isinstance(tree, torch.Tensor):
        return copies[id(tree)]
    if isinstance(tree, tuple | list):
        return type(tree)(_with(part, copies) for part in tree)
    if isinstance(tree, dict):
        return {key: _with(part, copies) for key, part in tree.items()}
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{field.name: _with(getattr(tree, field.name), copies) for field in fields(tree)})
    return tree
