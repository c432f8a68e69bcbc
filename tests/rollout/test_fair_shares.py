"""Clients share an engine fairly, and no token depends on it."""

from __future__ import annotations

import pytest

import blockroll
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams


@pytest.fixture(scope="module")
def policy():
    return blockroll.load_policy("tiny-reasoner-terse")


def ask(name, tokens=40, samples=1, sampler="lossless", prompt=3):
    return RolloutRequest(name, (1, *range(5, 4 + prompt)), SamplingParams(sampler=sampler, max_tokens=tokens, ignore_eos=True),
                          samples=samples)


def serve(engine, arrivals):
    """Steps until nothing is left; `arrivals`: at step n these (request, client) come. Per sample trajectory and last step."""
    ended, step = {}, 0
    while engine.has_work or any(came >= step for came in arrivals):
        for request, client in arrivals.get(step, ()):
            engine.add_samples(request, range(request.samples), client)
        for trajectory in engine.step() if engine.has_work else ():
            ended[trajectory.key] = trajectory, step
        step += 1
    return ended


def test_a_short_request_of_a_second_client_takes_a_place_and_no_token_changes(policy):
    config = EngineConfig(Schedule("fused"), max_batch=4)
    long = [(ask(f"a{i}"), "a") for i in range(12)]
    alone, engine = serve(Engine(policy, config), {0: long}), Engine(policy, config)
    shared = serve(engine, {0: long, 4: [(ask("b", tokens=1), "b")]})
    assert shared["b", 0][1] == 4 and engine.scheduler.preemptions == 1
    for key, (expected, _) in alone.items():
        found = shared[key][0]
        assert found.tokens == expected.tokens and found.logprobs.tobytes() == expected.logprobs.tobytes()


def test_clients_with_much_work_have_the_same_number_of_places(policy):
    engine = Engine(policy, EngineConfig(Schedule("ar"), max_batch=6))
    for i in range(10):
        engine.add_samples(ask(f"a{i}"), [0], "a")
    for _ in range(3):
        engine.step()
    for client in "bc":
        engine.add_samples(ask(client, samples=10), range(10), client)
    for _ in range(3):
        engine.step()
    running = [sample.client for sample in engine.scheduler.running]
    assert {client: running.count(client) for client in "abc"} == {"a": 2, "b": 2, "c": 2}
    before = engine.scheduler.preemptions
    for _ in range(5):
        engine.step()
    assert engine.scheduler.preemptions == before  # nobody's turn is taken back


def test_the_oldest_sample_is_never_preempted_for_another_client(policy):
    engine = Engine(policy, EngineConfig(Schedule("ar"), block_size=2, max_batch=4, pages=12, page_size=4))
    arrivals = {0: [(ask("a", samples=6, tokens=12), "a")], **{n: [(ask(f"b{n}", tokens=3), "b")] for n in range(1, 12)}}
    ended = serve(engine, arrivals)
    assert len(ended) == 6 + 11 and engine.scheduler.preemptions > 0
    assert engine.cache.free_pages == engine.cache.total_pages
    assert ended["a", 0][1] <= min(step for key, (_, step) in ended.items() if key[0] == "a" and key[1] > 0)


def test_a_second_clients_prompt_is_prefilled_beside_a_first_ones(policy):
    engine = Engine(policy, EngineConfig(Schedule("ar"), max_batch=8, prefill_rows=16))
    work = {0: [(ask(f"a{i}", prompt=60), "a") for i in range(6)], 1: [(ask("b", tokens=1, prompt=12), "b")]}
    ended = serve(engine, work)
    assert ended["b", 0][1] < 6


def test_samples_are_given_back_only_before_they_begin_and_may_come_again(policy):
    config = EngineConfig(Schedule("fused"), max_batch=2)
    engine = Engine(policy, config)
    engine.add(ask("r", samples=6))
    engine.step()
    given = engine.scheduler.give_back(3)
    assert sorted(given) == [("r", 3), ("r", 4), ("r", 5)] and engine.scheduler.fresh == 2
    ended = [engine.step() for _ in range(2)]
    engine.add_samples(ask("r", samples=6), [4, 5])
    while engine.has_work:
        ended.append(engine.step())
    found = {t.sample: t.tokens for step in ended for t in step}
    anew = {t.sample: t.tokens for t in Engine(policy, config).rollout([ask("r", samples=6)])}
    assert found == {number: anew[number] for number in (0, 1, 2, 4, 5)}
    assert engine.scheduler.give_back(3) == [] and not engine.scheduler.serves("r")


@pytest.mark.timeout(60)
def test_a_request_stays_with_its_client(policy):
    """Whoever adds its later samples: a sample of another client in a group would be preempted and admitted for ever."""
    engine = Engine(policy, max_batch=4, schedule="fused")
    first, second = ask("a", samples=8), ask("b", samples=8)
    engine.add_samples(first, range(4), "one")
    engine.add_samples(second, range(8), "two")
    engine.step()
    engine.add_samples(first, range(4, 8), "two")
    assert len(serve(engine, {})) == 16
