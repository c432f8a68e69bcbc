"""Routes that are called directly answer as FastAPI has them answer."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import httpx
import pytest

from blockroll.service.config import ServiceConfig
from blockroll.service.http.app import ROUTERS, create_app
from blockroll.service.http.direct_routes import DirectRoutes
from blockroll.service.http.keys import HttpKeys
from blockroll.service.http.state import HttpState, read_policy
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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate", "/generate"])
def test_a_refused_request_is_answered_as_by_fastapi(path: str) -> None:
    config = parse({"policy": "tiny-reasoner", "http": {"max_body_bytes": 1024}}, ServiceConfig, "test")
    assert config.http is not None
    nothing = cast(Any, None)  # no request gets as far as the gateway
    tokenizer, sizes = read_policy(config)
    state = HttpState(config, config.http, nothing, nothing, nothing, HttpKeys("key", None, True), tokenizer, None, sizes, 0,
                      nothing, nothing)  # fmt: skip
    app = create_app(state)
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
