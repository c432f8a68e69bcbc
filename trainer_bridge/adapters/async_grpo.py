"""TRL's AsyncGRPOTrainer on rollouts of a service.

    with blockroll.connect(ADDRESS) as client:
        trainer = AsyncGRPOTrainer(client, model=POLICY, reward_funcs=..., args=AsyncGRPOConfig(...), train_dataset=...)
        trainer.train()

Invariants:
- A weight version commits between two decode steps. Samples in flight go on under it, each token with its version.
- A sample's old log-probabilities are those it was drawn with. Its `model_version` is the oldest version among its tokens.
- At most `max_inflight_tasks` samples are in the engines or wait to be trained on, so few become too old.
- An exception of the worker's thread, a reward function's too, is raised in the trainer.

What is changed in TRL: one function, `get_peak_flops_per_device` in the trainer's module, is replaced while a trainer is
constructed on a machine without CUDA, because it asks for the name of a CUDA device. The rest is what TRL documents:
`rollout_worker`, `weight_transfer`, and a path to load the model from, which `model_directory` writes. `AsyncGRPOTrainer` is a
subclass that adds the draft loss to `compute_loss`, and sets `token_budget` where it is None, because TRL would ask a vLLM server
for it.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.experimental import async_grpo
from trl.experimental.async_grpo import async_grpo_trainer
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from ...errors import InvalidInput, TransportError
from ...rollout.params import SamplerName
from ...rollout.types import RolloutRequest, Trajectory
from ...seeds import derived_seed
from ..client import RolloutClient
from ..trainers.grpo.config import DraftTraining as DraftTraining
from .draft_loss import DraftLossMixin
from .policy_model import PolicyModel, load_tokenizer, model_directory
from .samples import (
    Prompt,
    advantages,
    completion,
    name_of,
    prompt_tokens,
    reward,
    reward_fields,
    sampling_params,
)
from .weight_sync import WeightSync

_WAIT_S = 0.01
"""Seconds between two looks at a queue that is full."""
_STOP_S = 30.0
"""Seconds that the worker's thread is given to end."""
_OWN = ("prompt", "completion", "completion_ids")
"""Columns of a data set that reward functions are not given as such."""


@dataclass
class _Group:
    """Samples of one prompt that are on their way."""

    number: int
    prompt: Prompt
    row: dict[str, Any]
    found: list[Trajectory] = field(default_factory=list)


