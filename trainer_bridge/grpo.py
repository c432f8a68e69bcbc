"""A small reference GRPO trainer, as a client of the bridge.

Invariants:
- Rollouts are touched through `RolloutClient` alone: requests out, trajectories in, one weight version per step back.
- Everything random is drawn from the run's seed and the step's number, and results are used in the order of their ids:
  the same seed gives the same trajectories.
- The run's directory holds whole files only: config.yaml, metrics.jsonl (a line per step), summary.json and report.png.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import append_jsonl, make_directory, write_atomic, write_json
from ..model.checkpoint import load_policy, save_policy
from ..model.policy import Policy
from ..model.tasks import Task, make_tasks, score
from ..model.tokenizer import encode_prompt
from ..rollout.types import RolloutRequest, SamplingParams, Trajectory, order_by_id
from ..settings import load_yaml
from .client import RolloutClient, connect
from .grpo_config import GrpoConfig
from .grpo_loss import Figures, advantages, pack_loss
from .report import Display, draw_report
from .service import serve


def run(config_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Start a service, train against it, write the run's files; returns the summary."""
    torch.set_num_threads(1)
    config = load_yaml(config_path, GrpoConfig)
    policy = load_policy(config.policy)
    output = make_directory(config.output)
    for name in ("metrics.jsonl", "summary.json", "report.png", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (output / name).unlink(missing_ok=True)
    write_atomic(output / "config.yaml", Path(config_path).read_bytes())
    with Display(config) as display:
        display.say("starting the rollout service")
        with serve(config.policy, config.rollouts, output / "ledger.sqlite") as address:
            with connect(address, client_id="grpo", timeout=120.0) as client:
                trainer = Trainer(config, policy, client, output, display)
                summary = trainer.train()
    write_json(output / "summary.json", summary)
    draw_report(output)
    return summary


class Trainer:
    """One run.

    Args:
        policy: the policy to train, in float32; changed in place.
        client: where rollouts come from and weights go to.
        output: the run's directory.
    """

    def __init__(
        self, config: GrpoConfig, policy: Policy, client: RolloutClient, output: Path, display: Display
    ) -> None:
        self.config, self.policy, self.client, self.output, self.display = config, policy, client, output, display
        self._params = SamplingParams(
            sampler=config.rollouts.sampler,
            temperature=config.rollouts.temperature,
            max_tokens=config.rollouts.max_tokens,
        )
        policy.train().requires_grad_(True)
        options = config.optimizer
        gain = policy.model.norm.weight
        self._rates = [options.learning_rate, options.final_norm_learning_rate or options.learning_rate]
        groups = [[p for p in policy.parameters() if p is not gain], [gain]]
        self._optimizer = torch.optim.AdamW(
            [{"params": params, "lr": rate} for params, rate in zip(groups, self._rates, strict=True)],
            weight_decay=0.0, foreach=True,
        )  # fmt: skip
        self._tokens = self._forwards = 0
        self._seconds = 0.0

    def train(self) -> dict[str, Any]:
        """All steps, with held-out accuracy before and after; returns the summary."""
        began = time.monotonic()
        before = self.evaluate("before")
        for step in range(1, self.config.steps + 1):
            row = self.step(step)
            append_jsonl(self.output / "metrics.jsonl", row)
            self.display.step(row)
        after = self.evaluate("after")
        if self.config.save_policy:
            self.policy.eval()
            save_policy(self.policy, self.output / "policy")
        delivery = self.client.delivery
        return {
            "heldout_accuracy_before": before,
            "heldout_accuracy_after": after,
            "heldout_tasks": self.config.evaluation.tasks,
            "sampler": self.config.rollouts.sampler,
            "actors": self.config.rollouts.actors,
            "steps": self.config.steps,
            "final_weight_version": self.client.version,
            "trajectories": {k: delivery[k] for k in ("requested", "unique", "duplicates", "missing")},
            "tokens_per_forward": self._tokens / max(self._forwards, 1),
            "rollout_tokens_per_s": self._tokens / max(self._seconds, 1e-9),
            "seed": self.config.seed,
            "seconds": time.monotonic() - began,
        }

    def step(self, step: int) -> dict[str, Any]:
        """Roll out, reward, update, push; returns the step's metrics."""
        tasks = self.config.tasks
        chosen = make_tasks("rl", tasks.prompts_per_step, self._seed(f"tasks/{step}"), tasks.families or None)
        began = time.monotonic()
        trajectories = self._roll_out(f"step-{step:05d}", chosen, tasks.samples_per_prompt)
        rolled = time.monotonic()
        rewards = self._rewards(chosen, trajectories, tasks.samples_per_prompt)
        figures, norm = self._update(step, trajectories, advantages(rewards).ravel())
        trained = time.monotonic()
        version = self.client.push_weights(step, self._weights(), in_flight=self.config.rollouts.in_flight)
        pushed = time.monotonic()
        tokens, forwards = (sum(f(t) for t in trajectories) for f in (lambda t: len(t.tokens), lambda t: t.forwards))
        self._tokens, self._forwards = self._tokens + tokens, self._forwards + forwards
        self._seconds += rolled - began
        count = sum(f.tokens for f in figures)
        return {
            "step": step,
            "weight_version": version,
            "reward": float(rewards.mean()),
            "tokens": tokens,
            "tokens_per_s": tokens / (rolled - began),
            "tokens_per_forward": tokens / max(forwards, 1),
            "answer_tokens": tokens / len(trajectories),
            "kl": sum(f.kl for f in figures) / count,
            "clip_fraction": sum(f.clipped for f in figures) / count,
            "draft_overlap": sum(f.overlap * f.tokens for f in figures) / count,
            "gradient_norm": norm,
            "trajectories_digest": digest(trajectories),
            "seconds": {"rollout": rolled - began, "train": trained - rolled, "push": pushed - trained},
        }

    def evaluate(self, name: str) -> float:
        """Accuracy on held-out tasks, one sample each at the training temperature."""
        self.display.say(f"held-out accuracy {name} training")
        options = self.config.evaluation
        tasks = make_tasks("heldout", options.tasks, options.seed, self.config.tasks.families or None)
        accuracy = float(self._rewards(tasks, self._roll_out(f"heldout-{name}", tasks, 1), 1).mean())
        self.display.say(f"held-out accuracy {name} training: {accuracy:.3f} on {len(tasks)} tasks")
        return accuracy

    def _roll_out(self, name: str, tasks: Sequence[Task], samples: int) -> list[Trajectory]:
        # Numbers are padded, so that the order of ids is the order of tasks.
        return self.client.generate(
            RolloutRequest(
                id=f"{name}/{i:05d}",
                prompt_tokens=tuple(encode_prompt(self.policy.tokenizer, task.prompt)),
                params=self._params,
                seed=self._seed(f"{'heldout' if name.startswith('heldout') else name}/{i}"),
                samples=samples,
            )
            for i, task in enumerate(tasks)
        )

    def _rewards(self, tasks: Sequence[Task], trajectories: Sequence[Trajectory], samples: int) -> np.ndarray:
        """rewards[tasks, samples] by the tasks' own verifiers."""
        decode = self.policy.tokenizer.decode
        texts = [decode(t.tokens, skip_special_tokens=True) if t.finish_reason == "stop" else "" for t in trajectories]
        return np.array([score(tasks[i // samples], text) for i, text in enumerate(texts)]).reshape(-1, samples)

    def _update(
        self, step: int, trajectories: Sequence[Trajectory], advantage: np.ndarray
    ) -> tuple[list[Figures], float]:
        """`updates_per_step` optimiser steps over the trajectories, whole groups together."""
        options, figures, norm = self.config.optimizer, [], 0.0
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            warm, left = step / (options.warmup_steps + 1), 1 - (step - 1) / self.config.steps
            group["lr"] = rate * min(1.0, warm) * left
        pairs = [(t, float(a)) for t, a in zip(trajectories, advantage, strict=True)]
        size = -(-len(pairs) // options.updates_per_step)
        for number in range(0, len(pairs), size):
            batch = sorted(pairs[number : number + size], key=lambda p: len(p[0].prompt_tokens) + len(p[0].tokens))
            total = sum(len(t.tokens) for t, _ in batch)
            self._optimizer.zero_grad(set_to_none=True)
            for i, pack in enumerate(_packs(batch, options.pack_rows)):
                draw = random.Random(f"{self.config.seed}/blocks/{step}/{number}/{i}")
                value, figure = pack_loss(
                    self.policy, pack, total, self.config.rollouts.temperature, self.config.loss, draw
                )
                value.backward()
                figures.append(figure)
            norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), options.clip, foreach=True))
            self._optimizer.step()
        return figures, norm

    def _weights(self) -> dict[str, torch.Tensor]:
        tied = self.policy.config.tie_word_embeddings
        return {n: t.detach() for n, t in self.policy.state_dict().items() if not (tied and n == "lm_head.weight")}

    def _seed(self, name: str) -> int:
        return random.Random(f"{self.config.seed}/{name}").getrandbits(62)


def digest(trajectories: Sequence[Trajectory]) -> str:
    """Hash of every token and log-probability, in the order of ids: equal runs have equal digests."""
    state = hashlib.blake2b(digest_size=16)
    for trajectory in order_by_id(trajectories):
        state.update(repr(trajectory.key).encode())
        state.update(np.asarray(trajectory.tokens, dtype=np.int64).tobytes())
        state.update(trajectory.logprobs.tobytes())
        state.update(trajectory.behavior_logprobs.tobytes())
    return state.hexdigest()


def _packs(batch: Sequence[tuple[Trajectory, float]], rows: int) -> list[list[tuple[Trajectory, float]]]:
    packs: list[list[tuple[Trajectory, float]]] = [[]]
    held = 0
    for pair in batch:
        length = len(pair[0].prompt_tokens) + len(pair[0].tokens)
        if packs[-1] and held + length > rows:
            packs.append([])
            held = 0
        packs[-1].append(pair)
        held += length
    return packs
