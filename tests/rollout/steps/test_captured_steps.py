"""Captured steps on an emulated device: what is captured is executed, and would be captured again by the next step."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from graph_emulator import EmulatedDevice, GraphFault

from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

SMALL = dict(vocab_size=24, head_dim=16, moe_intermediate_size=16, num_hidden_layers=1, layer_types=["hybrid_sliding"])


@pytest.fixture(scope="module")
def policy(make_policy):
    made = make_policy(torch.float32, sharpness=0.6, **SMALL)
    made.add_markov(4, torch.Generator().manual_seed(3))
    made.requires_grad_(False).markov.next.weight.normal_(generator=torch.Generator().manual_seed(4))
    return made


def test_try(policy):
    asked = [RolloutRequest(str(i), (3 + i,), SamplingParams("ar", max_tokens=3, ignore_eos=True), seed=i) for i in range(1)]
    sizes = dict(block_size=4, page_size=8, pages=6, max_batch=1)
    expected = Engine(policy, EngineConfig(Schedule("ar"), **sizes)).rollout(asked)
    away = copy.deepcopy(policy)
    t = time.process_time()
    with EmulatedDevice() as device:
        engine = Engine(away.to("cuda:0"), EngineConfig(Schedule("ar"), **sizes))
        print("made", time.process_time() - t, [len(g.nodes) for g in device.graphs])
        got = engine.rollout(asked)
        print("run", time.process_time() - t, [g.replays for g in device.graphs])
    print([x[0] for x in (n.signature for n in device.graphs[0].nodes)])
    assert [s.tokens for s in got] == [s.tokens for s in expected]
