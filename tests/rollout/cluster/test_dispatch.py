"""Dealing of work: real engine handles whose processes are not there; what would be sent to them is written down."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from blockroll.rollout.backend import Completed
from blockroll.rollout.cluster import prefixes
from blockroll.rollout.cluster.dispatch import Continuous, Dealer, Ordered
from blockroll.rollout.cluster.handle import EngineHandle
from blockroll.rollout.cluster.interruptions import Interruptions
from blockroll.rollout.cluster.pool import RayCluster
from blockroll.rollout.cluster.reports import Report
from blockroll.rollout.cluster.spec import EngineSpec
from blockroll.rollout.cluster.suspects import DEATHS, MOST_SOLO_DEATHS, SOLO_DEATHS, Suspects
from blockroll.rollout.cluster.work import Backlog
from blockroll.rollout.engine import EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams, Trajectory


class Journal:
    """Takes what is sent to an engine's process."""

    def __init__(self):
        self.added, self.asked, self.aborted = [], [], []
        self.add = SimpleNamespace(remote=self.added.append)
        self.give_back = SimpleNamespace(remote=self.asked.append)
        self.abort = SimpleNamespace(remote=self.aborted.append)


class Pool:
    """Engines, a backlog and a way to deal."""

    def __init__(self, engines=2, ordered=False, max_batch=4):
        self.backlog = Backlog()
        self.dealer = Dealer(self.backlog, max_batch)
        self.suspects = Suspects(self.dealer)
        self.strategy = Ordered(self.dealer, lambda: engines) if ordered else Continuous(self.dealer)
        self.engines = [EngineHandle(i, EngineSpec("none"), 600.0, 6.0) for i in range(engines)]
        for engine in self.engines:
            self.ready(engine)
        self.ended = []
        self.interruptions = Interruptions(self.engines, self.backlog, None, None, self.ended.append)

    @staticmethod
    def ready(engine):
        engine.phase, engine.actor, engine.steps = "ready", Journal(), 0

    def deal(self):
        self.suspects.deal(self.engines)
        self.strategy.deal(self.engines)

    def submit(self, *requests, client="a"):
        self.strategy.submit(self.backlog.add(requests, 1, [client] * len(requests)))
        self.deal()

    def finish(self, engine, request_id, number, tokens=10):
        """The engine hands out a sample."""
        nothing = [0.0] * tokens
        sample = Trajectory(request_id, number, (1,), [5] * tokens, *[nothing] * 4, "length", tokens)
        work = self.backlog.take(Completed(1, request_id, sample))
        self.dealer.take_back(engine, work, number)

    def die(self, engine):
        """The engine's process dies, and the next is ready at once. What has failed, by name."""
        go_on, failed = self.suspects.note_death(engine)
        self.ready(engine)
        self.strategy.again(go_on)
        for work in failed:
            self.backlog.forget(work)
        self.deal()
        return [work.request.id for work in failed]

    def give_back(self, engine, *samples, epoch=1):
        """The engine gives samples back, in one report; the pool takes it."""
        parts = dict(_backlog=self.backlog, _dealer=self.dealer, _strategy=self.strategy, _progress=[], watched=frozenset(),
                     _interruptions=self.interruptions)  # fmt: skip
        pool, report = SimpleNamespace(**parts), Report()
        report.returned = [(name, number, epoch) for name, number in samples]
        engine.note(report)
        RayCluster._take(pool, engine, report)

    def held(self):
        return [{work.request.id: sorted(numbers) for work, numbers in engine.samples.items()} for engine in self.engines]


def ask(name, samples=1, tokens=100, prompt=4):
    return RolloutRequest(name, (1,) * prompt, SamplingParams(max_tokens=tokens), samples=samples)


def test_work_goes_where_the_least_is_outstanding():
    pool = Pool()
    pool.submit(ask("long"), ask("short", tokens=10), ask("next", tokens=10))
    assert pool.held() == [{"long": [0]}, {"short": [0], "next": [0]}]


