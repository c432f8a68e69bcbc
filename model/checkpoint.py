"""Reads a policy from a Hugging Face directory, and writes one.

Invariants:
- The tensors on disk carry ZAYA's own names; either library reads what the other wrote. A Markov head's tensors
  (`markov.*`, announced by `diffusion.markov_rank` in config.json) are additional; transformers ignores them.
- A directory is written under another name and renamed when it is complete. Under its own name there is never a half-written
  policy, nor a mix of an older and a newer one. Files that belong to no policy stay.
- Nothing is fetched: a policy is a shipped name or a directory.
- Everything that config.json, the headers and the tokenizer state is checked before a tensor is read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import CheckpointError, InvalidInput, StorageError
from ..files import whole_directory
from .arguments import is_whole, short
from .config import read_config
from .device import resolved
from .policy import Policy
from .rotary import rotary_embedding
from .tensor_files import MAX_SHARD_BYTES, StoredTensor, stored_tensors, write_shards
from .tokenizer_files import read_tokenizer
from .weights import DTYPES, EMBEDDING, HEAD, Comparison

SHIPPED = Path(__file__).parent / "shipped"
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_POLICY_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json",
                 "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                 "merges.txt", "chat_template*")  # fmt: skip


def resolve(name_or_dir: str | os.PathLike[str]) -> Path:
    """The directory of a shipped policy or of a path."""
    shipped = ", ".join(sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))) or "none"
    remedy = f"give one, or a shipped name ({shipped})"
    if not isinstance(name_or_dir, str | os.PathLike):
        raise CheckpointError("policy", f"{short(name_or_dir)} is no name of a directory", remedy)
    for candidate in (Path(name_or_dir), SHIPPED / name_or_dir):
        try:
            if (candidate / "config.json").is_file():
                return candidate
        except OSError as error:  # a name that is too long, a directory that may not be entered
            raise CheckpointError("policy", f"{short(str(name_or_dir))} cannot be read ({error.strerror})", remedy) from error
    raise CheckpointError("policy", f"{short(str(name_or_dir))} is no directory with a config.json", remedy)


def load_policy(
    name_or_dir: str | os.PathLike[str], dtype: str = "float32", device: str | torch.device = "cpu"
) -> Policy:
    """Read a policy. Beside the policy itself, a few megabytes of memory are used: each tensor goes from its file straight to the
    device, in its final dtype.

    Args:
        name_or_dir: a shipped policy's name or a Hugging Face directory of a ZAYA model, converted or not.
        dtype: `float32`, `float64`, `bfloat16` or `float16`, of the parameters. Buffers have at least float32.

    Raises:
        CheckpointError: no such directory, another architecture, a missing, extra or misshapen tensor, a number beyond the
            dtype's range, no such device, or too little memory on it.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError("dtype", f"unknown dtype {short(dtype)}", f"use one of {', '.join(DTYPES)}")
    place = resolved(device)
    directory = resolve(name_or_dir)
    config = read_config(directory)
    stored = stored_tensors(directory)
    layers = len({match[1] for name in stored if (match := _LAYER.match(name))})
    if layers != config.num_hidden_layers:  # found before so many layers are made
        raise CheckpointError("policy", f"{directory} has tensors of {layers} layers, and num_hidden_layers is "
                              f"{config.num_hidden_layers}", "use the config.json that was saved with the weights")  # fmt: skip
    with torch.device("meta"):
        policy = Policy(config)
    compare = Comparison(policy, CheckpointError, "policy", os.fspath(directory))
    compare.names(stored.keys())
    for name, tensor in stored.items():
        compare.form(name, tensor.dtype, tensor.kind, tensor.shape)
    tokenizer = read_tokenizer(directory)
    try:
        _place(policy, DTYPES[dtype], place)
        _fill(policy, stored, compare)
    except torch.OutOfMemoryError as error:
        raise CheckpointError("policy", f"{directory} does not fit into the memory of {place} as {dtype}",
                              "use bfloat16, or a device with more memory") from error  # fmt: skip
    policy.tokenizer = tokenizer
    return policy.requires_grad_(False).eval()


