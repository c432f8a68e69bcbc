"""The planner: what it picks from known costs, what it learns, and that no choice of its changes what is sampled."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_planner import PlainSurvival
from planner_doubles import BLOCK, SCHEDULES, Running, Traced, costs

from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.planning import survival as survival_module
from blockroll.rollout.planning.calibration import consistent
from blockroll.rollout.planning.planner import _PROBE_EVERY as STANDS
from blockroll.rollout.planning.planner import PROBE_SHARE, Planner, candidates
from blockroll.rollout.planning.step_batch import kind_of
from blockroll.rollout.planning.step_costs import StepCosts, rows
from blockroll.rollout.planning.survival import Survival
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams


class World:
    """Samples whose drafts survive with a constant rate, but for the first of `two_pass`, which always does; under a planner."""

    def __init__(self, base, per_row, rate, batch, sampler="lossless", seed=0):
        self.costs, self.rate, self.draw = costs(base, per_row), rate, random.Random(seed)
        self.planner = Planner(costs(base, per_row), SCHEDULES, BLOCK)
        request = RolloutRequest("r", (1,) * 8, SamplingParams(sampler))
        self.samples = [Running(request, [1] * 8) for _ in range(batch)]
        self.seconds, self.made, self.chosen = 0.0, 0, []

    def step(self, seconds_of=None):
        schedule = self.planner.choose(self.samples)
        seconds = (seconds_of or self.costs.seconds)(schedule, len(self.samples), 64)
        for sample in self.samples:
            drafted = schedule.drafts if schedule.kind == "two_pass" else min(sample.draft_count, schedule.drafts or 0)
            slot = 0 if schedule.kind == "two_pass" else 1
            accepted = next((k for k in range(1 - slot, drafted) if self.draw.random() >= self.rate), drafted)
            sample.trace.append(Traced(sample.anchor, drafted, accepted, sample.anchor + 1 - slot))
            sample.tokens += [1] * (accepted + 1)
            sample.draft_count = schedule.drafts if schedule.kind == "fused" else 0
            self.made += accepted + 1
        self.planner.observe(self.samples, seconds)
        self.seconds += seconds
        self.chosen.append(schedule)
        return schedule

    def most(self, last=200):
        labels = [s.kind for s in self.chosen[-last:]]
        return max(set(labels), key=labels.count)


def test_free_rows_are_drafted_and_dear_rows_are_not():
    for per_row, rate, kind in ((0.0, 0.8, "fused"), (1.0, 0.5, "ar"), (0.001, 0.0, "ar")):
        world = World(1.0, per_row, rate, batch=8)
        for _ in range(400):
            world.step()
        assert world.most() == kind, (per_row, rate)


def test_two_passes_where_a_pass_is_cheap_and_blocks_are_not():
    """A second forward costs little, but a fused step's many rows cost a lot."""
    table = {s.label: {1: 1.0, 64: 1.0} for s in SCHEDULES}
    for s in SCHEDULES:
        if s.kind == "fused":
            table[s.label] = {1: 9.0, 64: 9.0}
    world = World(1.0, 0.0, 0.8, batch=2)
    world.costs = world.planner.costs = StepCosts(table, 64)
    for _ in range(300):
        world.step()
    assert world.most() == "two_pass"


@pytest.mark.parametrize(("per_row", "rate"), [(0.0005, 0.85), (0.005, 0.7), (0.02, 0.5), (0.05, 0.3), (0.1, 0.0)])
@pytest.mark.parametrize("batch", [1, 8])
def test_within_five_percent_of_the_best_fixed_schedule(per_row, rate, batch):
    world = World(1.0, per_row, rate, batch)
    steps = 800
    for _ in range(steps):
        world.step()
    truth = Survival(BLOCK, rate)
    best = max(truth.tokens(s) / world.costs.seconds(s, batch, 64) for s in SCHEDULES)
    assert world.made / batch / world.seconds >= 0.95 * best


