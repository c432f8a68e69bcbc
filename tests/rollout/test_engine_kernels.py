"""The engine on Triton's kernels (interpreted) gives the trajectories it gives on torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.model.paged import PagedPlan
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy(
        torch.float32, head_dim=16, moe_intermediate_size=16, num_hidden_layers=1, layer_types=["hybrid_sliding"]
    )


@pytest.mark.parametrize(
    "schedule", [Schedule("fused", levels=(0, 2)), pytest.param(Schedule("two_pass"), marks=pytest.mark.slow)]
)
def test_same_trajectories(policy, schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, plans = type(policy).paged_plan, []

    def noted(*arguments):
        plans.append(plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(type(policy), "paged_plan", noted)
    requests = [
        RolloutRequest("coupled", tuple(range(3, 10)), SamplingParams(sampler="coupled", max_tokens=4), seed=1),
        RolloutRequest("lossless", tuple(range(5, 9)), SamplingParams(sampler="lossless", max_tokens=3), seed=2),
    ]
    out = {}
    for implementation in ("triton", "reference"):
        config = EngineConfig(schedule, block_size=4, page_size=8, prefill_rows=6, pages=24)
        with using(implementation):
            out[implementation] = Engine(policy, config).rollout(requests)
        if implementation == "triton":
            assert plans and all(isinstance(made, PagedPlan) for made in plans)
    for got, expected in zip(out["triton"], out["reference"], strict=True):
        assert got.tokens == expected.tokens
        assert [step.accepted for step in got.trace] == [step.accepted for step in expected.trace]
        torch.testing.assert_close(torch.tensor(got.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)
