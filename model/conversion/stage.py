"""One stage of a conversion: its packs, its optimiser, its steps, its log.

Invariants:
- What a step computes is a function of the weights before it, the recipe and the step's number. A stage that was killed
  goes on from its last checkpoint, and its losses are bit for bit those of one that was not.
- `packs_per_step` packs make a step, however many processes share them: losses are means over the rows of all packs,
  the gradient's norm and the experts' loads are those of the whole step.
- The log has one line per reported step, and none of a step that a restart will compute again.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError, DataError, InvalidInput
from ...files import append_jsonl, write_atomic
from ...inputs import read_jsonl
from ...seeds import named_generator
from ..experts import Router
from ..layout import TokenLayout, causal, diffusion
from ..policy import Policy, Routing
from .checkpoints import Checkpoints, prepare_states, training_state
from .compare import LossRows
from .config import ConversionConfig, Stage
from .data import Document, PackStream, cut_blocks, learned_targets
from .distributed import Group, clip_gradients, shard
from .objective import PackLosses, Weights, pack_losses

Report = Callable[[dict[str, Any]], None]

_FREE_TO_CHANGE = {"checkpoint_steps", "report_steps", "skip", "repeat"}


@dataclass(frozen=True)
class Pack:
    """One pack, ready for the network.

    Attributes:
        tokens: clean tokens.
        ar_rows: clean rows with a loss.
        draft_rows: mask rows with a loss.
        draft_weight: sum of slot_decay ** slot over them.
    """

    layout: TokenLayout
    target_T: torch.Tensor
    prompts: list[int]
    tokens: int
    ar_rows: int
    draft_rows: int
    draft_weight: float

    @classmethod
    def of(cls, documents: Sequence[Document], stage: Stage, mask_token: int, draw: random.Random) -> Pack:
        """Lay documents out as the stage asks; `draw` places the mask blocks."""
        texts = [d.tokens for d in documents]
        if stage.kind == "ar":
            layout = causal(texts)
            target_T = layout.token_T.roll(-1).masked_fill(layout.sequence_T != layout.sequence_T.roll(-1), -100)
            target_T[-1] = -100
        else:
            layout, target_T = diffusion(texts, [cut_blocks(d, stage, draw) for d in documents], mask_token)
        target_T = learned_targets(target_T, layout, documents)
        prompts = [d.prompt for d in documents]
        rows = LossRows.of(layout, target_T, prompts)
        if not len(rows.clean_R) or (stage.kind == "diffusion" and not len(rows.mask_M)):
            raise DataError("data", f"{len(texts)} document(s) of {sum(map(len, texts))} tokens have nothing to learn in them",
                            "give documents with an answer after their prompt")  # fmt: skip
        weight_M = stage.draft.slot_decay ** rows.slot_M.double()
        return cls(layout, target_T, prompts, sum(map(len, texts)), len(rows.clean_R), len(rows.mask_M), float(weight_M.sum()))


@dataclass(frozen=True)
class Figures:
    """A step's losses (nats per token), overlap of p and q, and clean tokens, over all processes."""

    ar: float
    draft: float
    overlap: float
    tokens: int