def test_learning_is_cheap_and_goes_on_under_ar():
    """Drafts that never survive are not paid for; when they begin to, that is noticed."""
    world = World(1.0, 0.02, 0.0, batch=4)
    for _ in range(2000):
        world.step()
    ar = world.costs.seconds(Schedule("ar").within(2), 4, 64)
    # Each step makes one token per sample, so ar would have taken this long; the first steps had to be learnt from.
    assert world.seconds <= (1 + PROBE_SHARE) * world.made / 4 * ar + 20 * ar
    assert any(d.probe for d in world.planner.log)
    world.rate = 0.95
    for _ in range(3000):
        world.step()
    assert world.most() != "ar", "drafts survive again, and nobody noticed"


def test_drafts_that_were_never_tried_are_tried_at_once():
    """Also where `ar` is the better choice by the prior: two steps teach that it is not."""
    world = World(1.0, 0.05, 0.95, batch=8)
    chosen = [world.step().kind for _ in range(12)]
    assert chosen[0] != "ar" and world.planner.log[0].probe and "ar" not in chosen[4:]
    world = World(1.0, 0.05, 0.0, batch=8)
    assert [world.step().kind for _ in range(20)].count("ar") >= 17


def test_turning_to_fused_costs_a_step_without_drafts():
    """With few tokens left that step does not pay; with many it does."""
    table = {s.label: {1: 100.0, 64: 100.0} for s in SCHEDULES}
    table["ar"] = {1: 1.0, 64: 1.0}
    fused = next(s for s in SCHEDULES if s.kind == "fused" and s.drafts == BLOCK - 1)
    table[fused.label] = {1: 1.4, 64: 1.4}
    request = RolloutRequest("r", (1,) * 8)
    for left, waiting, kind in ((2, 0, "ar"), (2, 8, "fused"), (100, 0, "fused")):
        planner = Planner(StepCosts(table, 64), SCHEDULES, BLOCK, prior=0.6)
        assert planner.choose([Running(request, [1] * 8, left, waiting)]).kind == kind, (left, waiting)


def test_samples_of_ar_are_decoded_by_ar():
    planner = Planner(costs(1.0, 0.0), SCHEDULES, BLOCK)
    samples = [Running(RolloutRequest("r", (1,), SamplingParams("ar")), [1])]
    assert planner.choose(samples).kind == "ar"
    world = World(1.0, 0.0, 0.8, batch=1)  # also where they follow samples in the middle of a probe
    while not (world.planner._stands and world.planner.log[-1].probe):
        world.step()
    assert world.planner.choose(samples).kind == "ar"


def test_times_that_differ_from_the_table_are_learnt():
    """In truth every schedule but the second best takes half as long again as the table says."""
    table, survival = costs(1.0, 0.005), Survival(BLOCK, 0.8)
    best, second, *_ = sorted(SCHEDULES, key=lambda s: table.seconds(s, 4, 64) / survival.tokens(s))

    def truth(schedule, batch, context):
        return table.seconds(schedule, batch, context) * (1.0 if schedule == second else 1.5)

    world, before = (World(1.0, 0.005, 0.8, batch=4) for _ in range(2))
    for _ in range(1000):
        world.step(truth)
        before.step()
    assert before.chosen[-200:].count(best) > 150
    assert world.chosen[-200:].count(second) > 150


def test_a_machine_that_is_slower_for_all_changes_nothing():
    table = costs(1.0, 0.01)
    fused, ar = SCHEDULES[-1], SCHEDULES[0]
    before = table.seconds(fused, 4, 64) / table.seconds(ar, 4, 64)
    for _ in range(500):
        for schedule in SCHEDULES:
            table.note(schedule, 4, 64, 2 * (1.0 + 0.01 * 4 * rows(schedule)))
    assert table.seconds(fused, 4, 64) / table.seconds(ar, 4, 64) == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("before", [0, 1, 30])
def test_an_interrupted_step_changes_little(before):
    """A step that took ten times as long, after so many steps that took as long as the table says, and before others."""
    table = costs(1.0, 0.01)
    ar, two_pass, fused = SCHEDULES[0], SCHEDULES[2], SCHEDULES[-1]
    seconds = {schedule: table.seconds(schedule, 4, 64) for schedule in SCHEDULES}
    for step in range(before + 12):
        schedule = fused if step % 10 == 5 else two_pass
        table.note(schedule, 4, 64, seconds[schedule] * (10 if step == before else 1))
        for other in (two_pass, fused):
            ratio = table.seconds(other, 4, 64) / table.seconds(ar, 4, 64)
            assert ratio == pytest.approx(seconds[other] / seconds[ar], rel=0.05 if before == 0 else 0.01)