def test_an_engine_is_topped_up_to_half_a_batch_more_and_the_rest_waits():
    pool = Pool()
    pool.submit(*[ask(f"r{i}") for i in range(40)])
    assert [engine.count for engine in pool.engines] == [6, 6]
    pool.finish(pool.engines[0], "r0", 0)
    pool.deal()
    assert [engine.count for engine in pool.engines] == [6, 6] and pool.backlog.waiting == 27


def test_a_group_stays_together_and_the_last_one_is_split():
    pool = Pool()
    pool.submit(*[ask(f"g{i}", samples=4) for i in range(4)])
    assert pool.held()[0]["g0"] == [0, 1, 2, 3] and pool.held()[1]["g1"] == [0, 1, 2, 3]
    alone = Pool()
    alone.submit(ask("g", samples=4))
    assert [len(held["g"]) for held in alone.held()] == [2, 2]


def test_a_group_is_not_split_for_less_than_its_prompt_costs():
    pool = Pool()
    pool.submit(ask("g", samples=3, tokens=2, prompt=1000))
    assert sorted(len(held.get("g", [])) for held in pool.held()) == [0, 3]


def turn(name, tokens, samples=1, of=7):
    """A request of a conversation: the later turns begin with the earlier ones."""
    return RolloutRequest(name, (of, *range(1, tokens)), SamplingParams(max_tokens=100), samples=samples)


def after_a_first_turn(**options):
    """A pool whose second engine has served the first turn of a conversation."""
    pool = Pool(**options)
    pool.submit(ask("other", prompt=2), turn("first", 640))
    assert pool.held() == [{"other": [0]}, {"first": [0]}]
    pool.finish(pool.engines[0], "other", 0, tokens=100)
    pool.finish(pool.engines[1], "first", 0, tokens=100)
    return pool


def test_the_next_turn_of_a_conversation_goes_where_its_beginning_was_computed():
    pool = after_a_first_turn()
    pool.submit(turn("elsewhere", 640, of=8), turn("second", 700))
    assert pool.held() == [{"elsewhere": [0]}, {"second": [0]}]
    pool.submit(turn("third", 730))
    assert pool.held()[1].keys() == {"second", "third"} and pool.engines[1].outstanding < pool.engines[0].outstanding + 100


def test_a_conversation_moves_where_waiting_would_cost_more_than_its_prompt():
    pool = after_a_first_turn()
    pool.engines[1].outstanding = 2 * 640 / 8 + 10  # a prompt computed again has to save as much time as it costs
    pool.submit(turn("second", 700))
    assert pool.held()[0] == {"second": [0]}


@pytest.mark.parametrize("forget", ["version", "process", "off"])
def test_a_conversation_is_known_only_where_its_prompt_is_kept(forget):
    pool = after_a_first_turn()
    engine = pool.engines[1]
    second = pool.backlog.add([turn("second", 700)], 1, None)[0]
    assert engine.prompt_cost(second) == (700 - 640) / 8
    if forget == "version":
        engine.note_version(1)
    elif forget == "process":
        engine._clear()
    else:
        engine._spec = EngineSpec("none", EngineConfig(enable_prefix_caching=False))
    assert engine.prompt_cost(second) == 700 / 8


def test_clients_take_turns_and_one_below_its_share_finds_room_where_others_filled_it():
    pool = Pool(engines=1)
    pool.submit(*[ask(f"a{i}") for i in range(30)])
    pool.submit(ask("b", tokens=1), client="b")
    assert pool.held()[0].keys() >= {"b"} and pool.engines[0].count == 7
    pool.submit(*[ask(f"b{i}") for i in range(30)], client="b")
    assert pool.engines[0].clients["b"] <= 3


def test_a_client_is_forgotten_with_its_last_sample():
    pool = Pool(engines=1)
    pool.submit(ask("r", samples=2))
    pool.finish(pool.engines[0], "r", 0)
    assert pool.engines[0].clients == {"a": 1}
    pool.finish(pool.engines[0], "r", 1)
    assert not list(pool.engines[0].clients)


