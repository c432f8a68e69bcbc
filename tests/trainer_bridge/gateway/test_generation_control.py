"""Pauses, aborted requests and relabelled weights: nothing is lost, and every token says the version that made it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bridge_parts import ToyBackend, request, until, weights, working

from blockroll.errors import ClusterError, StorageError, TransportError
from blockroll.rollout.backend import Completed
from blockroll.rollout.types import Trajectory
from blockroll.trainer_bridge.client import RolloutClient, ServiceControl, async_client, connect
from blockroll.trainer_bridge.client.async_client import AsyncRolloutClient
from blockroll.trainer_bridge.gateway import Gateway, aborting, message_router
from blockroll.trainer_bridge.gateway.backend_driver import BackendDriver
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire import messages

Serve = Callable[..., Gateway]


class Pausable(ToyBackend):
    """A backend that can be interrupted, and that takes weights while work is in flight.

    Attributes: most: samples that it ends in all, instead of so many per second; None for the latter.
    """

    in_flight_policies = ("finish", "keep", "abort")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.held, self.resets = False, 0
        self.most: int | None = None
        self._made = 0
        self.ended: list[Completed] = []

    def hold(self, held: bool) -> None:
        self.held = held

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def label_version(self, version: int) -> None:
        self.version = version

    def abort(self, request_ids: Sequence[str] | None = None) -> None:
        for work in [w for w in self._work if request_ids is None or w[1].id in request_ids]:
            self._work.remove(work)
            self.ended.append(Completed(work[0], work[1].id, Trajectory.aborted(work[1], work[2])))

    def poll(self, timeout: float) -> list[Completed]:
        ended, self.ended = self.ended, []
        if not self.held:
            if self.most is not None:
                self._allowance = float(self.most - self._made)
            made = super().poll(timeout)
            self._made += len(made)
            return ended + made
        time.sleep(0.002)
        self._last = time.monotonic()
        return ended

    def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray], in_flight: str = "finish") -> None:
        super().commit_weights(version, arrays)


def settled(client: RolloutClient) -> None:
    """requested = unique + failed, and no sample came twice."""
    figures = client.status()
    assert figures["requested"] == figures["unique"] + figures["failed"] and figures["missing"] == figures["duplicates"] == 0


def test_a_resume_finds_a_thread_while_every_call_of_generate_waits(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_client, "MAX_WAITING", 2)
    gateway = serve(Pausable())

    async def main() -> None:
        async with await AsyncRolloutClient.connect(gateway.address, client_id="u", timeout=20) as client:
            control = client.control()
            await control.pause("keep")
            calls = [asyncio.create_task(client.generate([request(f"r{i}")])) for i in range(5)]
            while (await client.status())["requested"] < 2:
                await asyncio.sleep(0.01)
            await control.resume()
            assert [len(found) for found in await asyncio.gather(*calls)] == [1] * 5

    asyncio.run(asyncio.wait_for(main(), 5))


def test_keep_holds_what_runs_and_queues_what_comes(serve: Serve) -> None:
    backend = Pausable(rate=0.0)
    gateway = serve(backend)
    with working(gateway, request("a", samples=40)) as (client, control):
        backend.most = 20
        until(lambda: gateway._driver.in_flight == 20)
        control.pause("keep")
        assert control.paused() == "keep" and backend.held
        client.submit([request("b", samples=3)])
        backend.most = 1000
        with pytest.raises(ClusterError, match=r"in_flight: the service is paused and holds 20 samples"):
            client.push_weights(1, weights(1))
        assert backend.batches == [(1, ["a"])]
        assert client.push_weights(1, weights(1), in_flight="keep") == 1
        control.resume()
        found = list(client.results(timeout=20))
        assert control.paused() == "" and len(found) == 43
        versions = {int(version) for t in found for version in t.versions}
        assert versions == {0, 1} and all(t.versions[0] == 1 for t in found if t.request_id == "b")
        settled(client)


def test_a_client_s_control_in_both_forms(serve: Serve) -> None:
    """A resume gets through while a pause waits."""
    backend = Pausable(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address, client_id="t") as client, client.control() as control:
        client.submit([request("a", samples=4), request("b")])
        until(lambda: gateway._driver.in_flight > 0)
        control.pause("keep")
        control.abort(["a"])
        control.resume()
        assert {t.finish_reason for _, t in zip(range(4), client.results(timeout=20), strict=False)} == {"abort"}

        async def main() -> None:
            async with await AsyncRolloutClient.connect(gateway.address, client_id="u", timeout=20) as twin:
                control = twin.control()
                pause = asyncio.create_task(control.pause("wait"))
                while await control.paused() != "wait":
                    await asyncio.sleep(0.01)
                await control.resume()
                with pytest.raises(ClusterError, match="the pause was ended"):
                    await pause
                await control.abort()
                assert (await control.status()).figures["outstanding"] == 0 and await control.label_version(3) == 3

        asyncio.run(asyncio.wait_for(main(), 20))
        assert [t.finish_reason for t in client.results(timeout=20)] == ["abort"] and client.status()["version"] == 3
        settled(client)


def test_wait_lets_what_runs_finish(serve: Serve) -> None:
    backend = Pausable(rate=0.0)
    gateway = serve(backend, max_in_flight=20)
    with working(gateway, request("a", samples=20)) as (client, control):
        for name in "bcd":
            client.submit([request(name, samples=20)])
        backend.rate = 100
        control.pause("wait", reset_cache=True)
        figures = client.status()
        assert gateway._driver.in_flight == 0 and 0 < int(figures["unique"]) < 80 and figures["outstanding"] == 80 - int(
            figures["unique"]) and backend.resets == 1  # fmt: skip
        backend.rate = 1e9
        time.sleep(0.1)
        assert client.status()["unique"] == figures["unique"]
        control.resume()
        assert len(list(client.results(timeout=20))) == 80
        settled(client)


def test_abort_answers_what_runs_and_what_waits(serve: Serve) -> None:
    backend = Pausable(rate=0.0)
    gateway = serve(backend, max_in_flight=20)
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        for i in range(300):
            client.submit([request(f"r{i}", samples=4)])
        until(lambda: gateway._driver.in_flight > 0)
        control.pause("abort")
        assert gateway._driver.in_flight == 0
        client.submit([request("later")])
        found = [t for _, t in zip(range(1200), client.results(timeout=20), strict=False)]
        assert len({t.key for t in found}) == 1200 and {t.finish_reason for t in found} == {"abort"}
        backend.rate = 1e9
        control.resume()
        assert [t.request_id for t in client.results(timeout=20)] == ["later"]
        settled(client)


def test_named_requests_are_aborted_and_the_others_go_on(serve: Serve) -> None:
    backend = Pausable(rate=0.0)
    gateway = serve(backend, max_in_flight=4)
    asked = request("runs", samples=4), request("queued", samples=2), request("other", samples=2)
    with working(gateway, *asked) as (client, control):
        control.abort(["runs", "queued", "unknown"])
        control.abort([])
        backend.rate = 1e9
        reasons = {t.key: t.finish_reason == "abort" for t in client.results(timeout=20)}
        assert len(reasons) == 8 and all(aborted == (name != "other") for (name, _), aborted in reasons.items())
        control.abort()
        settled(client)


def test_an_abort_of_more_than_one_transaction_takes_leases_nothing_of_it(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(aborting, "MOST_REQUESTS", 1)
    gateway = serve(Pausable(rate=0.0), max_in_flight=4)
    asked = [request(f"r{i}", samples=4) for i in range(12)]
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        for each in asked:
            client.submit([each])
        until(lambda: gateway._driver.in_flight == 4)
        control.abort([each.id for each in asked])
        assert {len(t.tokens) for t in client.results(timeout=10)} == {0}
        settled(client)


@pytest.mark.parametrize("how", ["abort", "pause", "names"])
def test_an_abort_answers_work_that_the_cluster_has_refused(how: str, serve: Serve) -> None:
    backend = Pausable()
    backend.broken = "no engine"
    gateway = serve(backend)
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        client.submit([request("a", samples=3)])
        until(lambda: bool(gateway._revoked))
        if how == "pause":
            control.pause("abort", timeout=10)
        else:
            control._act(partial(messages.Abort, ids=("a",) if how == "names" else ()), 5.0)
        assert [t.finish_reason for t in client.results(timeout=10)] == ["abort"] * 3
        settled(client)


def test_samples_that_an_abort_has_ended_are_delivered_though_the_disk_refuses_its_rest(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    gateway, any_open, failed = serve(Pausable(rate=0.0), max_in_flight=1), Ledger.any_open, list[str]()

    def once(self: Ledger, aborted: aborting.Aborted) -> bool:
        if not failed:
            failed.append("ledger.sqlite cannot be read")
            raise StorageError(failed[0])
        return any_open(self, aborted)

    with working(gateway, request("runs")) as (client, control):
        client.submit([request("queued", samples=3)])
        monkeypatch.setattr(Ledger, "any_open", once)
        control.abort(["queued"])
        assert failed and len([t for _, t in zip(range(3), client.results(timeout=2), strict=False)]) == 3


@pytest.mark.parametrize("names", [None, ["leased", "queued"]])
def test_an_abort_reaches_the_work_of_a_client_that_is_gone(
    names: list[str] | None, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(message_router, "PROBE_S", 0.1)  # the gateway sees that a client is gone when it writes to it
    backend = Pausable(rate=0.0)
    gateway = serve(backend, client_grace=0.2, max_in_flight=10)
    gone = connect(gateway.address, client_id="gone")
    for name in ("leased", "queued"):
        gone.submit([request(name, samples=8)])
    until(lambda: gateway._driver.in_flight > 0)
    gone.close(acknowledge=False)
    with connect(gateway.address, client_id="trainer") as trainer, trainer.control() as control:
        until(lambda: trainer.status()["outstanding"] == 0)  # paused
        control.abort(names)
        backend.rate = 1e9
    with connect(gateway.address, client_id="gone") as back:
        found = back.generate([request("leased", samples=8), request("queued", samples=8)], timeout=20)
        assert len(found) == 16 and {t.finish_reason for t in found} == {"abort"}
        settled(back)


def test_an_abort_reaches_work_that_waits_behind_a_commit(serve: Serve) -> None:
    backend = Pausable(rate=0.0)
    gateway = serve(backend)
    with working(gateway, request("runs")) as (client, control), ThreadPoolExecutor() as pool:
        pushed = pool.submit(client.push_weights, 1, weights(1))  # waits for `runs` to finish
        until(lambda: gateway._weights.busy)
        client.submit([request("behind", samples=2)])
        until(lambda: gateway._driver.in_flight == 3)
        control.abort()
        assert pushed.result(10) == 1
        assert sorted(t.key for t in client.results(timeout=10)) == [("behind", 0), ("behind", 1), ("runs", 0)]
        settled(client)


def test_a_resume_ends_a_pause_that_has_not_begun(serve: Serve) -> None:
    gateway = serve(Pausable(rate=0.0))
    with (working(gateway, request("a")) as (_, control), ServiceControl(gateway.address) as other,
          ThreadPoolExecutor() as pool):  # fmt: skip
        paused = pool.submit(control.pause, "wait")
        until(lambda: gateway._generation.mode == "wait")
        other.resume()
        with pytest.raises(ClusterError, match="ended before it had begun"):
            paused.result(10)
        other.abort()


def test_a_label_aborts_nothing_and_survives_a_restart(serve: Serve, tmp_path: Path) -> None:
    backend = Pausable(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        assert control.label_version(3) == backend.version == 3 and not list(tmp_path.glob("*.weights-*"))
        assert control.label_version(3) == 3
        with pytest.raises(TransportError, match="4 follows 2|less than 3"):
            control.label_version(2)
        gateway.stop()
        restarted = Pausable(rate=0.0)
    gateway = serve(restarted)
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        assert client.version == restarted.version == 3 and not client.status()["notice"]
        client.submit([request("a", samples=5)])
        until(lambda: gateway._driver.in_flight == 5)
        client.push_weights(4, weights(4), in_flight="keep")
        assert control.label_version(9) == restarted.version == 9 and gateway._driver.in_flight == 5
        assert [path.name for path in tmp_path.glob("*.weights-*")] == ["ledger.sqlite.weights-9"]
        gateway.stop()
    backend = Pausable()
    gateway = serve(backend)
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("a", samples=5)])
        assert len(list(client.results(timeout=20))) == 5 and backend.version == client.version == 9
        assert {name: a.tobytes() for name, a in backend.arrays.items()} == {n: a.tobytes() for n, a in weights(4).items()}
        assert client.push_weights(10, weights(4)) == 10
        settled(client)


def test_a_backend_that_cannot_be_interrupted_says_so(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    with ServiceControl(gateway.address) as control:
        for act in (control.pause, control.resume, control.abort, control.reset_prefix_cache):
            with pytest.raises(ClusterError, match="can neither be paused"):
                act()
        with pytest.raises(ClusterError, match="cannot label"):
            control.label_version(1)
        assert control.expected_weights()["embed.weight"] == ("float32", (32, 8))


def test_a_ledger_that_cannot_be_read_refuses_a_pause_and_serves_on(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway, newest, failed = serve(Pausable()), Ledger.newest, list[str]()

    def once(self: Ledger) -> int:
        if not failed:
            failed.append("ledger.sqlite cannot be read")
            raise StorageError(failed[0])
        return newest(self)

    monkeypatch.setattr(Ledger, "newest", once)
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        with pytest.raises(ClusterError, match="cannot be read"):
            control.pause("abort")
        assert control.paused() == "" and len(client.generate([request("a", samples=3)], timeout=10)) == 3
        control.pause("abort")
        assert control.paused() == "abort"
        control.resume()


def test_a_drain_ends_a_pause(serve: Serve) -> None:
    backend = Pausable(rate=0.0)
    gateway = serve(backend)
    with working(gateway, request("a", samples=20)) as (client, control):
        control.pause("keep")
        backend.rate = 1e9
        assert control.stop(drain=True, timeout=20) and gateway.wait(10)
        client.close(acknowledge=False)


@pytest.mark.parametrize("broken", [False, True])
def test_what_waits_for_a_driver_that_ends_is_told_so(broken: bool) -> None:
    """At a stop, behind a poll that takes its time; and behind a call that fails by a bug."""
    polls, go_on = threading.Event(), threading.Event()

    class Slow(Pausable):
        def poll(self, timeout: float) -> list[Completed]:
            polls.set()
            go_on.wait(10)
            return []

        def hold(self, held: bool) -> None:
            if held:
                raise KeyError("a bug")

    driver = BackendDriver(Slow(), lambda: None)
    assert polls.wait(10)
    calls = [driver.hold(broken), driver.reset_prefix_cache()]
    if not broken:
        driver.stop(0.0)
    go_on.set()
    errors = [call.exception(10) for call in calls]
    assert driver.stop(10)
    assert isinstance(errors[0], KeyError if broken else ClusterError) and isinstance(errors[1], ClusterError)
    assert "the gateway stops" in str(errors[1]) and driver.events.empty() is not broken
