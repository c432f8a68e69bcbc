"""What an engine's process does, in this process: a real engine, without Ray."""

from __future__ import annotations

import pytest
import torch

import blockroll
from blockroll.errors import InvalidInput
from blockroll.rollout.cluster.actor import EngineActor, _placement
from blockroll.rollout.cluster.reports import Part
from blockroll.rollout.cluster.spec import EngineSpec
from blockroll.rollout.engine import EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams


@pytest.fixture
def actor(policy_dir):
    return loaded(policy_dir)


def loaded(policy):
    actor = EngineActor.__ray_metadata__.modified_class(EngineSpec(policy, EngineConfig(max_batch=2)), 0, None)
    actor.load()
    return actor


def part(name, token=4, samples=1, epoch=1, order=0):
    request = RolloutRequest(name, (1, token), SamplingParams(max_tokens=64, ignore_eos=True), samples=samples)
    return Part(request, range(samples), epoch, "a", order)


def test_a_process_is_on_a_gpu_only_where_ray_gave_it_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _placement(EngineSpec("none")) == ("float32", torch.device("cpu"))
    assert _placement(EngineSpec("none", num_gpus=1)) == ("bfloat16", torch.device("cuda", 1))
    assert _placement(EngineSpec("none", device="cuda:0", num_gpus=1, dtype="float16")) == ("float16", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidInput, match="sees no GPU here"):
        _placement(EngineSpec("none", num_gpus=1))


def test_what_was_given_back_of_a_cancelled_request_is_not_reported(actor):
    actor._add([part("dropped", samples=4), part("other", samples=4, order=1)])
    actor._give_back(6)
    actor._cancel({"dropped"})
    actor._add([part("dropped", samples=4, epoch=2, order=2)])
    report = next(actor.serve())
    assert len(report.returned) == 4 and {(name, epoch) for name, _, epoch in report.returned} == {("other", 1)}


def test_a_request_that_fails_as_it_is_cancelled_is_not_reported(policy_dir, tmp_path):
    policy = blockroll.load_policy(policy_dir)
    with torch.no_grad():  # finite weights whose logits overflow
        policy.state_dict()["model.norm.weight"].fill_(3e38)
        policy.state_dict()["model.embed_tokens.weight"].mul_(1e3)
    actor = loaded(str(blockroll.save_policy(policy, tmp_path / "overflows")))
    actor._add([part("dropped")])
    for _ in range(3):
        assert actor._engine.step() == []
    actor._cancel({"dropped"})
    actor._add([part(f"refused{i}", token=1000, order=i + 1) for i in range(70)])  # so many that leases are forgotten
    actor._report_failures()
    assert {item.request_id for item in actor._report.completed} == {f"refused{i}" for i in range(70)}
