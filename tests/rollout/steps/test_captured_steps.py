"""Captured steps on an emulated device: what is captured is executed, and the next step would be captured just so."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("triton")

from engine_cases import small_markov_policy
from graph_emulator import EmulatedDevice, GraphFault

from blockroll.kernels import graphs
from blockroll.rollout import engine as engine_module
from blockroll.rollout.bench.gpu.running import engine_for, measure
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.planning.roofline import KERNELS_OF_DRAFTS, KERNELS_PER_LAYER, KERNELS_PER_PASS
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps import recurring, runner, sampling_graphs
from blockroll.rollout.steps.captured import SamplerKind
from blockroll.rollout.types import RolloutRequest, SamplingParams

FUSED = Schedule("fused", levels=(0, 2))


@pytest.fixture(scope="module")
def policy(make_policy):
    return small_markov_policy(make_policy)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A pass takes long in the interpreter, which has nothing to warm up."""
    monkeypatch.setattr(graphs, "_WARM_UP", 0)


def run(policy, schedule, asked, device=None, later=(), **config):
    """Trajectories by id, and what each step waited for; `later` requests arrive after the first step."""
    sizes = dict(block_size=4, page_size=8, pages=8, max_batch=2, capture_batches=(2,), draft_temperature=0.6) | config
    engine, done, waits = Engine(policy, EngineConfig(schedule, **sizes)), [], []
    for request in asked:
        engine.add(request)
    while engine.has_work:
        before = 0 if device is None else len(device.waits)
        done += engine.step()
        waits.append([] if device is None else device.waits[before:])
        for request in later:
            engine.add(request)
        later = ()
    return sorted(done, key=lambda sample: sample.key), waits


@pytest.mark.parametrize(
    ("schedule", "sampler", "temperature", "top_p"),
    [
        (FUSED, "lossless", 1.0, 1.0),
        (Schedule("ar"), "ar", 1.0, 0.8),
        pytest.param(FUSED, "coupled", 1.0, 0.8, marks=pytest.mark.slow),
        pytest.param(FUSED, "lossless", 0.8, 0.7, marks=pytest.mark.slow),
        pytest.param(Schedule("ar"), "ar", 1.0, 1.0, marks=pytest.mark.slow),
        pytest.param(FUSED, "coupled", 1.0, 1.0, marks=pytest.mark.slow),
        pytest.param(FUSED, "mixed", 0.7, 1.0, marks=pytest.mark.slow),
        pytest.param(FUSED, "lossless", 0.0, 1.0, marks=pytest.mark.slow),
        pytest.param(Schedule("ar"), "lossless", 1.0, 1.0, marks=pytest.mark.slow),
        pytest.param(Schedule("two_pass"), "lossless", 1.0, 1.0, marks=pytest.mark.slow),
    ],
)
def test_captured_steps_give_the_tokens_of_eager_ones(policy, monkeypatch, schedule, sampler, temperature, top_p):
    """One sample, then two, of which one ends early: batches of drafts change their places, and eager steps lie between."""
    alike = sampler == "ar" or temperature == 0
    kind = SamplerKind("coupled" if alike else sampler, temperature == 0, top_p < 1)
    monkeypatch.setattr(sampling_graphs, "CAPTURED_KINDS", (kind,))

    def request(name, prompt, most):
        params = SamplingParams(sampler, temperature=temperature, top_p=top_p, max_tokens=most, ignore_eos=True)
        return RolloutRequest(name, prompt, params, seed=len(prompt))

    arguments = schedule, [request("b", (3,), 5)]
    later = [request("a", (4, 5), 2)]
    expected, _ = run(policy, *arguments, later=later)
    away = copy.deepcopy(policy)
    with EmulatedDevice() as device:
        got, waits = run(away.to("cuda:0"), *arguments, device, later)
    for mine, its in zip(got, expected, strict=True):
        assert mine.tokens == its.tokens and [step.accepted for step in mine.trace] == [step.accepted for step in its.trace]
        np.testing.assert_allclose(mine.logprobs, its.logprobs, atol=1e-4)
        np.testing.assert_allclose(mine.behavior_logprobs, its.behavior_logprobs, atol=1e-4)
    assert [len(what) for what in waits] == [1] * len(waits), waits
    passes = {"fused": 1, "ar": 1, "two_pass": 2}[schedule.kind]
    replays = [graph.replays for graph in device.graphs]
    if passes == 1:
        assert replays == [len(waits) - 1] * (3 if schedule == FUSED else 2)  # the step that prefills is no captured one
    else:
        assert len(replays) == 2 and min(replays) > 0
    if (schedule, sampler, temperature, top_p) == (FUSED, "lossless", 1.0, 1.0):
        # As `plan` counts them. One of a layer runs over split keys only, the merge of splits. Five of a pass are casts, which a
        # float32 policy has none of.
        forward, verify, _ = (graph.launches for graph in device.graphs)
        assert forward == KERNELS_PER_PASS - 5 + KERNELS_PER_LAYER - 1 and verify == KERNELS_OF_DRAFTS - 39