def _place(policy: Policy, dtype: torch.dtype, device: torch.device) -> None:
    """Give a policy without memory its tensors, uninitialised. Buffers, rotary frequencies and balancing biases, have at least
    float32: half a number's digits would turn far positions by radians."""
    wide = torch.promote_types(dtype, torch.float32)
    placed: dict[torch.Tensor, nn.Parameter] = {}  # a tied head stays the embedding
    for module in policy.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in placed:
                placed[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device))
            setattr(module, name, placed[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=wide, device=device))
    policy.model.rotary_emb = rotary_embedding(policy.config).to(device=device, dtype=wide)


@torch.no_grad()
def _fill(policy: Policy, stored: Mapping[str, StoredTensor], compare: Comparison) -> None:
    """Read every tensor into its place, in the order of the files."""
    targets = policy.state_dict()
    for name in sorted(compare.wanted, key=lambda name: (stored[name].path, stored[name].start)):
        flat = targets[name].view(-1)
        for first, piece in stored[name].pieces():
            part = flat[first : first + len(piece)]
            part.copy_(piece)
            compare.finite(name, piece, part)
    if HEAD in stored and HEAD not in compare.wanted:
        for (_, head), (_, embedding) in zip(stored[HEAD].pieces(), stored[EMBEDDING].pieces(), strict=True):
            compare.same_head(head, embedding)


def _ours(name: str) -> bool:
    """Whether a file belongs to a policy, so that an older one must not stay beside newer weights."""
    return any(fnmatch(name, pattern) for pattern in _POLICY_FILES)


def save_policy(
    policy: Policy, directory: str | os.PathLike[str], dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write a policy as a Hugging Face directory that `transformers.AutoModelForCausalLM` loads.

    Args:
        dtype: dtype of the tensors on disk; the policy's own by default. The router's balancing biases stay float32.
        max_shard_bytes: a policy that is larger is written in several files, each of at most this size or of one tensor. One file
            at a time is copied to the host.
    """
    if not isinstance(policy, Policy):
        raise InvalidInput("policy", f"{short(policy)} is no Policy", "give what load_policy returned")
    if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
        raise InvalidInput("dtype", f"unknown dtype {short(dtype)}", f"use one of {', '.join(DTYPES)}")
    if not is_whole(max_shard_bytes) or max_shard_bytes < 1:
        raise InvalidInput("max_shard_bytes", f"{short(max_shard_bytes)} is no number of bytes", "use a whole number from 1")
    target = Path(directory)
    save_as = DTYPES[dtype] if dtype else policy.dtype
    tensors = {}
    for name, tensor in policy.state_dict().items():
        if name.endswith("balancing_biases"):
            # transformers (5.17-5.23) resets the skip expert's bias to -1 on load. The choice of an expert only knows
            # differences of biases, so all are shifted until the skip expert's is -1.
            tensors[name] = (tensor - tensor[-1] - 1.0, tensor.dtype)
        elif not (name == HEAD and policy.config.tie_word_embeddings):
            tensors[name] = (tensor, save_as)
    config = policy.config
    config.diffusion = getattr(config, "diffusion", None)
    if policy.converted:
        config.diffusion = {"block_size": policy.block_size, "mask_token_id": policy.mask_token_id}
        if policy.markov is not None:
            config.diffusion["markov_rank"] = policy.markov.rank
        if policy.draft_temperature != 1:
            config.diffusion["draft_temperature"] = policy.draft_temperature
    config.architectures, config.dtype = ["ZayaForCausalLM"], str(save_as).removeprefix("torch.")
    try:
        with whole_directory(target, _ours) as staging:
            write_shards(tensors, staging, max_shard_bytes)
            config.save_pretrained(staging)
            if policy.tokenizer is not None:
                policy.tokenizer.save_pretrained(staging)
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{target}: the policy could not be written ({error}); free space or choose another place") \
            from error
    return target
