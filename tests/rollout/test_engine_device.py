"""The engine with its policy on an accelerator (a pretended one): the tokens of the CPU, and one wait per decode step."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import weakref
from collections import defaultdict
from typing import ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pretend_device import PretendDevice

from blockroll.kernels import graphs
from blockroll.kernels.dispatch import using
from blockroll.model.paged import PagedPlan
from blockroll.model.scoring import score
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.evaluation.places import acceptance_at_places
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps import model_runner, shapes
from blockroll.rollout.types import RolloutRequest, SamplingParams

SMALL = dict(vocab_size=24, head_dim=16, moe_intermediate_size=16, num_hidden_layers=1, layer_types=["hybrid_sliding"])
ROWS = 1 + 3 + 2 * 4
"""Of a sequence in a step of the last schedule with blocks of 4."""
SCHEDULES = [Schedule("ar"), Schedule("two_pass"), Schedule("fused", levels=(0, 2))]


def requests(samplers, samples=1, **params):
    return [
        RolloutRequest(name, tuple(range(3 + i, 12)), SamplingParams(sampler=name, **params), seed=i, samples=samples)
        for i, name in enumerate(samplers)
    ]


@pytest.fixture(scope="module")
def policy(make_policy):
    """With a Markov head."""
    made = make_policy(torch.float32, sharpness=0.6, **SMALL)
    made.add_markov(4, torch.Generator().manual_seed(3))
    made.requires_grad_(False).markov.next.weight.normal_(generator=torch.Generator().manual_seed(4))
    return made


def generate(policy, schedule, asked, device=None, **config):
    """Trajectories by id and sample, and how often each step that decoded waited for the device."""
    sizes = dict(block_size=4, page_size=8, prefill_rows=6, pages=64) | config
    engine, done, waits = Engine(policy, EngineConfig(schedule, **sizes)), [], []
    for request in asked:
        engine.add(request)
    while engine.has_work:
        before, decoded = (0 if device is None else len(device.waits)), engine.forwards
        done += engine.step()
        if device is not None:
            waits.append((engine.forwards - decoded, device.waits[before:]))
    return sorted(done, key=lambda sample: sample.key), waits


def compare(got, expected, atol):
    for mine, its in zip(got, expected, strict=True):
        assert mine.tokens == its.tokens
        assert [step.accepted for step in mine.trace] == [step.accepted for step in its.trace]
        np.testing.assert_allclose(mine.logprobs, its.logprobs, atol=atol)
        np.testing.assert_allclose(mine.behavior_logprobs, its.behavior_logprobs, atol=atol)


@pytest.mark.parametrize(
    ("schedule", "samplers"),
    [
        pytest.param(SCHEDULES[0], ["ar"], id="ar"),
        pytest.param(SCHEDULES[1], ["lossless"], id="two_pass", marks=pytest.mark.slow),
        pytest.param(SCHEDULES[2], ["coupled", "lossless", "mixed", "ar"], id="fused"),
    ],
)
def test_kernels_on_a_device(policy, schedule, samplers, monkeypatch):
    """Prompts in chunks, a group that shares one, samplers side by side, steps padded to few shapes; experts are recorded."""
    group = requests(samplers[:1], samples=2, max_tokens=4, routed_experts=True)
    asked = [*requests(samplers, max_tokens=4), *group]
    asked = [RolloutRequest(str(i), r.prompt_tokens, r.params, r.seed, r.samples) for i, r in enumerate(asked)]
    expected, _ = generate(policy, schedule, asked)
    forward, places = type(policy).forward, defaultdict(list)

    def noted(self, layout, state, routing, plan):
        if isinstance(plan, PagedPlan) and layout.rows == ROWS * layout.sequences:
            pointers = [x.data_ptr() for x in (layout.token_T, plan.places.write_T, plan.rows["hybrid_sliding"].table_SP)]
            places[layout.sequences, plan.rows["hybrid_sliding"].table_SP.shape].append(tuple(pointers))
        return forward(self, layout, state, routing, plan)

    monkeypatch.setattr(type(policy), "forward", noted)
    away = copy.deepcopy(policy)
    with PretendDevice() as device:
        got, waits = generate(away.to("cuda:0"), schedule, asked, device)
    compare(got, expected, 1e-4)
    for mine, its in zip(got, expected, strict=True):
        if its.routed_experts is not None:
            np.testing.assert_array_equal(mine.routed_experts, its.routed_experts)
    assert sum(forwards > 0 for forwards, _ in waits) >= 3
    for forwards, what in waits:
        assert len(what) == 1 if forwards else len(what) <= 1, what  # of a prefill alone: which experts it took
    if schedule.kind == "fused":  # What a graph would read stays where it is, from step to step.
        assert sum(map(len, places.values())) > len(places) > 0
        assert all(len(set(pointers)) == 1 for pointers in places.values())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_torch_on_a_device(policy, schedule):
    """All samplers side by side, some with cut-offs, on plain operations."""
    asked = [
        *requests(["ar", "coupled", "lossless", "mixed"], max_tokens=6),
        RolloutRequest("cut", (5, 6), SamplingParams(sampler="lossless", top_p=0.8, top_k=9, max_tokens=6), seed=5),
        RolloutRequest("greedy", (5, 7), SamplingParams(sampler="mixed", temperature=0, max_tokens=6), seed=6),
    ]
    expected, _ = generate(policy, schedule, asked)
    away = copy.deepcopy(policy)
    with PretendDevice() as device, using("reference"):
        got, waits = generate(away.to("cuda:0"), schedule, asked, device)
    compare(got, expected, 1e-4)
    # The experts' plain products ask the device too, how many rows each has.
    for forwards, what in waits:
        assert len([x for x in what if x not in ("bincount", "tolist (4,)", "item")]) <= (1 if forwards else 0), what


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=lambda s: s.kind)
def test_adjusted_logits_on_a_device(policy, schedule):
    """Penalties, biases and alternatives make the host wait no more often; functions of tokens do."""
    changes = dict(max_tokens=6, logit_bias={3: 1.0}, min_tokens=2, repetition_penalty=1.3, frequency_penalty=0.5, logprobs=2)
    asked = requests(["coupled", "lossless", "mixed", "ar"], **changes)
    plain = ("bincount", "tolist (4,)", "item")
    away = copy.deepcopy(policy)
    for processors in ((), (lambda prefix, logits: logits - logits.max(),)):
        params = [dataclasses.replace(r.params, logits_processors=processors) for r in asked]
        asked = [dataclasses.replace(r, params=p) for r, p in zip(asked, params, strict=True)]
        expected, _ = generate(policy, schedule, asked)
        with PretendDevice() as device, using("reference"):
            got, waits = generate(away.to("cuda:0"), schedule, asked, device)
        compare(got, expected, 1e-4)
        for mine, its in zip(got, expected, strict=True):
            np.testing.assert_array_equal(mine.top_tokens, its.top_tokens)
        for forwards, what in waits:
            assert processors or len([x for x in what if x not in plain]) <= (1 if forwards else 0), what


def test_scoring_on_a_device(policy):
    samples, _ = generate(policy, SCHEDULES[0], requests(["ar"], samples=2, max_tokens=8))
    pairs = [(sample.prompt_tokens, sample.tokens) for sample in samples]
    expected, places = score(policy, pairs), acceptance_at_places(policy, samples, [2, 4], 1.0)
    away = copy.deepcopy(policy)
    with PretendDevice() as device:
        away.to("cuda:0")
        before = len(device.waits)
        got = score(away, pairs)
        assert len(device.waits) == before + 1
        there = acceptance_at_places(away, samples, [2, 4], 1.0)
    for mine, its in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-4)
    for size in (2, 4):
        np.testing.assert_allclose(there[size], places[size], atol=1e-4)


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule("fused", drafts=3, levels=(0, 1)),
        *(pytest.param(schedule, marks=pytest.mark.slow) for schedule in (*SCHEDULES, Schedule("two_pass", drafts=3))),
    ],
    ids=lambda schedule: schedule.label,
)
def test_padded_shapes_change_nothing(policy, schedule):
    """Three samples run as four, each with every draft and level."""
    asked = requests(["coupled", "lossless", "ar"], max_tokens=3)
    with using("triton"):
        exact, padded = (generate(policy, schedule, asked, captured=captured)[0] for captured in (False, True))
    compare(padded, exact, 1e-5)


def test_one_request_that_records_experts_leaves_the_batch_captured(policy, monkeypatch):
    routed = [False, False, True]
    asked = [
        RolloutRequest(str(i), (3 + i,), SamplingParams("coupled", max_tokens=4, routed_experts=records))
        for i, records in enumerate(routed)
    ]
    again, once = [], []
    for kind, name, seen in ((shapes.ShapeCache, "run", again), (model_runner.ModelRunner, "_run_once", once)):
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, real=real, seen=seen: seen.append(1) or real(*args))
    with using("triton"):
        exact, _ = generate(policy, Schedule("ar"), asked, captured=False)
        assert (len(again), len(once)) == (0, 4)
        padded, _ = generate(policy, Schedule("ar"), asked)
        assert (len(again), len(once)) == (4, 4)
    compare(padded, exact, 1e-5)
    for mine, its, records in zip(padded, exact, routed, strict=True):
        assert (mine.routed_experts is not None) == records
        np.testing.assert_array_equal(mine.routed_experts, its.routed_experts)


class Graph:
    """A graph of the host: it runs its call again."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self, call):
        call()
        self.replay = call
        self.alive.add(self)