def test_schedules_with_fewer_drafts_run_in_graphs_too(policy, monkeypatch):
    """As under `auto`: they share the memory of the drafts that wait, which holds as many as the widest schedule draws."""
    monkeypatch.setattr(sampling_graphs, "CAPTURED_KINDS", (SamplerKind("coupled"),))
    schedules = Schedule("fused", levels=(0,)).within(8), Schedule("fused", 2, (0,), 4).within(8)
    monkeypatch.setattr(engine_module, "schedules_of", lambda *_: schedules)

    def sample(policy):
        engine, done = Engine(policy, block_size=8, page_size=8, pages=8, max_batch=1, schedule=schedules[0]), []
        engine.add(RolloutRequest("r", (3,), SamplingParams("coupled", max_tokens=8, ignore_eos=True), seed=2))
        while engine.has_work:
            engine.schedule = schedules[engine.forwards % 2]
            done += engine.step()
        return done[0]

    expected = sample(policy)
    with EmulatedDevice() as device:
        got = sample(copy.deepcopy(policy).to("cuda:0"))
    assert got.tokens == expected.tokens and got.trace == expected.trace
    assert len(device.graphs) == 6 and all(graph.replays for graph in device.graphs)


@pytest.mark.slow
def test_drafts_on_the_host_and_what_waits_for_them(policy, monkeypatch):
    """While the device draws drafts the host commits: it waits for the verdict, which was launched before them."""
    order = []
    monkeypatch.setattr(sampling_graphs, "CAPTURED_KINDS", (SamplerKind("coupled"),))
    with EmulatedDevice(audits=False) as device:
        engine = Engine(copy.deepcopy(policy).to("cuda:0"), block_size=4, page_size=8, pages=4, max_batch=1, schedule=FUSED)
        for name, graph in zip(("forward", "verify", "draft"), device.graphs, strict=True):
            graph.replay = lambda name=name, replay=graph.replay: order.append(name) or replay()
        (found,) = engine.runner._graphs._known.values()
        found._graphs = [graph.replay for graph in device.graphs[1:]]
        monkeypatch.setattr(device, "wait", lambda what: order.append("wait"))
        engine.rollout([RolloutRequest("r", (3,), SamplingParams("coupled", max_tokens=2, ignore_eos=True))])
    assert order[:4] == ["forward", "verify", "draft", "wait"]


def test_inputs_that_are_not_sent_again_are_found(policy, monkeypatch):
    real = recurring.RecurringInputs.pinned_copy

    def forgetful(self, device):
        self._moving = [each for each in self._moving if each is not self.plan.places.write_T]
        return real(self, device)

    monkeypatch.setattr(recurring.RecurringInputs, "pinned_copy", forgetful)
    with EmulatedDevice(), pytest.raises(GraphFault, match="is not sent again"):
        run(copy.deepcopy(policy).to("cuda:0"), Schedule("ar"), [RolloutRequest("r", (3,), SamplingParams("ar", max_tokens=2))])


@pytest.mark.slow
def test_sampling_that_cannot_be_captured_runs_eagerly(policy, monkeypatch, caplog):
    class Asks(runner.SamplerVerifier):
        def __call__(self, sampling, p_logits_SRV, *rest):
            p_logits_SRV.sum().item()
            return super().__call__(sampling, p_logits_SRV, *rest)

    monkeypatch.setattr(sampling_graphs, "CAPTURED_KINDS", (SamplerKind("coupled"),))
    asked = [RolloutRequest("r", (3,), SamplingParams("ar", max_tokens=2, ignore_eos=True))]
    expected, _ = run(policy, Schedule("ar"), asked)
    monkeypatch.setattr(runner, "SamplerVerifier", Asks)
    with EmulatedDevice() as device:
        got, _ = run(copy.deepcopy(policy).to("cuda:0"), Schedule("ar"), asked, capture_batches=(1,))
    assert "sample without a graph: operation not permitted" in caplog.text
    assert got[0].tokens == expected[0].tokens and [graph.replays for graph in device.graphs] == [2]


@pytest.mark.slow
def test_forced_acceptance_is_captured(policy, monkeypatch):
    """What `bench gpu` measures runs in the graphs of an engine that serves."""
    monkeypatch.setattr(sampling_graphs, "CAPTURED_KINDS", (SamplerKind("lossless"),))
    with EmulatedDevice() as device:
        schedule = Schedule("fused", levels=(0,), block=4).within(4)
        engine = engine_for(copy.deepcopy(policy).to("cuda:0"), schedule, 2, 9, 40, 8)
        row = measure(engine, (1.0,), 1, 2)
    assert row["tokens_per_step"] == (4 + 1) / 2 and [graph.replays for graph in device.graphs] == [3, 3, 3]
