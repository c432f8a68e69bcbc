"""Tasks that are cancelled, twice and while they wait for a thread, and tasks that have ended."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable

import pytest
from bridge_parts import ToyBackend, request

from blockroll.errors import TransportError
from blockroll.trainer_bridge.client import RequestRefused, async_client, connect
from blockroll.trainer_bridge.client.async_client import AsyncRolloutClient
from blockroll.trainer_bridge.gateway import Gateway

Serve = Callable[..., Gateway]


def test_a_call_that_waits_for_a_thread_is_cancelled_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_client, "MAX_WAITING", 2)
    gateway = serve(ToyBackend(rate=0.0))

    async def main() -> None:
        async with await AsyncRolloutClient.connect(gateway.address, client_id="t", timeout=20) as client:
            waiting = [asyncio.create_task(client.generate([request(f"r{i}")])) for i in range(3)]
            await asyncio.sleep(0.2)
            waiting[2].cancel()
            done, _ = await asyncio.wait(waiting, timeout=2, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            assert done == {waiting[2]} and (await client.status())["requested"] == 2

    asyncio.run(main())


def test_a_task_that_is_cancelled_twice_loses_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = serve(ToyBackend())
    taking, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        async with await AsyncRolloutClient.connect(gateway.address, client_id="t", timeout=20) as client:
            await client.submit([request("a")])
            take = client._client.take

            def slow(*arguments):
                found = take(*arguments)
                if not taking.is_set():
                    taking.set()
                    assert go_on.wait(10)
                return found

            monkeypatch.setattr(client._client, "take", slow)
            task = asyncio.create_task(anext(client.results()))
            while not taking.is_set():
                await asyncio.sleep(0.01)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.05)
            assert task.cancelled()
            go_on.set()
            await asyncio.sleep(0.1)
            assert [t.key async for t in client.results(timeout=5)] == [("a", 0)]

    asyncio.run(main())


def test_an_ended_task_is_freed_and_anyones_call_acknowledges_what_it_was_handed(serve: Serve) -> None:
    gateway = serve(ToyBackend())
    ended: list[weakref.ref[asyncio.Task[None]]] = []

    async def main() -> None:
        async with await AsyncRolloutClient.connect(gateway.address, client_id="t", timeout=20) as client:
            async def generate(i: int) -> None:
                await client.generate([request(f"r{i}")])

            for i in range(5):
                task = asyncio.create_task(generate(i))
                ended.append(weakref.ref(task))
                await task
            del task
            await asyncio.sleep(0.05)  # the loop and the threads of the calls let go of the tasks
            gc.collect()
            assert [task() for task in ended] == [None] * 5
            assert ("r4", 0) in client._client._handed.all()
            await client.submit([request("s")])
            assert client._client._handed.all() == []

    asyncio.run(main())


def test_a_cancellation_that_is_not_sent_does_not_hide_a_refusal(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = serve(ToyBackend())
    with connect(gateway.address, client_id="t") as client:
        client.submit([request("long", prompt=range(1, 100))])
        with monkeypatch.context() as patch:
            def fail(*_: object) -> None:
                raise TransportError("no gateway")

            patch.setattr(client, "_run_until", fail)
            with pytest.raises(TransportError, match="no gateway"):
                client.cancel(["long"])
        with pytest.raises(RequestRefused, match="64"):
            list(client.results(timeout=5))


def test_a_client_that_is_closed_says_so(serve: Serve) -> None:
    gateway = serve(ToyBackend())

    async def main() -> None:
        client = await AsyncRolloutClient.connect(gateway.address, client_id="t", timeout=20)
        control = client.control()
        await client.close()
        await client.close()
        for call in (lambda: client.generate([request("a")]), lambda: client.submit([request("a")]), client.status,
                     lambda: anext(client.results()), control.status, control.pause):  # fmt: skip
            with pytest.raises(TransportError, match="closed; connect again"):
                await call()

    asyncio.run(main())
