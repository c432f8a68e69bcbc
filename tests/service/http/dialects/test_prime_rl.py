"""What prime-rl's orchestrator and its environments send, as read in its repository at 559b4477 (August 2026):
`src/prime_rl/utils/client.py` (health, models, pause, update, resume), `src/prime_rl/orchestrator/envs.py` (cache salt), and the
client of its package renderers 0.1.12 (`renderers/client.py: generate`)."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from dialect_parts import POLICY, Live
from own_trainers import own_client

HEADERS = {"X-Session-ID": "rollout-1"}


def body(**more: Any) -> dict[str, Any]:
    params = {"temperature": 1.0, "max_tokens": 16, "stop_token_ids": [1], "logprobs": 1, "skip_special_tokens": False}
    return {"model": POLICY, "token_ids": [5, 6, 7], "sampling_params": params | more, "cache_salt": "3", "priority": 0}


def generate(live: Live, **more: Any) -> Any:
    return live.post("/inference/v1/generate", body(**more), headers=HEADERS)


def test_start(live: Live) -> None:
    assert live.get("/health") == ""
    [model] = live.get("/v1/models")["data"]
    assert model["id"] == POLICY and model["max_model_len"] == 512


def test_a_completion_has_what_the_client_reads(live: Live) -> None:
    answer = generate(live)
    choice = answer["choices"][0]
    assert answer["request_id"] and choice["finish_reason"] in ("stop", "length") and answer["usage"]["prompt_tokens"] == 3
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert all(isinstance(entry["logprob"], float) and entry["logprob"] <= 0 for entry in content)


def test_experts_come_as_bytes(live: Live) -> None:
    choice = generate(live, routed_experts=True)["choices"][0]
    packed = choice["routed_experts"]
    rows = np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])
    assert packed["start"] == 0 and rows.shape[0] == 3 + len(choice["token_ids"]) - 1 and rows.shape[2] == 1


def test_a_prompt_is_scored_by_prefill(live: Live) -> None:
    answer = generate(live, max_tokens=1, top_p=1.0, prompt_logprobs=1)
    first, *rest = answer["prompt_logprobs"]
    assert first is None and [row[str(token)]["logprob"] <= 0 for token, row in zip((6, 7), rest, strict=True)] == [True, True]


def test_an_update_of_its_policy(live: Live) -> None:
    version = live.version()
    long = body(max_tokens=300, stop_token_ids=[], ignore_eos=True)
    with live.in_flight("/inference/v1/generate", long, headers=HEADERS) as [running]:
        live.post("/pause", params={"mode": "keep", "clear_cache": "false"})
    try:
        live.post("/update_weights", {"weight_dir": live.weights().as_posix()})
    finally:
        live.post("/resume")
    spans = running.result(60)["choices"][0]["weight_versions"]
    assert [span["version"] for span in spans] == [version, version + 1]
    live.settled()


def test_its_own_parser_accepts_the_answer(live: Live) -> None:
    found = own_client("prime-rl", live.url)
    assert len(found["tokens"]) == len(found["logprobs"]) > 0