def test_samples_that_have_not_begun_are_asked_back_for_an_idle_engine():
    pool = Pool()
    pool.engines[1].phase = "loading"
    pool.submit(*[ask(f"r{i}") for i in range(6)])
    assert pool.engines[0].count == 6
    pool.engines[1].phase = "ready"
    pool.deal()
    pool.deal()
    assert pool.engines[0].actor.asked == [2]


def test_an_engine_whose_samples_have_all_begun_is_asked_once():
    """Its pages are few, so samples that have begun wait."""
    pool = Pool()
    pool.engines[1].phase = "loading"
    pool.submit(*[ask(f"r{i}") for i in range(6)])
    pool.engines[1].phase = "ready"
    for _ in range(3):
        pool.deal()
        pool.give_back(pool.engines[0])
    assert pool.engines[0].actor.asked == [2]
    pool.engines[0].note(Report(fresh=1))
    pool.deal()
    assert pool.engines[0].actor.asked == [2, 2]


def test_what_was_given_back_under_a_former_lease_stays_where_it_is():
    pool = Pool(engines=1)
    pool.submit(ask("r", samples=2))
    pool.give_back(pool.engines[0], ("r", 0), epoch=0)
    assert pool.held() == [{"r": [0, 1]}] and not pool.backlog.waiting


def test_samples_that_moved_to_an_engine_with_places_stay_there():
    """The engine with places has few samples, long ones: more tokens are outstanding there than at the other."""
    pool, moves = Pool(), 0
    pool.engines[0].phase = "loading"
    pool.submit(*[ask(f"long{i}") for i in range(2)])
    pool.engines[0].phase, pool.engines[1].phase = "ready", "loading"
    pool.submit(*[ask(f"short{i}", tokens=1) for i in range(6)])
    pool.engines[1].phase = "ready"
    pool.deal()
    for engine in pool.engines * 5:
        if engine.asked:
            moves += 1
            youngest = list(engine.samples)[-engine.actor.asked[-1] :]
            pool.give_back(engine, *[(work.request.id, 0) for work in youngest])
            pool.deal()
    assert ([engine.count for engine in pool.engines], moves) == ([4, 4], 1)


def test_what_a_dead_engine_had_goes_to_the_others_at_once_and_first():
    pool = Pool()
    pool.submit(*[ask(f"r{i}") for i in range(40)])
    had = pool.held()[0].keys()
    pool.engines[0].phase = "lost"
    go_on, failed = pool.suspects.note_death(pool.engines[0])
    pool.strategy.again(go_on)
    pool.deal()
    assert not failed and had <= pool.held()[1].keys() and pool.engines[1].count == 12
    assert sorted(part.order for parts in pool.engines[1].actor.added[1:] for part in parts) == sorted(
        int(name[1:]) for name in had)


def test_a_request_fails_only_after_it_has_killed_engines_alone():
    pool = Pool()
    pool.submit(*[ask(f"r{i}") for i in range(4)])
    deaths, blamed = 0, []
    while not blamed and deaths < 20:
        at = next((engine for engine, held in zip(pool.engines, pool.held()) if "r2" in held), None)
        if at is None:  # it waits for an engine that serves nothing else
            for engine, held in zip(pool.engines, pool.held()):
                for name in held:
                    pool.finish(engine, name, 0)
            pool.deal()
            continue
        deaths += 1
        blamed = pool.die(at)
    assert (blamed, deaths) == (["r2"], DEATHS + SOLO_DEATHS)
    assert not pool.backlog.works and not any(engine.reserved for engine in pool.engines)


def test_a_request_that_dies_alone_at_another_step_every_time_is_not_blamed_soon():
    pool = Pool()
    pool.submit(ask("r"))
    blamed, deaths = [], 0
    while not blamed:
        engine = next(engine for engine in pool.engines if engine.count)
        engine.steps = 10 * deaths
        blamed, deaths = pool.die(engine), deaths + 1
    assert deaths == DEATHS + MOST_SOLO_DEATHS


