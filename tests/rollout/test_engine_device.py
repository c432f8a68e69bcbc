"""The engine with its policy on an accelerator (a pretended one): the tokens of the CPU, and one wait per decode step."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import types
from collections import defaultdict

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from engine_cases import small_markov_policy
from pretend_device import PretendDevice

from blockroll.kernels import graphs
from blockroll.kernels.dispatch import using
from blockroll.model.paged import PagedPlan
from blockroll.model.scoring import score
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.evaluation.places import acceptance_at_places
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps import model_runner, sampling_graphs, shapes
from blockroll.rollout.types import RolloutRequest, SamplingParams

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
    return small_markov_policy(make_policy)


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
        pytest.param(SCHEDULES[0], ["ar"], id="ar", marks=pytest.mark.slow),
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


class Pool:
    """Graphs of a pretended device: they run their call again. Every so many captures fail."""

    failing = 0

    def __init__(self):
        self.captures, self.replays = 0, 0

    def capture(self, call):
        self.captures += 1
        if self.failing and self.captures % self.failing == 0:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay():
            self.replays += 1
            call()

        return types.SimpleNamespace(replay=replay)


def test_graphs_are_captured_when_an_engine_starts(policy, monkeypatch, caplog):
    """Within a bound of memory. A step without a graph of its own runs in a larger one, else eagerly, and gives the same; so does
    one whose capture failed. Nothing is captured later."""
    asked = [
        RolloutRequest(str(i), (3 + i,), SamplingParams("ar", max_tokens=1 + 2 * i, ignore_eos=True, routed_experts=i == 1))
        for i in range(2)
    ]
    sizes = dict(block_size=4, page_size=8, pages=64, max_batch=4)
    with using("triton"):
        expected = Engine(policy, EngineConfig(Schedule("ar"), **sizes)).rollout(asked)
        monkeypatch.setattr(shapes, "can_capture", lambda device: True)
        monkeypatch.setattr(shapes, "GraphPool", Pool)
        monkeypatch.setattr(sampling_graphs, "CAPTURED_KINDS", ())  # `steps/test_captured_steps.py` has those
        # Steps of two, one and one sequences; graphs of 4, 2 and 1 over 32 and 8 pages.
        for most_bytes, failing, captured, replayed in ((10**9, 0, 6, 3), (1500, 0, 2, 1), (10**9, 2, 3, 3)):
            free = itertools.count(10**9, -1000)
            monkeypatch.setattr(graphs, "free_memory", lambda free=free: next(free))
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None, most=most_bytes: (0, most * shapes.GRAPH_SHARE))
            monkeypatch.setattr(Pool, "failing", failing)
            caplog.clear()
            with caplog.at_level("INFO"):
                engine = Engine(policy, EngineConfig(Schedule("ar"), **sizes))
            known, pool = engine.runner.model.shapes, engine.runner.model.shapes._pool
            captures = pool.captures
            assert (known.budget.graphs, known.budget.bytes) == (captured, 1000 * captured)
            assert f"captured {captured} of 6 shapes of decode steps" in caplog.text
            assert caplog.text.count("run without a graph: operation not permitted") == (3 if failing else 0)
            got = engine.rollout(asked)
            assert [sample.tokens for sample in got] == [sample.tokens for sample in expected]
            np.testing.assert_array_equal(got[1].routed_experts, expected[1].routed_experts)
            assert (pool.captures, pool.replays) == (captures, replayed)


def test_no_other_device_is_launched_on(policy):
    """A policy on cuda:1, where cuda:0 is torch's current device."""
    asked = requests(["coupled", "lossless"], max_tokens=2)
    expected, _ = generate(policy, SCHEDULES[2], asked)
    scores = score(policy, [((3, 4), (5, 6))])
    away = copy.deepcopy(policy)
    with PretendDevice(1) as device:
        away.to("cuda:1")
        got, _ = generate(away, SCHEDULES[2], asked)
        assert device.current == 0
        np.testing.assert_allclose(score(away, [((3, 4), (5, 6))])[0], scores[0], atol=1e-4)
    compare(got, expected, 1e-4)
