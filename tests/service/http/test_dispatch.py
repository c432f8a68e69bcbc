"""The HTTP face as a client of a gateway, without engines."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from blockroll.errors import TransportError
from blockroll.rollout.types import RolloutRequest
from blockroll.service.http.dispatch import Dispatch
from blockroll.service.http.http_errors import HttpError
from blockroll.trainer_bridge.client import RolloutClient, ServiceControl
from blockroll.trainer_bridge.gateway import Gateway

sys.path.insert(0, str(Path(__file__).parents[2] / "trainer_bridge"))
from bridge_parts import ToyBackend


@pytest.mark.parametrize("method", ["take_some", "submit"])
def test_work_that_nobody_waits_for_any_more_is_cancelled(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that was silent for too long, once, has what it was sent all the same."""
    call, failed = getattr(RolloutClient, method), list[str]()

    def once(self: RolloutClient, *arguments: Any) -> Any:
        if method == "submit":
            call(self, *arguments)
        if not failed and self._pending.outstanding:
            failed.append(method)
            raise TransportError("the gateway is silent")
        return call(self, *arguments)

    monkeypatch.setattr(RolloutClient, method, once)
    with Gateway(ToyBackend(rate=1e-9), "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite") as gateway:
        dispatch = Dispatch(gateway, None, 100)
        try:
            asyncio.run(asyncio.wait_for(_ask(dispatch), 10))
            with ServiceControl(gateway.address) as control:
                for _ in range(100):
                    if not control.status().figures["outstanding"]:
                        break
                    time.sleep(0.05)
                assert (control.status().figures["outstanding"], dispatch.unfinished) == (0, 0)
        finally:
            dispatch.close()


def test_later_samples_of_a_request_are_not_refused_for_those_that_came_meanwhile(tmp_path: Path) -> None:
    async def main(dispatch: Dispatch) -> None:
        wanted = [RolloutRequest(dispatch.new_id(), (1,), samples=4) for _ in range(3)]
        async with dispatch.open(wanted[:1]), dispatch.open(wanted[1:2], admitted=True):
            assert dispatch.unfinished == 8
            with pytest.raises(HttpError, match="max_unfinished"):
                dispatch.open(wanted[2:])

    with Gateway(ToyBackend(rate=1e-9), "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite") as gateway:
        dispatch = Dispatch(gateway, None, 4)
        try:
            asyncio.run(main(dispatch))
        finally:
            dispatch.close()


async def _ask(dispatch: Dispatch) -> None:
    with pytest.raises(TransportError, match="silent"):
        async with dispatch.open([RolloutRequest(dispatch.new_id(), (1,), samples=3)]) as answers:
            async for _ in answers:
                pass