def train_stage(
    policy: Policy,
    stage: Stage,
    config: ConversionConfig,
    checkpoints: Checkpoints,
    log: Path,
    group: Group,
    report: Report = lambda _: None,
    parent: Policy | None = None,
) -> None:
    """Train one stage in place, from its last checkpoint if there is one. The policy is sharded where the group is more
    than one process, and so is the parent.

    Args:
        parent: whose p the stage is to keep, where it asks for that; another object than the policy.
        report: called with the figures of each reported step, on the first process.

    Raises:
        ConfigError: the packs of a step cannot be shared out, or the stage's settings are not those of its checkpoint.
        InvalidInput: the loss is no longer finite.
    """
    stage = stage.on(group.device.type)
    if stage.packs_per_step % group.size:
        raise ConfigError(
            f"stages.{stage.name}.packs_per_step", f"{stage.packs_per_step} packs cannot be shared by {group.size} processes",
            f"use a multiple of {group.size}",
        )  # fmt: skip
    compute = torch.bfloat16 if stage.autocast == "bfloat16" else torch.float32
    if parent is not None:
        parent = shard(parent.requires_grad_(False).eval(), group, compute)
    if stage.markov_rank and policy.markov is None:
        policy.add_markov(stage.markov_rank, torch.Generator().manual_seed(config.seed))
    policy.recompute_layers = stage.activation_checkpointing
    shard(policy.train().requires_grad_(True), group, compute)
    optimizer = make_optimizer(policy, stage)
    settings = settings_of(stage, config)
    step = seen = 0
    if (saved := checkpoints.progress()) is not None:
        check_settings(saved["settings"], settings, checkpoints.directory)
        prepare_states(policy, optimizer)
        checkpoints.load(training_state(policy, optimizer))
        step, seen = saved["step"], saved["tokens"]
    if group.first:
        cut_log(log, stage.name, step)
    began, before = time.monotonic(), seen
    places = saved["places"] if saved else None
    stream = PackStream(config.data, policy.tokenizer, stage, group.rank, group.size, places, policy.mask_token_id)
    while seen < stage.tokens:
        own = [lay_out(pack, policy, stage, config) for pack in islice(stream, stage.packs_per_step // group.size)]
        set_rate(optimizer, learning_rate(stage, step, seen))
        figures = train_step(policy, optimizer, stage, own, group, parent)
        if figures is None:
            break
        step, seen = step + 1, seen + figures.tokens
        if not math.isfinite(figures.ar + figures.draft):
            raise InvalidInput(f"stages.{stage.name}.learning_rate", f"the loss is {figures.ar + figures.draft} at step {step}",
                               "lower it; the last checkpoint is as it was")  # fmt: skip
        ended = seen >= stage.tokens
        if group.first and (step % stage.report_steps == 0 or ended):
            row = dict(
                stage=stage.name, step=step, tokens=seen, learning_rate=optimizer.param_groups[0]["lr"],
                ar_loss=figures.ar, draft_loss=figures.draft, overlap=figures.overlap,
                tokens_per_s=round((seen - before) / (time.monotonic() - began)),
            )  # fmt: skip
            append_jsonl(log, row)
            report({**row, "of": stage.tokens})
        if step % stage.checkpoint_steps == 0 and not ended:
            progress = {"step": step, "tokens": seen, "settings": settings, "places": [int(n) for n in group.sum(stream.places)]}
            checkpoints.save(step, training_state(policy, optimizer), progress)


def lay_out(numbered: tuple[int, list[Document]], policy: Policy, stage: Stage, config: ConversionConfig) -> Pack:
    """A pack of the stream, its mask blocks placed by its number."""
    number, documents = numbered
    return Pack.of(documents, stage, policy.mask_token_id, named_generator(config.seed, f"{stage.name}/{number}"))


def train_step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    own: Sequence[Pack],
    group: Group,
    parent: Policy | None = None,
) -> Figures | None:
    """One optimiser step; None, and no step, where the data ended before all processes had their packs.

    Args:
        own: this process's packs.
        parent: the policy whose p is to be kept, if any.
    """
    counts = [(p.ar_rows, p.draft_weight, p.draft_rows, p.tokens, 1) for p in own]
    ar, drafts, draft_rows, tokens, count = group.sum([sum(column) for column in zip(*counts)] or [0] * 5)
    if count < stage.packs_per_step:
        return None
    autocast = stage.on(group.device.type).autocast == "bfloat16"

    def losses_of(pack: Pack, parent: Policy | None = None, routing: Routing | None = None) -> PackLosses:
        with torch.autocast(group.device.type, torch.bfloat16, enabled=autocast):
            layout, target_T = pack.layout.to(group.device), pack.target_T.to(group.device)
            return pack_losses(policy, layout, target_T, pack.prompts, stage.draft, routing, parent)

    optimizer.zero_grad(set_to_none=True)
    figures, loads = [0.0, 0.0, 0.0], None
    over = Weights(ar, drafts)
    # Weights that depend on p and q are known after a forward pass: of one pack, that which is differentiated; of several, whose
    # passes are not all kept, one more without gradient.
    computed = stage.draft.slots != "all" or stage.draft.sampled > 0
    if computed and len(own) > 1:
        with torch.no_grad():
            over = _summed([losses_of(pack).weights for pack in own], group)
    for pack in own:
        routing = Routing([], [])
        losses = losses_of(pack, parent, routing)
        if len(own) == 1:
            over = losses.weights if group.size == 1 else _summed([losses.weights], group)
        losses.share(stage.alpha, stage.draft, over).backward()
        routed = expert_loads(policy, routing)
        loads = routed if loads is None else loads + routed
        means = losses.cross_entropy * pack.ar_rows, losses.nll * pack.draft_rows, losses.overlap * pack.draft_rows
        for i, part in enumerate(means):
            figures[i] += part
    clip_gradients(policy, stage.clip)
    optimizer.step()
    assert loads is not None
    balance(policy, group.sum_tensor(loads), stage.balance_rate)
    ar_sum, draft_sum, overlap_sum = group.sum(figures)
    per_draft = max(draft_rows, 1)
    return Figures(ar_sum / max(ar, 1), draft_sum / per_draft, overlap_sum / per_draft, int(tokens))


def _summed(weights: Sequence[Weights], group: Group) -> Weights:
    """Of all packs of a step."""
    return Weights(*group.sum([sum(column) for column in zip(*map(astuple, weights), strict=True)]))


def make_optimizer(policy: Policy, stage: Stage) -> torch.optim.Optimizer:
    """The stage's optimiser; vectors do not decay."""
    groups = [
        {"params": [p for p in policy.parameters() if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in policy.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.learning_rate, momentum=stage.betas[0], foreach=True)
    return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, eps=stage.epsilon, foreach=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(stage: Stage, step: int, seen: int) -> float:
    """Linear warm-up over steps, times the schedule over the stage's tokens."""
    warm = min(1.0, (step + 1) / max(stage.warmup_steps, 1))
    done = min(1.0, seen / stage.tokens)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[stage.schedule]
    return warm * (stage.final_learning_rate + (stage.learning_rate - stage.final_learning_rate) * left)


def _routers(policy: Policy) -> list[Router]:
    return [module for module in policy.modules() if isinstance(module, Router)]


@torch.no_grad()
def expert_loads(policy: Policy, routing: Routing) -> torch.Tensor:
    """loads_LE: rows that chose each class, by layer. Only the first record of each layer counts: a layer that is computed
    again in the backward pass records its choice again."""
    routers = _routers(policy)
    classes = len(routers[0].balancing_biases)
    return torch.stack([torch.bincount(expert_T, minlength=classes) for expert_T in routing.expert_LT[: len(routers)]])


@torch.no_grad()
def balance(policy: Policy, loads_LE: torch.Tensor, rate: float) -> None:
    """Move the balancing biases of the real experts towards an even load; the skip expert's stays."""
    for router, loads_E in zip(_routers(policy), loads_LE, strict=True):
        load = loads_E.float()[:-1]
        router.balancing_biases[:-1] += rate * torch.sign(load.mean() - load)


def cut_log(log: Path, stage: str, step: int) -> None:
    """Remove the log's lines from the first one of `stage` after `step` on."""
    if not log.is_file():
        return
    kept: list[dict[str, Any]] = []
    for _, row in read_jsonl(log):
        if row["stage"] == stage and row["step"] > step:
            write_atomic(log, "".join(json.dumps(r) + "\n" for r in kept).encode())
            return
        kept.append(row)


def settings_of(stage: Stage, config: ConversionConfig) -> dict[str, Any]:
    """All that the weights a stage leaves depend on, as plain data: its own settings and what it starts from."""
    names = [one.name for one in config.runs]
    place = names.index(stage.name)
    start = names[place - 1] if place else config.parent or config.architecture.model_dump(mode="json")
    settings = stage.model_dump(mode="json", exclude={*_FREE_TO_CHANGE, "data"})
    return {**settings, "seed": config.seed, "data": (stage.data or config.data).model_dump(mode="json"), "start": start}


def check_settings(saved: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Refuse to go on from what other settings made; a setting that did not exist then does not count.

    Args:
        where: what holds the result of `saved`.

    Raises:
        ConfigError: one was changed.
    """
    key = f"stages.{now['name']}"
    before: Any = {**now, **saved}
    after: Any = now
    while before != after and isinstance(before, dict) and isinstance(after, dict):
        name = min(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        key, before, after = f"{key}.{name}", before.get(name), after.get(name)
    if before != after:
        raise ConfigError(key, f"{after!r} is not what {where} was trained with ({before!r})",
                          "put it back, or remove that directory to train the stage from its start")  # fmt: skip