class RolloutWorker:
    """TRL's `RolloutWorkerProtocol`: keeps prompts in the engines and scores what comes back, in a thread of this process.

    Args:
        client: not used by anyone else for `results` while the worker runs.
        dataset: rows with a `prompt`; other columns go to the reward functions, which get `samples.reward_fields` too.
        args: the trainer's `AsyncGRPOConfig`.
    """

    def __init__(self, client: RolloutClient, dataset: Any, reward_funcs: Sequence[Callable[..., Any]] | Callable[..., Any],
                 tokenizer: Any, args: async_grpo.AsyncGRPOConfig, sampler: SamplerName = "coupled") -> None:
        self._client, self._dataset, self._tokenizer, self._args = client, dataset, tokenizer, args
        self._rewards = list(reward_funcs) if isinstance(reward_funcs, Sequence) else [reward_funcs]
        if not self._rewards:
            raise InvalidInput("reward_funcs", "empty", "give at least one reward function")
        self._params = sampling_params(args, sampler)
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue(maxsize=args.queue_maxsize)
        self.metrics_queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self._run, self._rows, self._groups = uuid.uuid4().hex[:12], self._repeated(), dict[str, _Group]()
        self._before_first: int | None = None
        self._stop, self._failed, self._seen = threading.Event(), list[BaseException](), time.monotonic()
        self._thread = threading.Thread(target=self._work, name="blockroll-rollouts", daemon=True)

    def start(self) -> None:
        """Begins. The weights of the first version serve."""
        self._seen = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Cancels what is in flight and ends the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._client.cancel(list(self._groups))  # ends the wait for results
            self._thread.join(_STOP_S)

    def update_model_version(self, model_version: int) -> None:
        """TRL's number of the version that serves now. The service has a number of its own, which differs by a constant."""
        self._before_first = self._client.version - model_version

    def check_health(self, stale_after_s: float) -> None:
        """Raises what has ended the thread, or TransportError when nothing has arrived for so many seconds."""
        if self._failed:
            raise self._failed[0]
        if (quiet := time.monotonic() - self._seen) > stale_after_s:
            raise TransportError(f"no rollout has arrived for {quiet:.0f} s, and heartbeat_stale_after_s is {stale_after_s:.0f}; "
                                 "look at `blockroll status`")

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                self._submit()
                for trajectory in self._client.results():
                    if self._stop.is_set():
                        break
                    self._seen = time.monotonic()
                    group = self._groups.get(trajectory.request_id)
                    if group is None:
                        continue  # an earlier worker of this client asked for it
                    group.found.append(trajectory)
                    if len(group.found) == self._args.num_generations:
                        self._deliver(self._groups.pop(trajectory.request_id))
                    self._submit()
                self._stop.wait(_WAIT_S)  # the queue is full: nothing is in the engines
            self._client.cancel(list(self._groups))
        except BaseException as error:
            self._failed.append(error)

    def _submit(self) -> None:
        """Sends prompts until as many samples are on their way as there may be."""
        size, requests = self._args.num_generations, []
        while not self._stop.is_set():
            waiting = len(self._groups) * size + self.rollout_buffer.qsize()
            if waiting and waiting + size > max(self._args.max_inflight_tasks, size):
                break
            number, row = next(self._rows)
            name = f"{self._run}/{number:08d}"
            self._groups[name] = _Group(number, row["prompt"], row)
            requests.append(RolloutRequest(
                id=name, prompt_tokens=prompt_tokens(self._tokenizer, row["prompt"], self._args.chat_template_kwargs),
                params=self._params, samples=size, seed=derived_seed(self._args.seed, f"group/{number}")))  # fmt: skip
        if requests:
            self._client.submit(requests)

    def _repeated(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows of the data set, again and again, with the number of their group."""
        numbers, before = count(), -1
        while True:
            number = before
            for row in self._dataset:
                number = next(numbers)
                yield number, row
            if number == before:
                raise InvalidInput("train_dataset", "has no rows", "give rows with a column `prompt`")
            before = number

    def _deliver(self, group: _Group) -> None:
        """Scores a group and hands it to the trainer, once the trainer's queue has room."""
        found = sorted(group.found, key=lambda t: t.sample)
        texts = [completion(self._tokenizer, group.prompt, t.tokens) for t in found]
        columns = {name: [value] * len(found) for name, value in group.row.items() if name not in _OWN}
        given = {"prompts": [group.prompt] * len(found), "completions": texts, "completion_ids": [list(t.tokens) for t in found],
                 **columns, **reward_fields(found)}  # fmt: skip
        scores_FK = np.stack([reward(function, given, len(found)) for function in self._rewards])
        unscored_K = np.isnan(scores_FK).all(axis=0)
        rewards_K = np.where(unscored_K, np.nan, np.nansum(scores_FK, axis=0))
        spread = float(np.nanstd(rewards_K)) if not unscored_K.all() else float("nan")
        for i, (trajectory, advantage) in enumerate(zip(found, advantages(rewards_K), strict=True)):
            named = {f"rewards/{name_of(f)}": float(s) for f, s in zip(self._rewards, scores_FK[:, i], strict=True)}
            metrics = {"reward": float(rewards_K[i]), "reward_std": spread, **named}
            self._put(self._sample(trajectory, group, texts[i], float(advantage), metrics))
        tokens, forwards = sum(len(t.tokens) for t in found), sum(t.forwards for t in found)
        self.metrics_queue.put({"rollout/tokens_per_forward": (float(tokens), float(forwards))})

    def _sample(self, trajectory: Trajectory, group: _Group, text: Any, advantage: float,
                metrics: dict[str, float]) -> RolloutSample:
        prompt, answer = trajectory.prompt_tokens, trajectory.tokens
        old = np.concatenate([np.zeros(len(prompt), np.float32), trajectory.behavior_logprobs])
        assert self._before_first is not None, "weights are pushed before rollouts begin"
        return RolloutSample(
            prompt=group.prompt, completion=text, input_ids=np.array([*prompt, *answer], np.int64),
            completion_mask=np.repeat([0, 1], [len(prompt), len(answer)]), old_log_probs=old, advantage=advantage,
            model_version=int(trajectory.versions.min()) - self._before_first, group_id=group.number, metrics=metrics,
        )  # fmt: skip

    def _put(self, sample: RolloutSample) -> None:
        while not self._stop.is_set():
            sample.enqueued_at = time.time()
            try:
                return self.rollout_buffer.put_nowait(sample)
            except queue.Full:
                self._seen = time.monotonic()
                self._stop.wait(_WAIT_S)


class WeightTransfer:
    """TRL's `WeightTransferProtocol`: pushes each version that TRL sends. `pause` and `resume` do nothing, since engines take a
    version between two decode steps.

    Args:
        dtype: of the service's parameters, where that is not the trainer's.
        in_flight: what a commit does to unfinished samples, as in `push_weights`.
    """

    def __init__(self, client: RolloutClient, dtype: str | None = None, in_flight: str = "keep") -> None:
        self._sync = WeightSync(client, dtype, in_flight)
        self._buffers: dict[str, torch.Tensor] | None = None

    def attach(self, model: PolicyModel) -> None:
        """The model whose parameters TRL sends; its buffers, which training leaves as they are, come from here."""
        policy = model.policy
        kept = policy.state_dict()
        self._buffers = {name: tensor for name, tensor in policy.named_buffers() if name in kept}

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Makes these parameters the next version; returns when every engine has it."""
        if self._buffers is None:
            raise InvalidInput("weight_transfer", "not attached", "call attach(model) once the trainer is made")
        self._sync.push(dict(iterator), self._buffers)

    def init_weight_transfer(self) -> None:
        """Nothing: the client is connected."""

    def pause(self) -> None:
        """Nothing: engines decode on until the commit."""

    def resume(self) -> None:
        """Nothing."""

    def destroy(self) -> None:
        """Nothing: the client belongs to the caller."""


@contextmanager
def _without_cuda() -> Iterator[None]:
    """TRL's trainer can be constructed on a machine without CUDA; it then logs no share of the device's peak."""
    if torch.cuda.is_available():
        yield
        return
    kept = async_grpo_trainer.get_peak_flops_per_device
    async_grpo_trainer.get_peak_flops_per_device = lambda accelerator, dtype: None
    try:
        yield
    finally:
        async_grpo_trainer.get_peak_flops_per_device = kept


class AsyncGRPOTrainer(DraftLossMixin, async_grpo.AsyncGRPOTrainer):
    """`AsyncGRPOTrainer` of TRL whose rollouts a service makes while it trains, and whose drafts follow the policy.

    Args:
        client: of the service.
        model: a shipped policy or a policy's directory; `args.output_dir` gets a directory `policy_reference` that names it.
        sampler, in_flight, dtype: see `RolloutWorker` and `WeightTransfer`.
        drafts: the draft loss. Further arguments are TRL's own.
    """

    def __init__(self, client: RolloutClient, *, model: str, reward_funcs: Any, args: async_grpo.AsyncGRPOConfig,
                 train_dataset: Any, sampler: SamplerName = "coupled", in_flight: str = "keep", dtype: str | None = None,
                 drafts: DraftTraining | None = None, **options: Any) -> None:
        for name in ("tools", "environment_factory", "peft_config"):
            if options.get(name) is not None:
                raise InvalidInput(name, "given", "leave it out; the service samples one turn of the policy itself")
        tokenizer = options.setdefault("processing_class", load_tokenizer(model))
        path = model_directory(model, Path(args.output_dir) / "policy_reference")
        worker = RolloutWorker(client, train_dataset, reward_funcs, tokenizer, args, sampler)
        transfer = WeightTransfer(client, dtype, in_flight)
        with _without_cuda():
            super().__init__(model=str(path), reward_funcs=reward_funcs, args=args, train_dataset=train_dataset,
                             rollout_worker=worker, weight_transfer=transfer, drafts=drafts, **options)  # fmt: skip
        found = self.accelerator.unwrap_model(self.model)
        transfer.attach(found)
        if self.args.token_budget is None:
            self.args.token_budget = found.config.max_position_embeddings
