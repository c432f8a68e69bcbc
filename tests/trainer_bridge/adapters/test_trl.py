"""TRL's own trainers against a gateway with a real engine, for two steps each: weights, versions, ratios, rewards, refusals."""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_backend import EngineBackend

pytest.importorskip("trl")

import trl_async
import trl_grpo
from datasets import Dataset
from trl import GRPOConfig
from trl import GRPOTrainer as OwnTrainer

import blockroll
from blockroll.errors import InvalidInput, TransportError
from blockroll.trainer_bridge.adapters.draft_loss import DraftLossMixin
from blockroll.trainer_bridge.adapters.trl import DraftTraining, GRPOTrainer, Rollouts, load_model
from blockroll.trainer_bridge.gateway import Gateway

POLICY = "tiny-reasoner-terse"
EXAMPLES = Path(trl_grpo.__file__).parent


@pytest.fixture(scope="module")
def backend() -> EngineBackend:
    return EngineBackend(POLICY)


@pytest.fixture(scope="module")
def address(backend: EngineBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    gateway = Gateway(backend, "tcp://127.0.0.1:*", tmp_path_factory.mktemp("service") / "ledger.sqlite").start()
    yield gateway.address
    gateway.stop()


def lines(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def test_grpo_trainer_for_two_steps(
    address: str, backend: EngineBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def right(**fields: Any) -> list[float]:
        given.append(fields)
        return reward(**fields)

    reward = trl_grpo.right
    monkeypatch.setattr(trl_grpo, "right", right)
    began = backend.version
    trainer, before, after = trl_grpo.main(address, POLICY, steps=2, heldout=6, prompts=2, output=tmp_path, temperature=0.8)
    # One push before each evaluation and each step, one after the last step; each step's tokens are of its own version.
    assert backend.version == began + 4
    versions = [{v for sample in fields["weight_versions"] for v in sample} for fields in given]
    assert versions == [{began + 2}, {began + 3}]
    for name in ("min", "mean", "max"):
        assert all(abs(x - 1) < 1e-4 for x in lines(trainer, f"sampling/importance_sampling_ratio/{name}"))
    assert 0 < max(lines(trainer, "sampling/sampling_logp_difference/max")) < 1e-4  # computed apart, and equal up to rounding
    assert all(0.3 < x < 1 for x in lines(trainer, "draft/overlap")) and before[1] > 1 and after[1] > 1
    for fields in given:
        assert len(fields["completions"]) == 16 and len(set(map(tuple, fields["completion_ids"]))) > 2
        names = ("completion_ids", "policy_logprobs", "behavior_logprobs")
        for ids, p, behavior in zip(*(fields[name] for name in names), strict=True):
            assert len(ids) == len(p) == len(behavior) and all(math.isfinite(x) for x in p)
    state = backend.engine.policy.state_dict()
    for name, tensor in trainer.model.policy.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert set(trainer.model.state_dict()) == set(state)


def test_async_trainer_for_two_steps(address: str, backend: EngineBackend, tmp_path: Path) -> None:
    began = backend.version
    options = {"heldout": 6, "tokens": 300, "samples": 32, "temperature": 0.8}
    trainer, before, after = trl_async.main(address, POLICY, steps=2, output=tmp_path, **options)
    assert backend.version == began + 1 + 3  # before the evaluation, before the first step, after each step
    first, second = lines(trainer, "ratio")
    assert abs(first - 1) < 1e-4 and 0 < abs(second - 1) < 0.2
    assert lines(trainer, "sample/staleness_max")[0] == 0 and lines(trainer, "sample/staleness_max")[1] >= 1
    assert all(0.3 < x < 1 for x in lines(trainer, "draft/overlap")) and before[1] > 1 and after[1] > 1
    assert all(x > 1 for x in lines(trainer, "batch/packing_ratio"))  # prompts were shared


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trl_grpo", "trl_async"])
def test_an_example_as_a_command(
    name: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, address, POLICY, "1", "6"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "held-out accuracy" in capsys.readouterr().out
    assert blockroll.load_policy(tmp_path / "runs" / name / "policy").converted


def grpo_args(output: Path, **options: Any) -> GRPOConfig:
    return GRPOConfig(str(output), per_device_train_batch_size=4, num_generations=4, max_steps=1, use_cpu=True, bf16=False,
                      max_completion_length=8, report_to=[], **options)  # fmt: skip


def test_what_cannot_work_is_refused_by_name(address: str, tmp_path: Path) -> None:
    model, data = load_model(POLICY), Dataset.from_list([{"prompt": "Q:1+1\nS:"}])
    shared = {"reward_funcs": trl_grpo.right, "train_dataset": data}
    with blockroll.connect(address) as client:
        with pytest.raises(InvalidInput, match=r"dtype: unknown dtype 'int8'"):
            Rollouts(client, dtype="int8")
        rollouts = Rollouts(client)
        own = OwnTrainer(model, args=grpo_args(tmp_path), processing_class=model.policy.tokenizer, rollout_func=rollouts,
                         **shared)  # fmt: skip
        with pytest.raises(InvalidInput, match=r"rollout_func: not attached"):
            own.train()
        own.args.generation_kwargs = {"stop": "A"}
        with pytest.raises(InvalidInput, match=r"args.generation_kwargs"):
            rollouts.attach(own)
        own.args.generation_kwargs = None
        rollouts.attach(own)
        with pytest.raises(InvalidInput, match=r"args.use_vllm"):
            rollouts.attach(own)
        with pytest.raises(InvalidInput, match=r"images"):
            rollouts.generate([(1, 2)], images=[object()])
        with pytest.raises(InvalidInput, match=r"model: a Linear has no mask rows"):
            DraftLossless(torch.nn.Linear(2, 2))


class Constructed:
    """A trainer that was constructed around a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.accelerator = model, self
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False

    def unwrap_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model


class DraftLossless(DraftLossMixin, Constructed):
    pass


def test_tokens_of_a_version_that_another_trainer_pushed_are_refused(address: str, tmp_path: Path) -> None:
    model, data = load_model(POLICY), Dataset.from_list([{"prompt": "Q:1+1\nS:", "task": "chain_sum:1"}])
    with blockroll.connect(address) as client, blockroll.connect(address) as other:
        trainer = GRPOTrainer(client, model=model, reward_funcs=trl_grpo.right, train_dataset=data, args=grpo_args(tmp_path),
                              drafts=DraftTraining(draft_weight=0.0))  # fmt: skip
        trainer.rollouts.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
        other.push_weights(int(other.status()["version"]) + 1, model.policy.state_dict())
        with pytest.raises(TransportError, match="another trainer pushes to it"):
            trainer.rollouts([data[0]["prompt"]], trainer)


def test_seeds_and_groups(address: str, tmp_path: Path) -> None:
    """Repeated prompts are one request; no two samples are drawn alike, and a second run draws the same."""
    data = Dataset.from_list([{"prompt": "Q:1+1\nS:", "task": "chain_sum:1"}])
    drawn = []
    with blockroll.connect(address) as client:
        for _ in range(2):
            trainer = GRPOTrainer(client, model=load_model(POLICY), reward_funcs=trl_grpo.right, train_dataset=data,
                                  args=grpo_args(tmp_path, temperature=2.0))  # fmt: skip
            trainer.rollouts.sync_weights()
            found = [trainer.rollouts(["Q:1+1\nS:"] * 4 + ["Q:2+2\nS:"] * 4, trainer) for _ in range(2)]
            drawn.append([tuple(ids) for each in found for ids in each["completion_ids"]])
            assert all(each["prompt_ids"][0] == each["prompt_ids"][3] != each["prompt_ids"][4] for each in found)
        turn = trainer.rollouts.generate([(1, 5, 6)] * 2, num_generations=2)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 16
    assert [len(ids) for ids in turn[1]] == [len(logprobs) for logprobs in turn[2]] and len(turn) == 4
