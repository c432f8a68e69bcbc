"""Reads the weights of a push from a Hugging Face directory.

torch is imported when a directory is read, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import CheckpointError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def directory_weights(directory: str | Path, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """The tensors of `model.safetensors`, or of the shards of `model.safetensors.index.json`, cast to the dtypes that serve.

    Args: expected: name -> (dtype, shape) of every tensor of the policy. A tied head may be there in addition.

    Raises CheckpointError that names the first tensor that is missing, unknown, of another shape or of no float dtype, or
    the file that cannot be read.
    """
    import torch

    from ...model.tensor_files import stored_tensors
    from ...model.weights import all_finite

    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError("weight_dir", f"{str(path)[:200]!r} is no directory of the service's machine",
                              "save the weights where the service can read them")
    stored = stored_tensors(path)
    forms = dict(expected)
    if _HEAD in stored and _HEAD not in expected and _EMBEDDING in expected:
        forms[_HEAD] = expected[_EMBEDDING]
    for what, names in (("lacks", forms.keys() - stored.keys()), ("has the unknown", stored.keys() - forms.keys())):
        if names:
            raise CheckpointError("weight_dir", f"{path} {what} tensor {min(names)!r} ({len(names)} in all)",
                                  "save exactly the policy's tensors; the version before serves on")
    found: dict[str, Any] = {}
    for name, (dtype, shape) in forms.items():
        tensor = stored[name]
        if tensor.shape != tuple(shape) or tensor.dtype is None or not tensor.dtype.is_floating_point:
            raise CheckpointError("weight_dir", f"{name!r} in {path} is {tensor.kind}{list(tensor.shape)}, the policy has "
                                  f"{dtype}{list(shape)}", "save the policy's own shapes; the version before serves on")
        own = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        flat = own.view(-1)
        for first, piece in tensor.pieces():
            flat[first : first + len(piece)] = piece
        if not all_finite(own):
            raise CheckpointError("weight_dir", f"{name!r} in {path} holds numbers that are not finite as {dtype}",
                                  "save finite weights; the version before serves on")
        found[name] = own
    return found