def test_steps_of_the_suspect_before_it_do_not_count_against_a_request():
    pool = Pool()
    pool.submit(ask("good"), ask("bad"))
    for work in pool.backlog.works.values():
        work.deaths = DEATHS - 1
    for engine in pool.engines:
        pool.die(engine)
    alone = next(engine for engine in pool.engines if engine.count)
    assert pool.held()[alone.id] == {"good": [0]}
    alone.steps = 50  # by its reports
    pool.finish(alone, "good", 0)
    pool.deal()
    blamed, deaths = [], 0
    while not blamed:
        blamed, deaths = pool.die(next(engine for engine in pool.engines if engine.count)), deaths + 1
    assert (blamed, deaths) == (["bad"], SOLO_DEATHS)


def test_while_a_suspect_is_alone_the_other_engines_serve_the_others():
    pool = Pool()
    pool.submit(ask("bad"))
    for _ in range(DEATHS):
        pool.die(next(engine for engine in pool.engines if engine.count))
    pool.submit(*[ask(f"r{i}") for i in range(4)])
    alone, other = sorted(pool.engines, key=lambda engine: not engine.reserved)
    assert [work.request.id for work in alone.samples] == ["bad"] and other.count == 4
    pool.finish(alone, "bad", 0)
    pool.deal()
    assert not alone.reserved


def test_where_nobody_else_serves_the_reserved_engine_serves_all():
    pool = Pool()
    pool.submit(ask("bad"))
    for _ in range(DEATHS):
        pool.die(next(engine for engine in pool.engines if engine.count))
    alone, other = sorted(pool.engines, key=lambda engine: not engine.reserved)
    pool.submit(*[ask(f"r{i}") for i in range(3)])
    other.phase = "lost"
    pool.strategy.again(pool.suspects.note_death(other)[0])
    pool.deal()
    assert {work.request.id for work in alone.samples} == {"bad", "r0", "r1", "r2"} and not alone.reserved


def test_a_suspect_waits_while_one_engine_of_two_serves():
    pool = Pool()
    pool.submit(ask("bad"))
    pool.backlog.works["bad"].deaths = DEATHS - 1
    died = next(engine for engine in pool.engines if engine.count)
    go_on, _ = pool.suspects.note_death(died)
    died.phase = "lost"
    pool.strategy.again(go_on)
    pool.deal()
    assert pool.held() == [{}, {}] and not any(engine.reserved for engine in pool.engines)
    pool.ready(died)
    pool.deal()
    assert sum(engine.count for engine in pool.engines) == 1 and pool.backlog.works["bad"].deaths == DEATHS


def test_a_suspect_that_is_aborted_is_given_to_nobody():
    """Two engines have it; one dies once too often with it, and the other goes on."""
    pool = Pool(max_batch=1)
    pool.submit(ask("bad", samples=2))
    work = pool.backlog.works["bad"]
    work.deaths = DEATHS - 1
    assert [engine.count for engine in pool.engines] == [1, 1]
    go_on, failed = pool.suspects.note_death(pool.engines[0])
    pool.ready(pool.engines[0])
    assert not go_on and not failed
    pool.interruptions.abort(["bad"])
    assert [item.trajectory.sample for item in pool.ended] == [0] and pool.engines[1].actor.aborted == [["bad"]]
    pool.deal()
    assert pool.held() == [{}, {"bad": [1]}] and not pool.engines[0].actor.added


def test_a_sample_that_comes_clears_a_request():
    pool = Pool()
    pool.submit(ask("g", samples=12))
    for _ in range(DEATHS - 1):
        pool.die(pool.engines[0])
    work = pool.backlog.works["g"]
    assert work.deaths == DEATHS - 1
    engine = next(engine for engine in pool.engines if engine.count)
    pool.finish(engine, "g", next(iter(engine.samples[work])))
    assert work.deaths == 0