def test_graphs_are_bounded(policy, monkeypatch, caplog):
    """By number and by memory; what finds no room runs eagerly and gives the same; a graph that is idle gives way."""
    free = itertools.count(10**9, -1000)
    monkeypatch.setattr(graphs, "capture", lambda call, pool=None: Graph(call))
    monkeypatch.setattr(graphs, "free_memory", lambda: next(free))
    monkeypatch.setattr(shapes, "_OFTEN", 1)
    asked = [RolloutRequest(str(i), (3 + i,), SamplingParams("ar", max_tokens=1 + i, ignore_eos=True)) for i in range(3)]
    sizes = dict(block_size=4, page_size=8, pages=64)
    with using("triton"):
        expected = [sample.tokens for sample in Engine(policy, EngineConfig(Schedule("ar"), **sizes)).rollout(asked)]
        for most, most_bytes, lately in ((2, 10**9, 100), (100, 1500, 0)):
            Graph.alive.clear()
            monkeypatch.setattr(shapes, "_LATELY", lately)
            engine = Engine(policy, EngineConfig(Schedule("ar"), **sizes))
            inner = engine.runner.model.shapes
            inner._graphs, inner._memory = True, None
            inner._budget = graphs.GraphBudget(most, most_bytes)
            assert [sample.tokens for sample in engine.rollout(asked)] == expected
            gc.collect()
            assert len(inner._shapes) == 3
            assert len(Graph.alive) == 2
            assert (inner._budget.graphs, inner._budget.bytes) == (2, 2000)
            assert caplog.text.count("captured graphs take") == (lately > 0)
            caplog.clear()
