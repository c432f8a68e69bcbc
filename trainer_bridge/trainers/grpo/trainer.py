"""The loop of GRPO as a client of the bridge: roll out, reward, update, checkpoint, push.

Invariants:
- Rollouts are touched through `RolloutClient` alone: requests out, trajectories in, one weight version per step back.
- Everything random is drawn from the run's seed and the step's number, and results are used in the order of their ids:
  the same seed gives the same trajectories.
- A step's order is: rollouts, update, checkpoint, push, evaluation, line of metrics, acknowledgement. A run killed
  anywhere in it goes on from the checkpoint to the same trajectories; with `staleness: 1`, to ones of the same
  distribution.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ....errors import DataError
from ....files import append_jsonl
from ....model.policy import Policy
from ....model.scoring import score as score_tokens
from ....model.tasks.task_set import AnyTask, TaskSet
from ....rollout.sample_lines import ROLLOUTS
from ....rollout.types import RolloutRequest, SamplingParams, Trajectory, order_by_id
from ....seeds import named_generator
from ...client import RolloutClient
from .attachment import Attachment
from .checkpoint import NAME, load_checkpoint, save_checkpoint
from .config import GrpoConfig
from .learner import Learner, Progress
from .metrics import METRICS, Row, read_rows, summary, write_rows
from .report import Display
from .rewards import LearningSample, advantages, differing, rewards
from .rollout_log import drop_later, log_groups


class Trainer:
    """One run.

    Args:
        policy: the policy to train, in float32; changed in place.
        client: a client that was made with ack="manual".
        output: the run's directory.
        attachment: how the run appears to its service; its version is known.
        tasks: what prompts and rewards come from.
        start: the starting policy, when the loss has a `kl_weight`.
    """

    def __init__(self, config: GrpoConfig, policy: Policy, client: RolloutClient, output: Path, display: Display,
                 attachment: Attachment, tasks: TaskSet, start: Policy | None = None) -> None:
        self.config, self.policy, self.client, self.output, self.display = config, policy, client, output, display
        assert attachment.version is not None, "the starting policy is pushed first"
        self._prefix, self._base, self._shared = attachment.prefix, attachment.version, bool(attachment.prefix)
        self._source, self._start, self._learner = tasks, start, Learner(policy, config)
        self._tokenizer = policy.tokenizer
        self._done = 0
        self._submitted: dict[int, float] = {}
        self._rows: list[Row] = []

    def resume(self) -> None:
        """Resumes the run in the directory from its checkpoint, or from the start when it has none."""
        row: Row = {}
        if (self.output / NAME).exists():
            self._done, row = load_checkpoint(self.output / NAME, self._learner)
        self._rows = [r for r in read_rows(self.output / METRICS) if r["step"] <= self._done]
        if self._rows and self._rows[0].get("tasks_digest", "") != self._source.digest:
            raise DataError("tasks.source", "its rows are not those that the run began with", "restore them, or start anew")
        write_rows(self.output / METRICS, self._rows)
        drop_later(self.output / ROLLOUTS, self._done)
        self.display.say(f"resuming after step {self._done}")
        self._acknowledge_again()
        if self._done:  # a service that has the version answers at once; one that lost it has waited for it
            self._push(self._done)
        if row and self._rows[-1]["step"] < self._done:
            self._record(row)

    def train(self) -> Row:
        """Makes all remaining steps and measures held-out accuracy before and after; returns the summary."""
        began = time.monotonic()
        if not self._rows:
            digest = {"tasks_digest": self._source.digest} if self._source.digest else {}
            self._record({"step": 0, "weight_version": self._base, **digest})
        for step in range(self._done + 1, self.config.steps + 1):
            row, trajectories = self._step(step)
            self._record(row)
            self.client.acknowledge(trajectories)
        # A shared service counts the samples of others, too.
        figures = self.client.status() | (self.client.delivery if self._shared else {})
        return summary(self.config, self._rows, figures, time.monotonic() - began)

    def _step(self, step: int) -> tuple[Row, list[Trajectory]]:
        """Rolls out, rewards, updates, checkpoints, pushes; returns the step's metrics and the trajectories to
        acknowledge then."""
        began = time.monotonic()
        groups, tokens_per_s = self._roll_out(step)
        if self.config.rollouts.staleness and step < self.config.steps:
            self._submit(step + 1)
        rolled = time.monotonic()
        samples = self._samples(groups)
        progress = self._learner.step(step, samples)
        trained = time.monotonic()
        row = self._metrics(step, groups, samples, progress)
        row["tokens_per_s"] = tokens_per_s
        row["seconds"] = {"rollout": rolled - began, "train": trained - rolled}
        self._log(step, groups[: self.config.log_groups])
        save_checkpoint(self.output / NAME, self._learner, step, row)
        self._push(step)
        row["seconds"]["push"] = time.monotonic() - trained
        return row, [t for group, _ in groups for t in group]

    def _log(self, step: int, groups: Sequence[tuple[list[Trajectory], np.ndarray]]) -> None:
        if groups:
            advantage_GK = advantages(np.stack([r for _, r in groups]), self.config.loss.scale_rewards)
            log_groups(self.output / ROLLOUTS, step, groups, advantage_GK, self._tokenizer, self._prefix)

    def _submit(self, step: int) -> None:
        self._submitted[step] = time.monotonic()
        self.client.submit(self._requests(step, 0))

    def _roll_out(self, step: int) -> tuple[list[tuple[list[Trajectory], np.ndarray]], float]:
        """Per prompt of the step, the group's trajectories and rewards_K; tokens per second since they were
        submitted."""
        options = self.config.tasks
        began = self._submitted.pop(step, time.monotonic())
        groups: list[tuple[list[Trajectory], np.ndarray]] = []
        for batch in range(options.max_generation_batches):
            trajectories = self.client.generate(self._requests(step, batch))
            rewards_GK = rewards(self._source, self._tasks(step, batch), trajectories, self._tokenizer)
            size = options.samples_per_prompt
            groups += [(trajectories[i * size : (i + 1) * size], r) for i, r in enumerate(rewards_GK)]
            if differing(np.stack([r for _, r in groups])).sum() >= options.prompts_per_step:
                break
        tokens = sum(len(t.tokens) for group, _ in groups for t in group)
        return groups, tokens / (time.monotonic() - began)

    def _samples(self, groups: Sequence[tuple[list[Trajectory], np.ndarray]]) -> list[LearningSample]:
        """The samples that the update learns from, whole groups one after the other."""
        rewards_GK = np.stack([r for _, r in groups])
        advantage_GK = advantages(rewards_GK, self.config.loss.scale_rewards)
        used_G = differing(rewards_GK) if self.config.tasks.dynamic_sampling else np.ones(len(groups), dtype=bool)
        chosen = np.flatnonzero(used_G)[: self.config.tasks.prompts_per_step]
        pairs = [(t, float(a)) for g in chosen for t, a in zip(groups[g][0], advantage_GK[g], strict=True) if np.isfinite(a)]
        if self._start is None:
            return [LearningSample(t, a) for t, a in pairs]
        known = score_tokens(self._start, [(t.prompt_tokens, t.tokens) for t, _ in pairs], self.config.rollouts.temperature)
        return [LearningSample(t, a, r) for (t, a), r in zip(pairs, known, strict=True)]

    def _metrics(self, step: int, groups: Sequence[tuple[list[Trajectory], np.ndarray]],
                 samples: Sequence[LearningSample], progress: Progress) -> Row:
        trajectories = [t for group, _ in groups for t in group]
        rewards_GK = np.stack([r for _, r in groups])
        tokens, forwards = sum(len(t.tokens) for t in trajectories), sum(t.forwards for t in trajectories)
        return {
            "step": step,
            "weight_version": self._base + step,
            "reward": float(np.nanmean(rewards_GK)),
            "unrewarded": int(np.isnan(rewards_GK).sum()),
            "groups": len(groups),
            "groups_used": len({sample.trajectory.request_id for sample in samples}),
            "tokens": tokens,
            "forwards": forwards,
            "tokens_per_forward": tokens / max(forwards, 1),
            "answer_tokens": tokens / len(trajectories),
            "entropy": -float(np.concatenate([t.logprobs for t in trajectories]).mean(dtype=np.float64)),
            "staleness": float(np.mean([self._base + step - 1 - v for t in trajectories for v in t.versions])),
            **asdict(progress),
            "trajectories_digest": digest(trajectories, self._prefix),
        }

    def _push(self, step: int) -> None:
        in_flight = self.config.rollouts.in_flight if self.config.rollouts.staleness else "finish"
        self.client.push_weights(self._base + step, self.policy.state_dict(), in_flight=in_flight)

    def _record(self, row: Row) -> None:
        """Append a step's line of metrics, with held-out accuracy where it is due, and show it."""
        trajectories: list[Trajectory] = []
        if self._evaluation_due(row["step"]):
            began = time.monotonic()
            figures, trajectories = self._evaluate(row["step"])
            row = {**row, **figures, "evaluation_seconds": time.monotonic() - began}
        append_jsonl(self.output / METRICS, row)
        self._rows.append(row)
        self.display.row(row)
        self.client.acknowledge(trajectories)

    def _acknowledge_again(self) -> None:
        """Acknowledges the trajectories whose work is on disk. Their acknowledgement may have been lost with the killed
        process."""
        batches = range(self.config.tasks.max_generation_batches if self._done else 0)
        requests = [r for batch in batches for r in self._requests(self._done, batch)]
        if self._rows and "heldout_accuracy" in self._rows[-1]:
            requests += self._heldout(self._rows[-1]["step"])[1]
        self.client.acknowledge(requests)

    def _evaluation_due(self, step: int) -> bool:
        every = self.config.evaluation.every
        return step in (0, self.config.steps) or bool(every and step % every == 0)

    def _evaluate(self, step: int) -> tuple[Row, list[Trajectory]]:
        """Accuracy and mean answer length on the held-out tasks, and the trajectories they were taken from."""
        tasks, requests = self._heldout(step)
        self.display.say(f"measuring {len(tasks)} held-out tasks after step {step}")
        found = self.client.generate(requests)
        figures: Row = {}
        for name, part in (("accuracy", found[: len(tasks)]), ("greedy", found[len(tasks) :])):
            found_N = np.nan_to_num(rewards(self._source, tasks, part, self._tokenizer)[:, 0])  # without a reward: 0
            figures[f"heldout_{name}"] = float(found_N.mean())
            figures[f"heldout_{name}_standard_error"] = float(found_N.std() / len(tasks) ** 0.5)
            figures[f"heldout_{name}_tokens"] = sum(len(t.tokens) for t in part) / len(part)
        return {"heldout_tasks": len(tasks), **figures}, found

    def _heldout(self, step: int) -> tuple[Sequence[AnyTask], list[RolloutRequest]]:
        """The held-out tasks; one request each at the training temperature, then one each at temperature 0."""
        options = self.config.evaluation
        tasks = self._source.heldout(options.tasks, options.seed)
        kinds = (("accuracy", self.config.rollouts.temperature), ("greedy", 0.0))
        return tasks, [self._request(f"heldout-{step:05d}/{name}/{i:05d}", task, f"heldout/{i}", 1, temperature)
                       for name, temperature in kinds for i, task in enumerate(tasks)]  # fmt: skip

    def _tasks(self, step: int, batch: int) -> Sequence[AnyTask]:
        number = (step - 1) * self.config.tasks.max_generation_batches + batch
        return self._source.draw(number, self.config.tasks.prompts_per_step, self._seed(f"tasks/{step}/{batch}"))

    def _requests(self, step: int, batch: int) -> list[RolloutRequest]:
        samples, temperature = self.config.tasks.samples_per_prompt, self.config.rollouts.temperature
        # Numbers are padded, so that the order of ids is the order of tasks.
        names = (f"step-{step:05d}/{batch:02d}/{i:05d}" for i in range(self.config.tasks.prompts_per_step))
        return [self._request(n, t, n, samples, temperature) for n, t in zip(names, self._tasks(step, batch), strict=True)]

    def _request(self, name: str, task: AnyTask, seed: str, samples: int, temperature: float) -> RolloutRequest:
        options = self.config.rollouts
        params = SamplingParams(sampler=options.sampler, temperature=temperature, max_tokens=options.max_tokens)
        prompt = self._source.prompt_tokens(task, self._tokenizer)
        return RolloutRequest(id=self._prefix + name, prompt_tokens=prompt, params=params, seed=self._seed(seed), samples=samples)

    def _seed(self, name: str) -> int:
        return named_generator(self.config.seed, name).getrandbits(62)


def digest(trajectories: Sequence[Trajectory], prefix: str = "") -> str:
    """Hash of every token and log-probability, in the order of ids: equal runs have equal digests. `prefix`: what the ids of
    this run begin with, which is not part of the hash."""
    state = hashlib.blake2b(digest_size=16)
    for trajectory in order_by_id(trajectories):
        state.update(repr((trajectory.request_id.removeprefix(prefix), trajectory.sample)).encode())
        state.update(np.asarray(trajectory.tokens, dtype=np.int64).tobytes())
        state.update(trajectory.logprobs.tobytes())
        state.update(trajectory.behavior_logprobs.tobytes())
    return state.hexdigest()
