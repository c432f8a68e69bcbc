"""Routes that are called directly answer as FastAPI has them answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, cast

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from blockroll.service.config import ServiceConfig
from blockroll.service.http.app import ROUTERS, create_app
from blockroll.service.http.direct_routes import DirectRoutes
from blockroll.service.http.keys import HttpKeys
from blockroll.service.http.request_fields import StreamOptions
from blockroll.service.http.routes import ApiRoute
from blockroll.service.http.state import HttpState, read_policy, state_of
from blockroll.settings import parse

BODIES: list[tuple[str, bytes]] = [("application/json", json.dumps(body).encode()) for body in (
    None, [], 7, {}, {"prompt": "a", "wrong": 1}, {"prompt": 7}, {"prompt": []}, {"prompt": "a", "n": 0},
    {"prompt": "a", "n": "1"}, {"prompt": "a", "stream_options": {"include_usage": 1}},
    {"prompt": "a", "model": "other"}, {"prompt": [1, 1 << 20]},
    {"prompt": "a", "max_tokens": 1 << 40}, {"messages": [{"role": "user", "content": "a"}]},
    {"messages": [{"role": 1}]},
    {"token_ids": [3], "sampling_params": {"temperature": -1}}, {"text": "a", "input_ids": [1]},
    {"input_ids": ["a"]})]  # fmt: skip
BODIES += [("application/json", b""), ("text/plain", b"{}"), ("application/json", b'{"n": NaN}'), ("application/json", b"{"),
           ("application/json", b"\xff"), ("application/json", b" " * 2000)]  # fmt: skip


def served_app(routers: Sequence[APIRouter]) -> FastAPI:
    """An application whose requests get no further than to the guards and to what a route checks."""
    config = parse({"policy": "tiny-reasoner", "http": {"max_body_bytes": 1024}}, ServiceConfig, "test")
    assert config.http is not None
    nothing = cast(Any, None)
    tokenizer, sizes = read_policy(config)
    state = HttpState(config, config.http, nothing, nothing, nothing, HttpKeys("key", None, True), tokenizer, None, sizes, 0,
                      nothing, nothing)  # fmt: skip
    app = create_app(state)
    for router in routers:
        if router not in ROUTERS:
            app.include_router(router)
    return app


broken = APIRouter(route_class=ApiRoute)


@broken.post("/broken")
async def fail_in_a_stream(body: StreamOptions, request: Request, state: Annotated[HttpState, Depends(state_of)]) -> Response:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"a piece"
        raise ZeroDivisionError

    return StreamingResponse(pieces())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/generate"])
def test_a_refused_request_is_answered_as_by_fastapi(path: str) -> None:
    app = served_app(ROUTERS)
    direct = DirectRoutes(app, ROUTERS)

    async def answers(served: Any) -> list[tuple[int, bytes, list[tuple[str, str]]]]:
        found = []
        transport = httpx.ASGITransport(served, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            for method, kind, body, key in [*(("POST", *each, "key") for each in BODIES), ("POST", *BODIES[3], "wrong"),
                                            ("GET", "application/json", b"", "key")]:  # fmt: skip
                answer = await client.request(method, path, content=body, headers={
                    "content-type": kind, "authorization": f"Bearer {key}"})  # fmt: skip
                found.append((answer.status_code, answer.content, sorted(answer.headers.items())))
        return found

    expected = asyncio.run(answers(app))
    assert asyncio.run(answers(direct)) == expected
    assert {400, 401, 405, 413, 415} <= {status for status, *_ in expected} <= {400, 401, 404, 405, 413, 415}


@pytest.mark.parametrize("wrap", [lambda app, routers: app, DirectRoutes])
def test_a_bug_in_a_stream_is_logged_and_a_client_that_goes_away_is_not(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    routers = [*ROUTERS, broken]
    served = wrap(served_app(routers), routers)
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer key")]

    async def ask(path: str, *messages: dict[str, Any]) -> list[dict[str, Any]]:
        sent, left = list[dict[str, Any]](), iter(messages)

        async def receive() -> dict[str, Any]:
            if (message := next(left, None)) is None:
                await asyncio.Event().wait()
            assert message is not None
            return message

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "http_version": "1.1",
                 "scheme": "http", "server": ("here", 80), "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await served(scope, receive, send)
        return sent

    part = {"type": "http.request", "body": b"{", "more_body": True}
    sent = asyncio.run(ask("/v1/completions", part, {"type": "http.disconnect"}))
    assert sent[0]["status"] == 499 and not caplog.records
    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask("/broken", {"type": "http.request", "body": b"{}"}))
    assert [record.getMessage() for record in caplog.records] == ["POST /broken failed"]
