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
from collections.abc import Callable
from pathlib import Path

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
    zaya.diffusion = {"block_size": config.block_size, "mask_token_id": MASK}
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
    policy.block_size, policy.converted = config.block_size, True
    return policy


def _mask_token(policy: Policy, config: ConversionConfig) -> int:
    vocabulary = policy.config.vocab_size
    if config.mask_token is not None:
        if config.mask_token >= vocabulary:
            raise ConfigError("mask_token", f"{config.mask_token} is outside the parent's vocabulary",
                              f"use 0..{vocabulary - 1}")  # fmt: skip
        return config.mask_token
    if policy.tokenizer is None or policy.converted:
        return policy.mask_token_id
    if policy.tokenizer.mask_token_id is None:
        raise ConfigError("mask_token", f"the tokenizer of {config.parent} has no mask token",
                          "name an id that no text uses, such as one of the vocabulary's unused entries")  # fmt: skip
    return policy.tokenizer.mask_token_id


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

    with joined(config.launcher.timeout_s) as group:
        workers = config.launcher.workers
        if workers > 1 and group.size != workers:
            raise ConfigError("launcher.workers", f"{workers}, but {group.size} process(es) were started",
                              f"start them with torchrun --nproc-per-node {workers}")  # fmt: skip
        for stage in config.runs:
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
