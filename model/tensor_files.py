"""Safetensors files of a policy: described without reading their tensors, read tensor by tensor, and written in shards.

Invariants:
- A tensor goes from the file into its place, in its place's dtype and on its device, through the memory of `PIECE` numbers.
  Files are read and not mapped: mapped pages would count as memory of the process until they are given back.
- A name of a file that stands in an index is a name in the same directory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from .arguments import short
from .config import read_json

MAX_SHARD_BYTES = 5 * 10**9
"""Size of a file that `save_policy` writes, unless a single tensor is larger. Hugging Face's hub recommends it."""
PIECE = 1 << 20
"""Numbers read at once: enough for the speed of a disk, few enough to stay in the cache of a core until they are copied."""
MAX_HEADER_BYTES = 16 << 20
"""Largest header of a file. That of ZAYA1-8B has 0.3 MB."""
MAX_INDEX_BYTES = 16 << 20
"""Largest index: it names every tensor once, as a header does."""
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        dtype: None for a dtype that no policy has; `kind` is its name in the file.
        start: offset of its first byte in the file.
    """

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype | None:
        return _DTYPES.get(self.kind)

    def pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The numbers in parts of `PIECE`: the place of the first one, and a flat tensor that the next part overwrites."""
        assert self.dtype is not None
        size, count = self.dtype.itemsize, math.prod(self.shape)
        room = torch.empty(min(PIECE, count) * size, dtype=torch.uint8)
        with _reading(self.path) as file:
            file.seek(self.start)
            for first in range(0, count, PIECE):
                part = room[: min(PIECE, count - first) * size]
                _read_whole(file, part.numpy().data, self.path)
                yield first, part.view(self.dtype)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint's files, by name.

    Raises:
        CheckpointError: a file is missing, corrupt or named outside the directory, or the index and the files disagree.
    """
    index, whole = directory / INDEX, directory / WHOLE
    if not index.is_file():
        return _described(whole)
    files = _indexed(index)
    if whole.is_file():
        raise CheckpointError("policy", f"{directory} has both {WHOLE} and {INDEX}", "remove the one that is not of this policy")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(files.values())):
        found = _described(directory / name)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError("policy", f"{short(twice[0])} is in {tensors[twice[0]].path.name} and in {name} of {directory}",
                                  "export the whole model again")  # fmt: skip
        tensors |= found
    for name, file in files.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError("policy", f"{index} places {short(name)} in {file}, which lacks it", "copy every file again")
    return tensors


def _indexed(index: Path) -> dict[str, str]:
    """The file of each tensor, as the index states it."""
    held = read_json(index, MAX_INDEX_BYTES)
    files: Any = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise CheckpointError("policy", f"{index} is corrupt (no weight_map from tensors to files)", "copy the file again")
    for name in set(files.values()):
        if not _SHARD.fullmatch(name):
            raise CheckpointError("policy", f"{index} names the file {short(name)}",
                                  "name .safetensors files of the same directory, without a path")  # fmt: skip
    return files


def _described(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file."""
    if not path.is_file():
        raise CheckpointError("policy", f"{path} is missing", "copy every file of the checkpoint")
    with _reading(path) as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise CheckpointError("policy", f"{path} is corrupt (its header states {size} bytes)", "copy the file again")
        header = file.read(size)
    try:
        with safe_open(path, framework="pt"):  # compares offsets, shapes and the size of the file
            pass
        entries = json.loads(header)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError("policy", f"{path} is corrupt ({short(str(error))})", "copy the file again") from error
    entries.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
        for name, entry in entries.items()
    }


def _reading(path: Path) -> Any:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise CheckpointError("policy", f"{path} cannot be read ({error.strerror})", "make it readable") from error


def _read_whole(file: Any, room: memoryview, path: Path) -> None:
    """Fill the memory from the file."""
    while room:
        try:
            count = file.readinto(room)
        except OSError as error:
            raise CheckpointError("policy", f"{path} cannot be read ({error.strerror})", "copy the file again") from error
        if not count:
            raise CheckpointError("policy", f"{path} has become shorter while it was read", "copy the file again")
        room = room[count:]


def write_shards(tensors: Mapping[str, tuple[torch.Tensor, torch.dtype]], directory: Path, max_bytes: int) -> None:
    """Write tensors, each cast to a dtype, as `model.safetensors`, or as shards and an index. The host holds one shard at a time.

    Args:
        max_bytes: size of a file, unless a single tensor is larger.
    """
    shards: list[list[str]] = [[]]
    sizes = [0]
    for name, (tensor, dtype) in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and sizes[-1] + size > max_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WHOLE]
    for file, names in zip(files, shards, strict=True):
        here = {name: tensors[name][0].detach().to("cpu", tensors[name][1]).contiguous() for name in names}
        save_file(here, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(places.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + os.linesep)
