"""Control calls of trainers beside each other, without engines."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

import pytest

from blockroll.errors import ClusterError
from blockroll.service.http import trainer_control
from blockroll.service.http.dispatch import Dispatch
from blockroll.service.http.http_errors import HttpError
from blockroll.service.http.trainer_control import MAX_CALLS, TrainerControl
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.wire.keys import ClientKeys, CurveKeys

sys.path.insert(0, str(Path(__file__).parents[2] / "trainer_bridge"))
from bridge_parts import Endless, request, until


def test_a_resume_gets_through_however_many_pauses_wait(tmp_path: Path) -> None:
    """A trainer that gives up on a pause and asks again leaves the one before waiting."""
    with (Gateway(Endless(), "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite") as gateway,
          connect(gateway.address) as client):  # fmt: skip
        client.submit([request("a")])
        until(lambda: gateway._driver.in_flight > 0)
        dispatch = Dispatch(gateway, None, 10)
        control = TrainerControl(gateway, None, dispatch)

        async def ask() -> None:
            pauses = [asyncio.ensure_future(control.pause("wait", reset_cache=False, refuse=True)) for _ in range(MAX_CALLS)]
            while gateway.paused != "wait":
                await asyncio.sleep(0.01)
            with pytest.raises(HttpError, match=f"{MAX_CALLS} calls wait already") as error:
                await control.pause("keep", reset_cache=False, refuse=False)
            assert error.value.status == 429 and dispatch.refuses()
            await asyncio.wait_for(control.resume(), 10)
            assert gateway.paused == "" and not dispatch.refuses()
            ended = await asyncio.gather(*pauses, return_exceptions=True)
            assert all(isinstance(each, ClusterError) for each in ended)

        try:
            asyncio.run(asyncio.wait_for(ask(), 30))
        finally:
            control.close()
            dispatch.close()


def test_a_call_behind_the_end_of_the_service_is_told_so(tmp_path: Path) -> None:
    with Gateway(Endless(), "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite") as gateway:
        dispatch = Dispatch(gateway, None, 10)
        control = TrainerControl(gateway, None, dispatch)
        control.close()
        dispatch.close()
        for ask in (control.resume, lambda: control.label(1), lambda: control.label(1)):
            with pytest.raises(HttpError, match="the service stops"):
                asyncio.run(ask())


def test_calls_that_wait_for_a_thread_at_the_end_of_the_service_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a call whose own task is cancelled is a cancelled task."""
    monkeypatch.setattr(trainer_control, "MAX_CALLS", 1)
    with Gateway(Endless(), "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite") as gateway:
        dispatch, busy = Dispatch(gateway, None, 10), threading.Event()
        control = TrainerControl(gateway, None, dispatch)

        async def ask() -> None:
            control._calls.submit(busy.wait)
            calls = [asyncio.ensure_future(each) for each in (control.resume(), control.label(1), control.reset_prefix_cache())]
            await asyncio.sleep(0)  # each has asked for a thread
            calls[2].cancel()
            control.close()
            busy.set()
            ended = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(each, HttpError) and each.status == 503 for each in ended[:2]), ended
            assert isinstance(ended[2], asyncio.CancelledError)

        try:
            asyncio.run(asyncio.wait_for(ask(), 30))
        finally:
            busy.set()
            control.close()
            dispatch.close()


def test_an_update_that_was_never_made_stands_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose session cannot be opened, and one that is given up while it waits for a thread."""
    monkeypatch.setattr(trainer_control, "MAX_CALLS", 1)
    with Gateway(Endless(), "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite") as gateway:
        dispatch, busy = Dispatch(gateway, None, 10), threading.Event()
        without_control_key = ClientKeys(CurveKeys.generate().public, CurveKeys.generate())
        keyless, control = TrainerControl(gateway, without_control_key, dispatch), TrainerControl(gateway, None, dispatch)

        async def ask() -> None:
            for _ in range(2):
                with pytest.raises(HttpError, match="needs a control key"):
                    await keyless.label(1)
            control._calls.submit(busy.wait)
            given_up = asyncio.ensure_future(control.label(1))
            await asyncio.sleep(0)
            with pytest.raises(HttpError, match="another weight update is under way"):
                await control.label(1)
            given_up.cancel()
            await asyncio.wait([given_up])
            busy.set()
            assert await control.label(1) == 1

        try:
            asyncio.run(asyncio.wait_for(ask(), 30))
        finally:
            busy.set()
            for each in (keyless, control):
                each.close()
            dispatch.close()
