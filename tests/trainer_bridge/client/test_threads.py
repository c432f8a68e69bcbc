"""Calls from several threads, and the asyncio twin: each trajectory once, nothing acknowledged for another caller."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from bridge_parts import ToyBackend, assert_same, make_trajectory, request, until, weights

from blockroll.errors import RequestError, TransportError
from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.client.async_client import AsyncRolloutClient
from blockroll.trainer_bridge.gateway import Gateway

Serve = Callable[..., Gateway]


def test_one_thread_submits_while_another_takes_results(serve: Serve) -> None:
    gateway = serve(ToyBackend(rate=3000.0))
    with connect(gateway.address, client_id="t", timeout=20) as client:
        seen: list[tuple[str, int]] = []
        client.submit([request("first")])

        def submit() -> None:
            for i in range(60):
                client.submit([request(f"r{i}-{j}", 2) for j in range(3)])

        def take() -> None:
            while len(seen) < 361:
                seen.extend(t.key for t in client.results(timeout=10))

        with ThreadPoolExecutor() as pool:
            for future in [pool.submit(submit), pool.submit(take)]:
                future.result(60)
        assert sorted(seen) == sorted([("first", 0), *((f"r{i}-{j}", k) for i in range(60) for j in range(3) for k in range(2))])
        assert client.delivery["missing"] == client.delivery["duplicates"] == 0


def test_many_threads_generate_at_once(serve: Serve) -> None:
    with connect(serve(ToyBackend(rate=2000.0)).address, client_id="t", timeout=20) as client:
        def work(number: int) -> None:
            for turn in range(5):
                asked = [request(f"{number}-{turn}-{i}", 3, seed=number) for i in range(4)]
                found = client.generate(asked, timeout=20)
                assert [t.key for t in found] == [(r.id, i) for r in asked for i in range(3)]
                assert_same(found[0], make_trajectory(asked[0], 0))
                assert int(client.status()["requested"]) >= 12

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert client.delivery == {"requested": 480, "unique": 480, "duplicates": 0, "failed": 0, "missing": 0}


def test_a_thread_does_not_acknowledge_what_another_works_on(serve: Serve) -> None:
    with connect(serve(ToyBackend()).address, client_id="t") as client:
        client.submit([request("mine", 3)])
        mine = next(iter(client.results(timeout=10)))
        thread = threading.Thread(target=lambda: client.generate([request("other", 2)], timeout=10))
        thread.start()
        thread.join(10)
        assert mine.request_id == "mine"
        assert client.status()["acknowledged"] == 0
        client.submit([request("next")])
        until(lambda: client.status()["acknowledged"] == 1)


def test_a_request_is_collected_by_one_call(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend).address, client_id="t") as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.generate, [request("a", 2)], 20)
        until(lambda: bool(client._pending.claims))
        with pytest.raises(RequestError, match="'a' is being collected by another call"):
            client.generate([request("a", 2)])
        backend.rate = 1e9
        assert len(first.result(20)) == 2


def test_close_ends_the_calls_of_other_threads(serve: Serve) -> None:
    client = connect(serve(ToyBackend(rate=0.0)).address)
    with ThreadPoolExecutor() as pool:
        waits = [pool.submit(client.generate, [request(f"r{i}")]) for i in range(3)]
        until(lambda: len(client._pending.claims) == 3)
        time.sleep(0.1)
        client.close()
        for each in waits:
            with pytest.raises(TransportError, match="this client is closed"):
                each.result(5)


def test_a_deadline_cancels_what_is_unfinished(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    with connect(serve(backend).address, client_id="t") as client:
        start = time.monotonic()
        with pytest.raises(RequestRefused, match=r"its deadline of 0\.4 s has passed"):
            client.generate([request("a", 5)], deadline_seconds=0.4)
        assert time.monotonic() - start < 5
        until(lambda: not backend._work)
        backend.rate = 1e9
        assert len(client.generate([request("b", 5)], deadline_seconds=30)) == 5
        assert client.delivery["missing"] == 0 == client.status()["missing"]


def test_asyncio_submits_generates_iterates_and_pushes_at_once(serve: Serve) -> None:
    gateway = serve(ToyBackend(rate=2000.0))

    async def main() -> None:
        async with await AsyncRolloutClient.connect(gateway.address, client_id="t", timeout=20) as client:
            await client.submit([request("s", 20)])
            streams = client.results(timeout=10)
            groups = [client.generate([request(f"g{i}", 4)], timeout=20) for i in range(30)]
            first, *found = await asyncio.gather(anext(streams), *groups)
            assert first.request_id == "s" and [len(group) for group in found] == [4] * 30
            assert await client.push_weights(1, weights(1)) == 1 == client.version
            keys = [first.key, *[t.key async for t in streams]]
            assert sorted(keys) == [("s", i) for i in range(20)]
            assert client.delivery == {"requested": 140, "unique": 140, "duplicates": 0, "failed": 0, "missing": 0}
            assert (await client.status())["missing"] == 0
            with pytest.raises(RequestRefused, match="64"):
                await client.generate([request("long", prompt=range(1, 100))])

    asyncio.run(main())
    assert gateway._ledger.counters.acknowledged == 140


def test_a_task_that_is_cancelled_loses_nothing(serve: Serve) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)

    async def main() -> None:
        async with await AsyncRolloutClient.connect(gateway.address, client_id="t", ack="manual", timeout=20) as client:
            await client.submit([request("s", 3)])
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(client.results()), 0.2)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate([request("g", 2)]), 0.2)
            cancelling = asyncio.create_task(client.generate([request("c", 2)]))
            await asyncio.sleep(0.2)
            await client.cancel(["c"])
            with pytest.raises(RequestRefused, match="cancelled by its client") as caught:
                await cancelling
            backend.rate = 1e9
            found = [t async for t in client.results(timeout=10)]
            assert sorted(t.key for t in found) == [("g", 0), ("g", 1), ("s", 0), ("s", 1), ("s", 2)]
            await client.acknowledge([*found, caught.value])
            assert client.delivery["missing"] == 0

    asyncio.run(main())
    assert gateway._ledger.counters.acknowledged == 5
