"""Control calls of trainers beside each other, without engines."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from blockroll.errors import ClusterError
from blockroll.service.http.dispatch import Dispatch
from blockroll.service.http.http_errors import HttpError
from blockroll.service.http.trainer_control import MAX_CALLS, TrainerControl
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway

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
