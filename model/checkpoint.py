"""Reads a policy from a Hugging Face directory, and writes one.

Invariants:
- The tensors on disk carry ZAYA's own names; either library reads what the other wrote. A Markov head's tensors
  (`markov.*`, announced by `diffusion.markov_rank` in config.json) are additional; transformers ignores them.
- A directory is written under another name and renamed when it is complete. Under its own name there is never a half-written
  policy, nor a mix of an older and a newer one. Files that belong to no policy stay.
- Nothing is fetched: a policy is a shipped name or a directory.
"""

from __future__ import annotations

import json
import os
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, ZayaConfig

from ..errors import CheckpointError, StorageError
from ..files import whole_directory
from .policy import Policy
from .weights import DTYPES, fitting_tensors

SHIPPED = Path(__file__).parent / "shipped"
_POLICY_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json",
                 "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
                 "merges.txt", "chat_template*")  # fmt: skip


def resolve(name_or_dir: str | os.PathLike[str]) -> Path:
    """The directory of a shipped policy or of a path."""
    for candidate in (Path(name_or_dir), SHIPPED / str(name_or_dir)):
        if os.path.isfile(candidate / "config.json"):  # False for a name that no file can have, too
            return candidate
    shipped = ", ".join(sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))) or "none"
    raise CheckpointError(
        "policy", f"{str(name_or_dir)!r} is no directory with a config.json", f"give one, or a shipped name ({shipped})"
    )


def read_config(directory: Path) -> ZayaConfig:
    """The directory's `ZayaConfig`; CheckpointError for another architecture or a broken file."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError("policy", f"{path} is not JSON ({error})", "restore the file") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "zaya":
        raise CheckpointError("policy", f"{path} describes a {kind!r} model", "use a ZAYA checkpoint (model_type 'zaya')")
    sizes = raw.get("diffusion") or {}
    if not isinstance(sizes, dict) or any(type(size) is not int or size < 0 for size in sizes.values()):
        raise CheckpointError("policy", f"the diffusion section of {path} holds {json.dumps(sizes)}",
                              "give block_size and mask_token_id as whole numbers")  # fmt: skip
    try:
        return ZayaConfig.from_pretrained(directory)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise CheckpointError("policy", f"{path} is no ZAYA configuration ({error})", "restore the file") from error


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("policy", f"{index} is corrupt ({error!r})", "copy the file again") from error
    else:
        files = ["model.safetensors"]
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise CheckpointError("policy", f"{path} is missing", "copy every file of the checkpoint")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError("policy", f"{path} is corrupt ({error})", "copy the file again") from error
    return tensors


def load_policy(
    name_or_dir: str | os.PathLike[str], dtype: str = "float32", device: str | torch.device = "cpu"
) -> Policy:
    """Read a policy.

    Args:
        name_or_dir: a shipped policy's name or a Hugging Face directory of a ZAYA model, converted or not.
        dtype: `float32`, `float64`, `bfloat16` or `float16`.

    Raises:
        CheckpointError: no such directory, another architecture, a missing, extra or misshapen tensor.
    """
    if dtype not in DTYPES:
        raise CheckpointError("dtype", f"unknown dtype {dtype!r}", f"use one of {', '.join(DTYPES)}")
    directory = resolve(name_or_dir)
    config = read_config(directory)
    tensors = _tensors(directory)
    with torch.device("meta"):
        policy = Policy(config)
    tensors = fitting_tensors(policy, tensors, CheckpointError, "policy", os.fspath(directory))
    policy = Policy(config)
    policy.load_state_dict(tensors, strict=False)
    # Buffers are rotary frequencies and balancing biases: half a number's digits would turn far positions by radians.
    policy = policy.to(device=device, dtype=torch.promote_types(DTYPES[dtype], torch.float32))
    for parameter in policy.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    if any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        try:
            policy.tokenizer = AutoTokenizer.from_pretrained(directory)
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise CheckpointError("policy", f"the tokenizer in {directory} cannot be read ({error})",
                                  "copy tokenizer.json and tokenizer_config.json again") from error  # fmt: skip
    return policy.requires_grad_(False).eval()


def _ours(name: str) -> bool:
    """Whether a file belongs to a policy, so that an older one must not stay beside newer weights."""
    return any(fnmatch(name, pattern) for pattern in _POLICY_FILES)


def save_policy(policy: Policy, directory: str | os.PathLike[str], dtype: str | None = None) -> Path:
    """Write a policy as a Hugging Face directory that `transformers.AutoModelForCausalLM` loads.

    Args:
        dtype: dtype of the tensors on disk; the policy's own by default. The router's balancing biases stay float32.
    """
    target = Path(directory)
    save_as = DTYPES[dtype] if dtype else policy.dtype
    tensors = {}
    for name, tensor in policy.state_dict().items():
        if name.endswith("balancing_biases"):
            # transformers (5.17-5.23) resets the skip expert's bias to -1 on load. The choice of an expert only knows
            # differences of biases, so all are shifted until the skip expert's is -1.
            tensors[name] = (tensor - tensor[-1] - 1.0).cpu().contiguous()
        elif not (name == "lm_head.weight" and policy.config.tie_word_embeddings):
            tensors[name] = tensor.detach().cpu().to(save_as).contiguous()
    config = policy.config
    config.diffusion = getattr(config, "diffusion", None)
    if policy.converted:
        config.diffusion = {"block_size": policy.block_size, "mask_token_id": policy.mask_token_id}
        if policy.markov is not None:
            config.diffusion["markov_rank"] = policy.markov.rank
    config.architectures, config.dtype = ["ZayaForCausalLM"], str(save_as).removeprefix("torch.")
    try:
        with whole_directory(target, _ours) as staging:
            save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(staging)
            if policy.tokenizer is not None:
                policy.tokenizer.save_pretrained(staging)
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{target}: the policy could not be written ({error}); free space or choose another place") \
            from error
    return target