def test_ordered_serves_shares_of_a_batch_one_at_a_time():
    pool = Pool(ordered=True)
    pool.submit(*[ask(f"r{i}", samples=3) for i in range(5)])
    pool.submit(ask("next"))
    assert pool.held() == [{f"r{i}": [0, 1, 2] for i in (0, 2, 4)}, {f"r{i}": [0, 1, 2] for i in (1, 3)}]
    for name in ("r1", "r3"):
        for number in range(3):
            pool.finish(pool.engines[1], name, number)
    pool.deal()
    assert pool.held()[1] == {"next": [0]}


def test_ordered_gives_what_a_dead_engine_had_to_the_next_free_one_whole():
    pool = Pool(ordered=True)
    pool.submit(*[ask(f"r{i}") for i in range(6)])
    pool.finish(pool.engines[0], "r2", 0)
    pool.die(pool.engines[0])
    assert pool.held()[0] == {"r0": [0], "r4": [0]}
    assert [part.request.id for part in pool.engines[0].actor.added[0]] == ["r0", "r4"]


def test_ordered_serves_what_an_engine_gave_back_as_one_share_in_its_order():
    pool = Pool(ordered=True)
    pool.submit(*[ask(f"r{i}", samples=2) for i in range(8)])
    pool.engines[1].draining = True
    pool.give_back(pool.engines[1], ("r7", 1), ("r7", 0), ("r5", 1), ("r5", 0), ("r3", 1))  # the youngest first, as engines do
    for i in range(0, 8, 2):
        for number in range(2):
            pool.finish(pool.engines[0], f"r{i}", number)
    pool.deal()
    assert [(part.request.id, part.numbers) for part in pool.engines[0].actor.added[-1]] == [
        ("r3", [1]), ("r5", [0, 1]), ("r7", [0, 1])]


def test_an_output_under_another_lease_or_twice_is_not_wanted():
    backlog = Backlog()
    [work] = backlog.add([ask("r", samples=2)], 7, None)
    sample = Trajectory("r", 0, (1,), [5], *[[0.0]] * 4, "length", 1)
    assert backlog.take(Completed(6, "r", sample)) is None
    assert backlog.take(Completed(7, "r", sample)) is work
    assert backlog.take(Completed(7, "r", sample)) is None
    assert backlog.take(Completed(7, "other", sample)) is None


@pytest.mark.parametrize(("change", "what"), [({"device": "gpu"}, "device"), ({"device": "cuda"}, "num_gpus"),
                                              ({"num_cpus": -1}, "num_cpus"), ({"placement": "here"}, "placement"),
                                              ({"resources": {"MI300X": float("nan")}}, "MI300X")])
def test_a_spec_that_cannot_be_is_refused_by_name(change, what):
    with pytest.raises(ValueError, match=rf"^{what}: "):
        EngineSpec("tiny-reasoner", **change)


def test_a_client_s_more_urgent_request_goes_before_the_others_that_wait():
    backlog = Backlog()
    requests = [RolloutRequest(name, (5,), priority=priority) for name, priority in (("a", 0), ("b", 3), ("c", -1), ("d", 0))]
    for work in backlog.add(requests, 1, ["x"] * 4):
        backlog.wait(work, [0])
    order = []
    while (work := backlog.next()) is not None:
        order.append(work.request.id)
        backlog.deal(work, 1)
    assert order == ["c", "a", "d", "b"]


def test_pages_that_were_given_last_are_remembered(monkeypatch):
    monkeypatch.setattr(prefixes, "MOST", 4)
    known, one, other = prefixes.Prefixes(), prefixes.pages_of(range(3 * 32 + 5)), prefixes.pages_of([1] * 64)
    assert len(one) == 3 and prefixes.pages_of(range(31)) == ()
    known.note(one)
    known.note(other)
    assert known.known(other) == 64 and known.known(one) == 64  # its third page was forgotten first
    assert known.known(prefixes.pages_of([*range(32), *[0] * 32])) == 32
