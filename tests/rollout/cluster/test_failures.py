"""Engines that are killed, stopped, or killed by a request, in the middle of much work. Real Ray, real processes; minutes."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter

import pytest
import ray

from blockroll.rollout.cluster import EngineSpec, RayCluster
from blockroll.rollout.cluster.suspects import DEATHS, SOLO_DEATHS
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway

pytestmark = pytest.mark.slow
POLICY, CONFIG = "tiny-reasoner", EngineConfig(max_batch=8)
KILLS, SEED = int(os.environ.get("BLOCKROLL_KILLS", "60")), 0


def batch(name, count, tokens=300, samples=1):
    params = SamplingParams(sampler="coupled", max_tokens=tokens, ignore_eos=True)
    return [RolloutRequest(f"{name}-{i}", (1, 5 + i % 30, 9), params, seed=i, samples=samples) for i in range(count)]


def undisturbed(work):
    """Per sample its tokens and log-probabilities, from one engine."""
    return {t.key: (t.tokens, t.logprobs.tobytes()) for t in Engine(POLICY, CONFIG).rollout(work)}


class Watch:
    """Kills or stops engines now and then, and notes how long what they had is with no other, where there is another."""

    def __init__(self, cluster, how, seed=SEED, kills=KILLS):
        self.cluster, self.how, self.rng, self.left = cluster, how, random.Random(seed), kills
        self.next, self.homeless, self.seconds, self.hit = time.monotonic() + 3.0, {}, [], set()

    def survivors(self):
        """Engines that serve, but for those that have been hit and not been missed yet."""
        return [engine for engine in self.cluster._engines if engine.phase == "ready" and engine.home.pid not in self.hit]

    def look(self):
        now, works = time.monotonic(), self.cluster._backlog.works
        placed = Counter((work, number) for engine in self.cluster._engines for work, numbers in engine.samples.items()
                         for number in numbers if engine.home and engine.home.pid != self.homeless.get((work, number), (0, 0))[1])
        for key, (since, _) in list(self.homeless.items()):
            if placed[key] or works.get(key[0].request.id) is not key[0] or key[1] in key[0].done:
                self.seconds.append(now - since)
                del self.homeless[key]
        if not self.survivors():  # there is no other to go to, so time does not count
            self.homeless = {key: (now, pid) for key, (_, pid) in self.homeless.items()}
        if self.left and now >= self.next:
            victims = [engine for engine in self.survivors() if engine.samples]
            if victims:
                victim = self.rng.choice(victims)
                os.kill(victim.home.pid, self.how)
                self.hit.add(victim.home.pid)
                if self.survivors():
                    for work, numbers in victim.samples.items():
                        self.homeless.update({(work, number): (now, victim.home.pid) for number in numbers})
                self.left -= 1
            # Where nobody serves, nobody dies: an engine is not killed at the moment at which it is ready.
            self.next = now + self.rng.uniform(3.0, 9.0)


def serve(cluster, work, watch):
    """Serves everything while `watch` looks on. Per sample its tokens and log-probabilities."""
    cluster.submit(work, 1)
    found, wanted = {}, sum(request.samples for request in work)
    while len(found) < wanted:
        for item in cluster.poll(0.02):
            assert item.error is None, item.error
            assert item.trajectory.key not in found
            found[item.trajectory.key] = item.trajectory.tokens, item.trajectory.logprobs.tobytes()
        watch.look()
    return found


def percentile(seconds, part):
    return sorted(seconds)[min(len(seconds) - 1, int(part * len(seconds)))]


@pytest.mark.parametrize(("how", "kills", "most"), [(signal.SIGKILL, KILLS, 2.0), (signal.SIGSTOP, max(2, KILLS // 12), 10.0)],
                         ids=["killed", "stopped"])
def test_engines_die_at_random_and_nothing_is_refused_missing_or_twice(how, kills, most, capsys):
    cluster = RayCluster(EngineSpec(POLICY, CONFIG, device="cpu"), engines=2)
    found, rounds, watch = {}, 0, Watch(cluster, how, kills=kills)
    try:
        while watch.left:  # the same 500 requests again, until all engines that are to die have died
            rounds += 1
            work = batch(f"round{rounds}", 500)
            found.update(serve(cluster, work, watch))
        restarts = cluster.restarts
    finally:
        cluster.close()
    with capsys.disabled():
        print(f"\n{kills} x {how.name}: {rounds} x 500 requests, {restarts} restarts, {len(watch.seconds)} samples found "
              f"another engine: median {percentile(watch.seconds, 0.5):.2f} s, p99 {percentile(watch.seconds, 0.99):.2f} s")
    expected = undisturbed(batch("round1", 500))
    assert {(key[0].split("-")[1], key[1]): value for key, value in found.items() if key[0].startswith("round1-")} == {
        (key[0].split("-")[1], key[1]): value for key, value in expected.items()}
    assert len(found) == 500 * rounds and restarts >= kills
    assert percentile(watch.seconds, 0.99) <= most


@pytest.mark.parametrize("dispatch", ["continuous", "ordered"])
@pytest.mark.parametrize("engines", [1, 2, 3, 4])
def test_tokens_are_the_same_with_any_number_of_engines(engines, dispatch):
    work = batch("same", 40, tokens=60, samples=3)
    cluster = RayCluster(EngineSpec(POLICY, CONFIG, device="cpu"), engines=engines, dispatch=dispatch)
    try:
        found = serve(cluster, work, Watch(cluster, signal.SIGKILL, kills=1 if engines > 1 else 0))
    finally:
        cluster.close()
    assert found == undisturbed(work)


def test_a_request_that_kills_engines_fails_by_name_and_the_others_are_served():
    def die(prefix, logits):
        import os

        os._exit(1)

    bad = RolloutRequest("bad", (1, 5), SamplingParams(sampler="coupled", max_tokens=8, logits_processors=[die]))
    cluster = RayCluster(EngineSpec(POLICY, CONFIG, device="cpu"), engines=2)
    try:
        cluster.submit([*batch("good", 30), bad, *batch("more", 30)], 1)
        done = []
        while len(done) < 61:
            done += cluster.poll(0.5)
        assert [item.request_id for item in done if item.error] == ["bad"]
        why = next(item.error for item in done if item.error)
        assert f"{SOLO_DEATHS} engines in a row died" in why and "\n" not in why
        assert cluster.restarts == DEATHS + SOLO_DEATHS
    finally:
        cluster.close()


def test_eight_engines_see_one_of_eight_gpus_each_and_a_ninth_waits(policy_dir):
    ray.init(num_cpus=16, num_gpus=8, resources={"MI300X": 8}, include_dashboard=False, log_to_driver=False)
    try:
        spec = EngineSpec(policy_dir, CONFIG, device="cpu", num_gpus=1, resources={"MI300X": 1}, num_cpus=0.5)
        cluster = RayCluster(spec, engines=8)
        seen = [engine.home.gpus for engine in cluster._engines]
        assert len(set(seen)) == 8 and all(name.partition("=")[2].isdecimal() for name in seen)
        start = time.monotonic()
        cluster.scale(9)
        while not any(engine.state == "waiting" for engine in cluster.engines()):
            cluster.poll(0.2)
            assert time.monotonic() - start < 10.0
        assert "0 of 8 GPU are free" in cluster.engines()[8].reason
        cluster.submit(batch("r", 20, tokens=10), 1)
        done = []
        while len(done) < 20:
            done += cluster.poll(0.5)
        cluster.close()
    finally:
        ray.shutdown()


def test_a_one_token_request_behind_thirty_long_ones(tmp_path, capsys):
    cluster = RayCluster(EngineSpec(POLICY, CONFIG, device="cpu"), engines=2)
    try:
        with Gateway(cluster, "tcp://127.0.0.1:*", tmp_path / "ledger") as gateway:
            with connect(gateway.address, client_id="first") as first, connect(gateway.address, client_id="second") as second:
                first.submit(batch("long", 30, tokens=600, samples=4))
                stream, waits = first.results(timeout=600), []
                next(stream)
                for i in range(10):
                    start = time.monotonic()
                    second.generate(batch(f"short{i}", 1, tokens=1), timeout=60)
                    waits.append(time.monotonic() - start)
                assert len(list(stream)) == 119
    finally:
        cluster.close()
    with capsys.disabled():
        print(f"\none token behind 30 long requests: {', '.join(f'{wait:.2f}' for wait in waits)} s")
    assert max(waits) <= 1.0
