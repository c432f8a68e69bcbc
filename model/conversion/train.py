"""Runs the stages of a conversion.

Invariants: a stage starts from the weights the previous one left; a stage that was finished is not run again, an
interrupted one goes on from its last checkpoint; the log has one line per reported step.
"""

from __future__ import annotations

import copy
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import ZayaConfig

from ...files import append_jsonl
from ..checkpoint import load_policy, save_policy
from ..experts import Router
from ..layout import causal, diffusion
from ..policy import Policy, Routing
from ..tasks import make_tasks
from ..tokenizer import BOS, EOS, MASK, PAD, train_tokenizer
from .config import ConversionConfig, Stage
from .data import cut_blocks, packs
from .objective import Losses, objective

Report = Callable[[dict[str, Any]], None]


def new_policy(config: ConversionConfig) -> Policy:
    """An untrained policy and its tokenizer, learned from the training split."""
    shape = config.architecture
    sample = make_tasks("train", 4096, seed=config.data.seed, only=config.data.families or None)
    tokenizer = train_tokenizer((t.prompt + t.completion for t in sample), shape.vocab_size)
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


def run(config: ConversionConfig, report: Report = lambda _: None) -> Policy:
    """Run every stage and write the policy.

    Args:
        report: called with the figures of each reported step.
    """
    output = Path(config.output)
    if config.parent is None:
        policy = new_policy(config)
    else:
        policy = load_policy(config.parent)
        mask = policy.mask_token_id if policy.tokenizer is None else policy.tokenizer.mask_token_id
        policy.mask_token_id = policy.mask_token_id if mask is None else mask
    policy.block_size, policy.converted = config.block_size, True
    for stage in config.stages:
        done = output.with_name(output.name + f".{stage.name}")
        if (done / "config.json").is_file():
            tokenizer, policy = policy.tokenizer, load_policy(done)
            policy.tokenizer = policy.tokenizer or tokenizer
            continue
        train_stage(policy, stage, config, output, report)
        save_policy(policy, done, "float32")
    policy.requires_grad_(False).eval()
    save_policy(policy, output, config.save_dtype)
    return policy


def train_stage(policy: Policy, stage: Stage, config: ConversionConfig, output: Path, report: Report) -> None:
    """Train one stage in place, resuming from its checkpoint if there is one."""
    parent = copy.deepcopy(policy).requires_grad_(False).eval() if stage.ar_target == "parent" else None
    policy.train().requires_grad_(True)
    decayed = [p for p in policy.parameters() if p.ndim > 1]
    others = [p for p in policy.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=stage.learning_rate,
        betas=(0.9, 0.98),
        foreach=True,
    )
    checkpoint = output.with_name(output.name + f".{stage.name}.checkpoint.pt")
    seen = step = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        seen, step = saved["seen"], saved["step"]
    began, before = time.monotonic(), seen
    for number, pack in enumerate(packs(config.data, policy.tokenizer, stage)):
        if seen >= stage.tokens:
            break
        if number < step:
            continue
        rate = learning_rate(stage, step, seen)
        for group in optimizer.param_groups:
            group["lr"] = rate
        draw = random.Random(f"{config.seed}/{stage.name}/{number}")
        losses = train_step(policy, optimizer, stage, pack, draw, parent)
        seen, step = seen + sum(len(d.tokens) for d in pack), step + 1
        if step % 20 == 0 or seen >= stage.tokens:
            speed = (seen - before) / (time.monotonic() - began)
            row = dict(stage=stage.name, step=step, tokens=seen, learning_rate=rate, ar_loss=losses.ar,
                       draft_loss=losses.draft, overlap=losses.overlap, tokens_per_s=round(speed))
            append_jsonl(output.with_name(output.name + ".log.jsonl"), row)
            report({**row, "of": stage.tokens})
        if step % 500 == 0:
            state = dict(policy=policy.state_dict(), optimizer=optimizer.state_dict(), seen=seen, step=step)
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            os.replace(partial, checkpoint)
    checkpoint.unlink(missing_ok=True)


def learning_rate(stage: Stage, step: int, seen: int) -> float:
    """Linear warm-up, then a cosine over the stage's tokens."""
    warm = min(1.0, (step + 1) / max(stage.warmup_steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, seen / stage.tokens)))
    return warm * (stage.final_learning_rate + (stage.learning_rate - stage.final_learning_rate) * cosine)


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    pack: list,
    draw: random.Random,
    parent: Policy | None = None,
) -> Losses:
    """One optimiser step over one pack; `parent` is the policy whose p is to be kept, if any."""
    texts = [d.tokens for d in pack]
    if stage.kind == "ar":
        layout = causal(texts)
        target_T = layout.token_T.roll(-1).masked_fill(layout.sequence_T != layout.sequence_T.roll(-1), -100)
        target_T[-1] = -100
    else:
        layout, target_T = diffusion(texts, [cut_blocks(d, stage, draw) for d in pack], policy.mask_token_id)
    routing = Routing([], [])
    with torch.autocast("cpu", torch.bfloat16, enabled=stage.autocast == "bfloat16"):
        prompts = [d.prompt for d in pack]
        losses = objective(policy, layout, target_T, prompts, stage.alpha, stage.draft, routing, parent)
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), stage.clip, foreach=True)
    optimizer.step()
    balance(policy, routing, stage.balance_rate)
    return losses


@torch.no_grad()
def balance(policy: Policy, routing: Routing, rate: float) -> None:
    """Move the balancing biases of the real experts towards an even load; the skip expert's stays."""
    routers = [module for module in policy.modules() if isinstance(module, Router)]
    for router, expert_T in zip(routers, routing.expert_LT, strict=True):
        biases = router.balancing_biases
        load = torch.bincount(expert_T, minlength=len(biases)).float()[:-1]
        biases[:-1] += rate * torch.sign(load.mean() - load)
