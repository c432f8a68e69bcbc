"""What SkyRL 0.3.0 sends with `generator.inference_engine.external_server_urls`, as read in its wheel:
`skyrl/backends/skyrl_train/inference_servers/remote_inference_client.py` and `engine_utils.py: get_vllm_sampling_params`."""

from __future__ import annotations

from typing import Any

from dialect_parts import POLICY, Live
from own_trainers import own_client

PARAMS = {"min_tokens": 1, "skip_special_tokens": True, "include_stop_str_in_output": True, "max_tokens": 16, "temperature": 1.0,
          "top_p": 1.0, "top_k": -1, "min_p": 0.0, "logprobs": 1, "stop": None}  # fmt: skip


def body(**more: Any) -> dict[str, Any]:
    return {"sampling_params": PARAMS | more, "model": POLICY, "token_ids": [5, 6, 7], "cache_salt": "0"}


def test_generation(live: Live) -> None:
    choice = live.post("/inference/v1/generate", body(), headers={"X-Session-ID": "7"})["choices"][0]
    assert [entry["logprob"] <= 0 for entry in choice["logprobs"]["content"]] == [True] * len(choice["token_ids"])
    assert choice["finish_reason"] in ("stop", "length")


def test_generation_with_routed_experts(live: Live) -> None:
    choice = live.post("/skyrl/v1/generate", body())["choices"][0]
    assert len(choice["routed_experts"]) == 3 + len(choice["token_ids"]) - 1
    assert all(len(layer) == 1 for row in choice["routed_experts"] for layer in row)


def test_a_tinker_sample(live: Live) -> None:
    params = {"n": 2, "logprobs": 0, "output_kind": 2, "prompt_logprobs": 2, "max_tokens": 8, "seed": 5, "temperature": 1.0}
    answer = live.post("/inference/v1/generate", {"sampling_params": params, "model": POLICY, "token_ids": [5, 6, 7]})
    assert [len(choice["logprobs"]["content"]) for choice in answer["choices"]] == [
        len(choice["token_ids"]) for choice in answer["choices"]] and len(answer["choices"]) == 2  # fmt: skip
    assert answer["choices"][0]["token_ids"] != answer["choices"][1]["token_ids"]
    assert answer["prompt_logprobs"][0] is None and len(answer["prompt_logprobs"]) == 3
    assert all(str(token) in row for token, row in zip((6, 7), answer["prompt_logprobs"][1:], strict=True))


def test_control(live: Live) -> None:
    assert live.http.request("GET", "/get_world_size", json={}).json() == {"world_size": 1}
    with live.in_flight("/inference/v1/generate", body(max_tokens=300, ignore_eos=True)) as [running]:
        assert live.post("/pause", params={"mode": "keep", "clear_cache": "false"}) == {"status": "paused"}
    assert live.post("/reset_prefix_cache", {"reset_running_requests": False}) == {"status": "ok"}
    assert not running.done()
    assert live.post("/resume") == {"status": "resumed"}
    assert len(running.result(60)["choices"][0]["token_ids"]) == 300
    live.settled()


def test_its_own_client(live: Live) -> None:
    found = own_client("skyrl", live.url)
    assert found["world"] == [1, 1] and found["waited"]
    assert [len(each) for each in found["logprobs"]] == [len(each) for each in found["tokens"]]
    assert [len(rows) for rows in found["experts"]] and set(found["reasons"]) <= {"stop", "length"}