def test_probes_are_timed_as_other_steps_are():
    """Two steps each, of which the second is timed: the first one after another schedule is slower, and so is a step in which
    schedules are compared."""
    world, noted = World(1.0, 0.01, 0.8, batch=2), []
    compared = []
    best = world.planner._best
    world.planner._best = lambda *args: compared.append(len(world.chosen)) or best(*args)
    world.planner.costs.note = lambda schedule, batch, context, seconds: noted.append(int(seconds))
    for step in range(1500):
        world.step(lambda *_, step=step: step + 0.5)
    assert set(noted) <= {step + 1 for step in compared} and len(noted) > 40
    log = list(world.planner.log)
    probed = [step for step in noted if log[step].probe]
    assert len(probed) > 5
    assert all(log[step - 1].probe and log[step - 1].schedule == log[step].schedule for step in probed)


def test_a_step_s_time_waits_until_what_it_drafted_is_committed():
    """Times depend on tokens nobody has read yet; those tokens' random numbers are still to be used."""
    world = World(1.0, 0.01, 0.0, batch=2)
    noted, drafted_to = [], []

    def note(schedule, batch, context, seconds):
        step = int(seconds)
        assert drafted_to[step] <= world.samples[0].anchor  # no draft survives, so that all samples advance alike
        noted.append(step)

    world.planner.costs.note = note
    for step in range(1000):
        drafted_to.append(world.samples[0].anchor + BLOCK)
        world.step(lambda *_, step=step: step + 0.5)
    assert len(set(noted)) == len(noted) > 20


def test_a_choice_stands_until_something_changes(monkeypatch):
    """Schedules are compared once in many steps; but at once when many samples end, join or come near their ends."""
    world = World(1.0, 0.01, 0.8, batch=4)
    compared = []
    best = world.planner._best
    monkeypatch.setattr(world.planner, "_best", lambda *args: compared.append(len(world.chosen)) or best(*args))

    def compares():
        """Whether the next step's schedule is compared with the others."""
        before = len(compared)
        world.step()
        return len(compared) > before

    for _ in range(1200):
        world.step()
    settled = [step for step in compared if step >= 600]
    assert 600 / STANDS <= len(settled) < 600 / 6
    assert len(world.planner.log) == 1200 and all(d.tokens > 0 for d in world.planner.log)
    request = world.samples[0].request
    for change in (
        lambda: world.samples.pop(),
        lambda: world.samples.append(Running(request, [1] * 8)),
        lambda: world.samples.append(Running(RolloutRequest("a", (1,) * 8, SamplingParams("ar")), [1] * 8)),
        lambda: world.samples.__setitem__(0, Running(RolloutRequest("s", (1,) * 8, SamplingParams("coupled")), [1] * 8)),
    ):
        for _ in range(5):
            world.step()
        while world.planner._stands < 3:
            world.step()
        assert not compares()
        change()
        assert compares()
    while world.planner._stands < 3:
        world.step()
    world.samples[1] = Running(request, [1] * 8)  # of the same kind as the sample that it follows
    assert not compares()
    world.samples += [Running(request, [1] * 8) for _ in range(5)]
    assert compares()
    while world.planner._stands < 3:
        world.step()
    del world.samples[-1]  # one of nine
    assert not compares()
    while world.planner._stands < 3:
        world.step()
    del world.samples[-2:]  # three of nine
    assert compares()
    for remaining, most in ((20, 0), (60, 28 / world.planner.log[-1].expected_tokens)):
        for sample in world.samples:
            sample.remaining = remaining
        while not compares():
            pass
        for _ in range(60):
            world.step()
            assert world.planner._stands <= most or world.planner.log[-1].probe


def test_repeatable_leaves_times_out():
    planner = Planner(costs(1.0, 0.01), SCHEDULES, BLOCK, repeatable=True)
    planner.costs.note = lambda *_: pytest.fail("a time was counted")
    world = World(1.0, 0.01, 0.5, batch=2)
    world.planner = planner
    for _ in range(100):
        world.step()


