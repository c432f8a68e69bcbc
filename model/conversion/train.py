"""Runs the stages of a conversion.

Invariants:
- A stage starts from the directory the previous one left, so a run that was interrupted and one that was not compute the
  same. A finished stage is not run again; an interrupted one goes on from its last checkpoint. Neither is taken for the
  result of other settings.
- The output directory is replaced at the very end, whole.
- Every process of a group runs this; the first one writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ZayaConfig

from ...errors import ConfigError
from ...files import write_json
from ..checkpoint import load_policy, save_policy
from ..policy import Policy
from ..tokenizer import BOS, EOS, MASK, PAD, train_tokenizer
from .checkpoints import Checkpoints
from .config import ConversionConfig
from .data import texts
from .distributed import joined, whole_policy
from .stage import Report, check_settings, settings_of, train_stage

_RESERVED = re.compile(r"[<\[].*(unused|reserved|mask|pad).*[>\]]", re.IGNORECASE)
"""Names of tokens that no text becomes unless it spells them out."""


def new_policy(config: ConversionConfig) -> Policy:
    """An untrained policy and its tokenizer, learned from the run's data."""
    shape = config.architecture
    tokenizer = train_tokenizer(texts(config.data, 4096), shape.vocab_size)
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta, "partial_rotary_factor": 0.5}
    zaya = ZayaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_experts=shape.experts,
        moe_intermediate_size=shape.expert_size,
        router_hidden_size=shape.router_size,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"hybrid": rope, "hybrid_sliding": rope},
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    zaya.diffusion = {"mask_token_id": MASK, **({"block_size": config.block_size} if config.block_size else {})}
    policy = Policy(zaya).initialise(torch.Generator().manual_seed(config.seed))
    policy.tokenizer = tokenizer
    return policy


def starting_policy(config: ConversionConfig) -> Policy:
    """What the first stage starts from: the parent, or a new policy.

    Raises:
        CheckpointError: the parent is no ZAYA directory.
        ConfigError: no token is known for mask rows.
    """
    if config.parent is None:
        policy = new_policy(config)
    else:
        policy = load_policy(config.parent)
        policy.mask_token_id = _mask_token(policy, config)
    policy.block_size, policy.converted = config.block_size or policy.block_size, True
    policy.draft_temperature = config.draft_temperature or policy.draft_temperature
    return policy


def _mask_token(policy: Policy, config: ConversionConfig) -> int:
    vocabulary, tokenizer, asked = policy.config.vocab_size, policy.tokenizer, config.mask_token
    if asked is None and (tokenizer is None or policy.converted):
        return policy.mask_token_id
    if asked is None and tokenizer.mask_token_id is None:
        raise ConfigError("mask_token", f"the tokenizer of {config.parent} has no mask token", _free_token(policy))
    token: int = tokenizer.mask_token_id if asked is None else asked
    if token >= vocabulary:
        raise ConfigError("mask_token", f"{token} is outside the parent's vocabulary", f"use 0..{vocabulary - 1}")
    if token in policy.eos_token_ids or (tokenizer is not None and not _reserved(tokenizer, token)):
        shown = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
        raise ConfigError("mask_token", f"{token}{shown} is a token of ordinary texts, which a mask row must not look like",
                          _free_token(policy))  # fmt: skip
    return token


def _reserved(tokenizer: Any, token: int) -> bool:
    """Whether no text becomes the token, unless it spells out the token's name: it has no name, or is a special token that marks
    no beginning or end, or is called unused or reserved."""
    if token >= len(tokenizer):
        return True
    if token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return False
    added = tokenizer.added_tokens_decoder.get(token)
    special = token in tokenizer.all_special_ids or (added is not None and added.special)
    return special or _RESERVED.fullmatch(tokenizer.convert_ids_to_tokens(token) or "") is not None


def _free_token(policy: Policy) -> str:
    """What to do for want of a mask token, with an id that can be one where there is any."""
    tokenizer, last = policy.tokenizer, policy.config.vocab_size - 1
    if tokenizer is not None and tokenizer.mask_token_id is not None and _reserved(tokenizer, tokenizer.mask_token_id):
        return f"use {tokenizer.mask_token_id}, the tokenizer's mask token"
    free = next((i for i in range(last, -1, -1) if tokenizer is not None and _reserved(tokenizer, i)), None)
    return f"name an id that no text uses, such as {'one of the unused entries of the vocabulary' if free is None else free}"


def stage_directory(config: ConversionConfig, name: str) -> Path:
    """Where stage `name` leaves its policy, in float32."""
    output = Path(config.output)
    return output.with_name(f"{output.name}.{name}")


def run(
    config: ConversionConfig, report: Report = lambda _: None, before_export: Callable[[], None] = lambda: None
) -> Policy | None:
    """Run every stage and write the policy; returns it, in float32, on the first process.

    Args:
        report: called with the figures of each reported step, on the first process.
        before_export: called on the first process before the output directory is replaced.
    """
    output = Path(config.output)
    log = output.with_name(output.name + ".log.jsonl")
    before: Path | None = None
    unconverted: list[Path | None] = []  # what the first diffusion stage starts from

    def load(directory: Path | None) -> Policy:
        return starting_policy(config) if directory is None else load_policy(directory)

    with joined(config.launcher.timeout_s, config.device) as group:
        workers = config.launcher.workers
        if workers > 1 and group.size != workers:
            raise ConfigError("launcher.workers", f"{workers}, but {group.size} process(es) were started",
                              f"start them with torchrun --nproc-per-node {workers}")  # fmt: skip
        for stage in (stage.on(group.device.type) for stage in config.runs):
            done = stage_directory(config, stage.name)
            if stage.kind == "diffusion" and not unconverted:
                unconverted = [before]
            settings, beside = settings_of(stage, config), done / "stage.json"
            if not (done / "config.json").is_file():
                policy = load(before)
                parent = load(unconverted[0]) if stage.ar_target == "parent" else None
                checkpoints = Checkpoints(done.with_name(f"{done.name}.checkpoints"), group)
                train_stage(policy, stage, config, checkpoints, log, group, report, parent)
                whole = whole_policy(policy, group)
                if whole is not None:
                    write_json(beside, settings)
                    save_policy(whole, done, "float32")
                checkpoints.clear()
                del policy, whole, parent
            elif beside.is_file():
                check_settings(json.loads(beside.read_text()), settings, done)
            before = done
            group.barrier()
        assert before is not None
        if not group.first:
            return None
        policy = load_policy(before)
        before_export()
        save_policy(policy, output, config.save_dtype)
        return policy
