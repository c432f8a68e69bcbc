"""What a service needs to know of a policy before an engine loads it. Reads small parts of files, without torch."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..model import shipped
from ..rollout.page_sizes import page_bytes

_ENDS = 1 << 20
"""Bytes of a weight file's beginning and end that its identity is made of. A training step changes nearly every number."""
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_TAPS = 2
"""Of each CCA convolution, as transformers has it where config.json does not say."""


def find(policy: str) -> Path:
    """The directory of a shipped policy or of a path. Raises CheckpointError where there is none."""
    folder = Path(next(iter(shipped.__path__)))
    for candidate in (Path(policy), folder / policy):
        if (candidate / "config.json").is_file():
            return candidate
    names = ", ".join(sorted(path.parent.name for path in folder.glob("*/config.json")))
    raise CheckpointError("policy", f"{policy!r} is no directory with a config.json", f"give one, or a shipped name ({names})")


def identity(directory: Path) -> str:
    """A digest by which two policies differ: of config.json and of the beginning, the end and the size of each weight file."""
    state = hashlib.blake2b(digest_size=16)
    state.update((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            state.update(f"{path.name} {size}".encode())
            state.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            state.update(file.read())
    return state.hexdigest()


def pool_bytes(directory: Path, dtype: str, pages: int | None, page_size: int, batch: int) -> int:
    """Bytes of an engine's K/V pool, the CCA tails in its pages included. `pages` None: as the engine sizes it for `batch`.

    Raises CheckpointError for a config.json that lacks the sizes."""
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        page = page_bytes(
            layers=config["num_hidden_layers"], heads=config["num_attention_heads"], groups=config["num_key_value_heads"],
            head_dim=config["head_dim"], hops=config.get("cca_time0", _TAPS) + config.get("cca_time1", _TAPS) - 2,
            page_size=page_size, itemsize=_BYTES[dtype])
        longest = min(512, config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("policy", f"{directory / 'config.json'} does not say how large the policy is ({error!r})",
                              "restore the file") from error
    return (pages or batch * -(-longest // page_size)) * page


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