def test_expected_tokens_are_those_of_a_long_run(monkeypatch):
    """Rates that differ from slot to slot, and levels with gaps, against simulation."""
    monkeypatch.setattr(survival_module, "_MEMORY", 1e9)  # what is forgotten makes the estimate rougher
    draw = random.Random(1)
    first = [0.9 - 0.05 * i for i in range(BLOCK)]
    later = [0.95 - 0.03 * i for i in range(BLOCK)]
    for schedule in (*SCHEDULES, Schedule("fused", 9, (0, 2, 7), 12).within(BLOCK)):
        if schedule.kind != "fused":
            continue
        survival = Survival(BLOCK, 0.5)
        slot, made, steps = BLOCK, 0, 10_000
        for _ in range(steps):
            drafted = max(min(schedule.block - slot, schedule.drafts), 0)
            accepted = 0
            while accepted < drafted and draw.random() < (later if accepted else first)[slot + accepted]:
                accepted += 1
            survival.note(slot, drafted, accepted)
            slot = min(accepted - max(level for level in schedule.levels if level <= accepted) + 1, schedule.block)
            made += accepted + 1
        assert survival.tokens(schedule) == pytest.approx(made / steps, rel=0.04), schedule.label
    fresh = Survival(BLOCK, 0.5)
    assert fresh.tokens(Schedule("two_pass", 3).within(BLOCK)) == pytest.approx(1 + 1 + 0.5 + 0.25)


def test_what_two_pass_and_fused_draft_is_counted_apart():
    """What `two_pass` reaches says little of `fused` once that has been tried, and the other way round."""
    survival = Survival(BLOCK, 0.7)
    two_pass, fused = SCHEDULES[2], SCHEDULES[-1]
    for _ in range(200):
        survival.note(0, 8, 8)
    hopeful = survival.tokens(fused)
    for _ in range(100):
        survival.note(1, 15, 0)
    assert survival.tokens(two_pass) > 8 and hopeful > 8 and survival.tokens(fused) < 1.5


def test_what_one_kind_of_block_shows_is_a_hint_for_the_other():
    """Until it is tried, the odds of `two_pass` are taken for higher than those of `fused`, and the other way round. The first
    draft of `two_pass` is p's own, and that of `fused` follows a sampled token as the later ones of `two_pass` do."""
    for slot, better in ((1, True), (0, False)):
        survival = Survival(BLOCK, 0.5)
        for _ in range(300):
            survival.note(slot, 4, 2)
        (_, later), (first, other) = survival.rates(slot), survival.rates(1 - slot)
        assert (other[3] > later[3]) == better
        assert first[3] == (pytest.approx(later[3], abs=0.05) if slot == 0 else 1.0)


def test_tokens_made_past_a_given_length():
    """Against simulation: steps to reach 20 tokens are (20 + past) / tokens on average."""
    draw, survival = random.Random(0), Survival(BLOCK, 0.8)
    for schedule in (Schedule("two_pass", 4).within(BLOCK), Schedule("two_pass").within(BLOCK)):
        steps, runs = 0, 4000
        for _ in range(runs):
            made = 0
            while made < 20:
                made += 1 + next((k for k in range(1, schedule.drafts) if draw.random() >= 0.8), schedule.drafts)
                steps += 1
        assert (20 + survival.past(schedule)) / survival.tokens(schedule) == pytest.approx(steps / runs, rel=0.02)


