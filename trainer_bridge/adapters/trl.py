"""TRL's GRPOTrainer on rollouts of a service.

    with blockroll.connect(ADDRESS) as client:
        trainer = GRPOTrainer(client, model=load_model(POLICY), reward_funcs=..., args=GRPOConfig(...), train_dataset=...)
        trainer.train()

Invariants:
- Rollouts are made by the weights that TRL is about to train: they are pushed before the first rollout of each optimiser step,
  and after the last step. Every token's version is checked.
- TRL is given the log-probability of the distribution that each token was really drawn from. Its importance weight, exp(log p of
  its own forward pass - that), corrects for cut-offs and for the sampler `mixed`, and is 1 on policy otherwise.
- The seed of a sample depends on the trainer's seed, the step, the process and the sample's number. No two samples share one.

What is changed in TRL: nothing in its modules. A trainer is told of the rollouts by `rollout_func`, and after its construction by
four attributes, because `use_vllm=True` would make its constructor import vLLM: `vllm_generation` (an object whose
`sync_weights` TRL calls), `use_vllm = True` and `vllm_mode = "server"` (so that TRL calls it, and corrects by the recorded
log-probabilities), `_last_loaded_step = -1` (so that the first step pushes). `GRPOTrainer` is a subclass that adds the draft loss
to `compute_loss`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import trl
from transformers import TrainerCallback

from ...errors import InvalidInput, TransportError
from ...rollout.params import SamplerName
from ...rollout.types import RolloutRequest, Trajectory
from ...seeds import derived_seed
from ..client import RolloutClient
from ..trainers.grpo.config import DraftTraining as DraftTraining
from .draft_loss import DraftLossMixin
from .policy_model import PolicyModel
from .policy_model import load_model as load_model
from .samples import prompt_tokens, reward_fields, sampling_params
from .weight_sync import WeightSync


class Rollouts:
    """What a `trl.GRPOTrainer` needs of a service: give it as `rollout_func`, then call `attach`.

    Args:
        client: of this process; each process of a distributed run makes its own.
        sampler: with `ar` and `coupled` a run repeats.
        timeout: seconds without a trajectory after which a rollout fails; None for as long as the gateway answers.
        dtype: of the service's parameters, where that is not the trainer's.

    Attributes:
        version: the weight version that TRL's weights serve as; None before the first push.
    """

    def __init__(self, client: RolloutClient, sampler: SamplerName = "coupled", timeout: float | None = None,
                 dtype: str | None = None) -> None:
        self._client, self._sampler, self._timeout = client, sampler, timeout
        self._sync = WeightSync(client, dtype)
        self._run = uuid.uuid4().hex[:12]
        self._calls = 0
        self._trainer: Any = None
        self.version: int | None = None

    def attach(self, trainer: trl.GRPOTrainer) -> None:
        """Has the trainer push its weights before each step's rollouts, and correct by the recorded log-probabilities."""
        if trainer.use_vllm:
            raise InvalidInput("args.use_vllm", "True", "leave it at False; the service makes the rollouts")
        if trainer.args.generation_kwargs:
            raise InvalidInput("args.generation_kwargs", f"{trainer.args.generation_kwargs}", "leave it out; use the arguments "
                               "temperature, top_p, top_k, min_p and repetition_penalty")
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise InvalidInput("trainer", "its parameters are sharded", "train on one device, or with DDP")
        if not isinstance(trainer.accelerator.unwrap_model(trainer.model), PolicyModel):
            raise InvalidInput("model", "no PolicyModel", "give load_model(policy)")
        self._trainer = trainer
        trainer.vllm_generation, trainer.vllm_mode, trainer.use_vllm = self, "server", True
        trainer._last_loaded_step = -1
        trainer.add_callback(_LastPush(self))

    def sync_weights(self) -> None:
        """Pushes the trainer's weights; returns in every process when every engine has them."""
        accelerator = self._trainer.accelerator
        policy = accelerator.unwrap_model(self._trainer.model).policy
        if accelerator.is_main_process:
            buffers = dict(policy.named_buffers())
            state = policy.state_dict()
            self._sync.push({name: t for name, t in state.items() if name not in buffers},
                            {name: t for name, t in state.items() if name in buffers})
        accelerator.wait_for_everyone()
        self.version = int(self._client.status()["version"])

    def __call__(self, prompts: Sequence[Any], trainer: trl.GRPOTrainer) -> dict[str, Any]:
        """One completion for each prompt, as TRL's `rollout_func` returns them. Prompts come repeated, once per sample."""
        tokenizer, template = trainer.processing_class, trainer.chat_template_kwargs
        found = self._roll_out([prompt_tokens(tokenizer, prompt, template) for prompt in prompts])
        return {
            "prompt_ids": [list(t.prompt_tokens) for t in found],
            "completion_ids": [list(t.tokens) for t in found],
            "logprobs": [t.behavior_logprobs.tolist() for t in found],
            **reward_fields(found),
        }

    def generate(self, prompts: Sequence[Sequence[int]], images: Any = None, num_generations: int = 1,
                 profiler: Any = None) -> tuple[list[list[int]], list[list[int]], list[list[list[float]]], None]:
        """As the method of TRL's `VLLMGeneration`, which TRL calls for turns after a tool call, and where it has no
        `rollout_func`."""
        if images is not None and any(images):
            raise InvalidInput("images", "given", "the policy reads text alone")
        found = self._roll_out([tuple(prompt) for prompt in prompts])
        return ([list(t.prompt_tokens) for t in found], [list(t.tokens) for t in found],
                [[[value] for value in t.behavior_logprobs.tolist()] for t in found], None)

    def _roll_out(self, prompts: Sequence[tuple[int, ...]]) -> list[Trajectory]:
        """A trajectory for each prompt, in their order. Equal prompts that follow each other are the group of one request, whose
        prompt the engine computes once."""
        trainer = self._trainer
        if trainer is None:
            raise InvalidInput("rollout_func", "not attached", "call attach(trainer) once the trainer is made")
        began, self._calls = time.monotonic(), self._calls + 1
        params = sampling_params(trainer, self._sampler)
        mode = "train" if trainer.model.training else "eval"
        place = f"{mode}-{trainer.state.global_step:06d}-{self._calls:06d}-{trainer.accelerator.process_index}"
        groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts)]
        requests = [
            RolloutRequest(id=f"{self._run}/{place}/{i:05d}", prompt_tokens=prompt, params=params, samples=samples,
                           seed=derived_seed(trainer.args.seed, f"{place}/{i}"))
            for i, (prompt, samples) in enumerate(groups)
        ]  # fmt: skip
        found = self._client.generate(requests, self._timeout)
        self._check_versions(found)
        tokens, forwards = sum(len(t.tokens) for t in found), sum(t.forwards for t in found)
        trainer._log_metric("rollout/tokens_per_forward", tokens / max(forwards, 1))
        trainer._log_metric("rollout/seconds", time.monotonic() - began)
        if self.version is not None:
            trainer._log_metric("rollout/weight_version", self.version)
        return found

    def _check_versions(self, found: Sequence[Trajectory]) -> None:
        if self.version is not None and (others := {int(v) for t in found for v in t.versions} - {self.version}):
            raise TransportError(f"the service answered with weight version {min(others)} in place of {self.version}: another "
                                 "trainer pushes to it; give each trainer a service of its own")


class _LastPush(TrainerCallback):
    """Pushes the weights of the last step, so that the service serves the policy that training has made."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._rollouts.sync_weights()


class GRPOTrainer(DraftLossMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose rollouts a service makes, and whose drafts follow the policy.

    Args:
        client: of the service; see `Rollouts`, which takes `sampler`, `timeout` and `dtype`.
        drafts: the draft loss.
        model: `load_model(policy)`. Further arguments are TRL's own.

    Attributes:
        rollouts: the connection to the service.
    """

    def __init__(self, client: RolloutClient, *, model: PolicyModel, sampler: SamplerName = "coupled",
                 timeout: float | None = None, dtype: str | None = None, drafts: DraftTraining | None = None,
                 **options: Any) -> None:
        self.rollouts = Rollouts(client, sampler, timeout, dtype)
        options.setdefault("processing_class", model.policy.tokenizer)
        super().__init__(model=model, rollout_func=self.rollouts, drafts=drafts, **options)
        self.rollouts.attach(self)