def test_the_last_step_of_a_sample_makes_no_more_than_it_may():
    """Two drafts for twice the time of one token: right for a long text, wrong where one token is wanted."""
    table = {s.label: {1: 100.0, 64: 100.0} for s in SCHEDULES}
    table["ar"] = {1: 1.0, 64: 1.0}
    two_pass = next(s for s in SCHEDULES if s.kind == "two_pass" and s.drafts == BLOCK // 4)
    table[two_pass.label] = {1: 2.0, 64: 2.0}
    for left, kind in ((1, "ar"), (40, "two_pass")):
        planner = Planner(StepCosts(table, 64), SCHEDULES, BLOCK, prior=0.75)
        assert planner.choose([Running(RolloutRequest("r", (1,)), [1], left)]).kind == kind


def test_no_step_counts_as_longer_than_one_that_does_more():
    ar, one, wide = Schedule("ar").within(BLOCK), SCHEDULES[-3], SCHEDULES[-1]
    two = Schedule("two_pass", 4).within(BLOCK)
    assert rows(ar) < rows(two) < rows(one) < rows(wide)
    noisy = {ar.label: {1: 5.0, 8: 3.0}, one.label: {1: 4.0, 8: 9.0}, wide.label: {1: 6.0, 8: 7.0}, two.label: {1: 8.0, 8: 8.5}}
    assert consistent(noisy, [ar, one, wide, two]) == {
        ar.label: {1: 3.0, 8: 3.0}, one.label: {1: 4.0, 8: 7.0}, wide.label: {1: 6.0, 8: 7.0}, two.label: {1: 8.0, 8: 8.5},
    }  # fmt: skip


def test_costs_between_batches_contexts_and_files(tmp_path):
    ar = Schedule("ar").within(BLOCK)
    table = StepCosts({"ar": {1: 1.0, 4: 4.0, 16: 4.0}}, 64, per_position=0.01, per_row=0.0)
    assert table.seconds(ar, 2, 64) == pytest.approx(2.0)
    assert table.seconds(ar, 8, 64) == pytest.approx(4.0)
    assert table.seconds(ar, 4, 164) == pytest.approx(8.0)
    table.save(tmp_path / "t.json", {})
    again = StepCosts.load(tmp_path / "t.json")
    assert again is not None and again.seconds_at == table.seconds_at and again.seconds(ar, 4, 164) == pytest.approx(8.0)
    (tmp_path / "t.json").write_text('{"format": 1, "seconds": 3}')
    assert StepCosts.load(tmp_path / "t.json") is None
    assert StepCosts.load(tmp_path / "none.json") is None
    assert table.covers([ar], [1, 16]) and not table.covers([ar], [8])


def test_candidates_fit_every_block():
    for block in (2, 3, 4, 8, 16, 64):
        chosen = candidates(block)
        assert chosen[0].kind == "ar" and len(set(chosen)) == len(chosen)
        assert {s.kind for s in chosen} == {"ar", "two_pass", "fused"}
        assert all(s.within(block) == s and (s.block or 0) <= block for s in chosen)


# Through the engine.


class Restless:
    """A planner whose every choice is a hash of how many drafts were accepted so far."""

    def __init__(self, block):
        self.schedules, self.past, self.chosen = (*candidates(block), Schedule("fused", 2, (0, 1), 3).within(block)), 0, set()

    def choose(self, decoding):
        schedule = self.schedules[hash((self.past, len(decoding))) % len(self.schedules)]
        self.chosen.add(schedule)
        return schedule

    def observe(self, decoding, seconds):
        self.past = hash((self.past, *(sample.trace[-1].accepted for sample in decoding)))


def prompt(i):
    draw = torch.Generator().manual_seed(i)
    return tuple(torch.randint(4, 40, (1 + (i * 5) % 23,), generator=draw).tolist())


def requests(sampler, temperature):
    cuts = [dict(), dict(top_p=0.8), dict(top_k=5)]
    return [
        RolloutRequest(f"r{i:02d}", prompt(i),
                       SamplingParams(sampler=sampler, max_tokens=22, temperature=temperature, **cuts[i % 3]), i, 2)
        for i in range(6)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def policy(make_policy):
    """float64: a test of tokens must not depend on the order of a sum."""
    return make_policy(sharpness=0.6)


@pytest.mark.parametrize("mode", [dict(max_batch=5, prefill_rows=5), dict(max_batch=8, pages=9, page_size=8)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_coupled_gives_the_tokens_of_ar_whatever_is_chosen(policy, mode, temperature):
    expected = [s.tokens for s in Engine(policy, EngineConfig(Schedule("ar"))).rollout(requests("ar", temperature))]
    for planner in (None, Restless(8)):
        engine = Engine(policy, EngineConfig(Schedule("auto"), block_size=8, **mode))
        engine.planner = planner or engine.planner
        assert [s.tokens for s in engine.rollout(requests("coupled", temperature))] == expected
        assert engine.cache.free_pages == engine.cache.total_pages
        assert planner is None or len(planner.chosen) >= 7


@pytest.mark.parametrize("kinds", [{"two_pass"}, {"ar", "two_pass", "fused"}])
def test_what_is_counted_is_what_the_traces_say(policy, kinds):
    """Through the engine: samples of two kinds, some of which stop and some of which reach their limit."""
    engine = Engine(policy, EngineConfig(Schedule("auto"), block_size=8, max_batch=5))
    planner, schedules, past = engine.planner, [s for s in candidates(8) if s.kind in kinds], []

    def chosen():
        past.append(schedules[len(past) // 2 % len(schedules)])
        return planner._decision_of(past[-1], 8.0, 1.0, 1.0)

    planner._chosen = chosen
    asked = {request.id: replace(request, samples=9) for request in requests("lossless", 0.8)}
    done = engine.rollout(list(asked.values()))
    assert {sample.finish_reason for sample in done} == {"stop", "length"} and set(past) == set(schedules)
    planner._learn()
    counted = {kind_of(request.params): PlainSurvival(8, 0.5) for request in asked.values()}
    for sample in done:
        last, end = sample.trace[-1], len(sample.prompt_tokens) + len(sample.tokens) - 1
        for step in sample.trace:
            if step.drafted and (step is not last or sample.finish_reason == "stop"):
                accepted = min(step.accepted, end - step.anchor - 1)
                counted[kind_of(asked[sample.request_id].params)].note(step.anchor + 1 - step.draft_start, step.drafted, accepted)
    assert len(counted) == 2 and planner._survival.keys() == counted.keys()
    for kind, plain in counted.items():
        survival = planner._survival[kind]
        for each in (survival, plain):
            each._count(0), each._count(1)
        assert (np.array(survival._seen).reshape(plain._counted.shape) == plain._counted).all() and plain._counted.sum() > 100


def test_the_same_table_gives_the_same_samples(policy):
    def run():
        engine = Engine(policy, EngineConfig(Schedule("auto"), block_size=8, max_batch=4, repeatable=True))
        return [s.tokens for s in engine.rollout(requests("lossless", 1.0))], [d.schedule for d in engine.planner.log]

    assert run() == run()


def test_a_later_sample_is_not_taken_for_an_earlier_one(policy):
    """One engine after another request's samples are gone: nothing that was made for those may serve."""
    engine = Engine(policy, EngineConfig(Schedule("ar"), max_batch=1))
    for i in range(8):
        asked = RolloutRequest(f"{i}", prompt(3), SamplingParams("ar", max_tokens=6, ignore_eos=True), seed=i)
        fresh = Engine(policy, EngineConfig(Schedule("ar"), max_batch=1)).rollout([asked])
        assert engine.rollout([asked])[0].tokens == fresh[0].tokens


def test_calibration_leaves_nothing_behind_and_is_kept(policy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = Engine(policy, EngineConfig(Schedule("auto"), max_batch=2))
    assert (first.forwards, first.decode_tokens, first.has_work) == (0, 0, False)
    assert first.cache.free_pages == first.cache.total_pages
    (kept,) = (tmp_path / "blockroll" / "step_costs").iterdir()
    written = kept.read_bytes()
    again = Engine(policy, EngineConfig(Schedule("auto"), max_batch=2))
    assert again.planner.costs.seconds_at == first.planner.costs.seconds_at and kept.read_bytes() == written
    wider = Engine(policy, EngineConfig(Schedule("auto"), max_batch=3))
    assert set(wider.planner.costs.seconds_at["ar"]) == {1, 3}, "a table of its own, measured at one time"
    assert all(0 < s < math.inf for line in wider.planner.costs.seconds_at.values() for s in line.values())


def test_a_cache_that_cannot_be_written_is_said(policy, tmp_path, monkeypatch):
    (tmp_path / "blockroll").write_text("a file stands where the directory should")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="step times are measured again next time"):
        Engine(policy, EngineConfig(Schedule("auto"), max_batch=1, pages=4, page_size=8))


def test_a_table_that_says_a_step_takes_no_time() -> None:
    """A clock may leave a step out."""
    ar = Schedule("ar").within(4)
    costs = StepCosts({ar.label: {1: 0.0}}, context=10)
    costs.note(ar, 1, 10, 0.002)
    assert 0 < costs.seconds(ar, 1, 10) < 0.002
