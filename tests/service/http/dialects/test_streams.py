"""Streams of the token routes, in the forms of vLLM and SGLang: they bring what is committed, and add up to the whole answer."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import httpx
import pytest
from dialect_parts import Live, tokens


def joined(parts: list[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": 2, "top_k": 5}, {"sampler": "lossless", "temperature": 1.5}])
def test_tokens_stream_as_vllm_sends_them(more: dict[str, Any], live: Live) -> None:
    body = tokens(200, **more) | {"return_token_ids": True}
    whole = live.post("/inference/v1/generate", body)
    events = live.stream("/inference/v1/generate", body | {"stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"] and len({event["request_id"] for event in events}) == 1
    parts = [event["choices"][0] for event in events[:-1]]
    assert parts[0]["token_ids"] and parts[0]["finish_reason"] is None
    for choice in whole["choices"]:
        mine = [part for part in parts if part["index"] == choice["index"]]
        for name in ("token_ids", "behavior_logprobs"):
            assert joined([part[name] for part in mine]) == choice[name]
        assert joined([part["logprobs"]["content"] for part in mine]) == choice["logprobs"]["content"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + ["length"]
        of_whole = ("finish_reason", "stop_reason", "weight_versions", "routed_experts", "tokens_per_forward")
        assert [mine[-1][name] for name in of_whole] == [choice[name] for name in of_whole]


def test_tokens_stream_as_sglang_sends_them(live: Live) -> None:
    """Every event has what there is so far."""
    body = {"input_ids": [5, 6, 7], "return_logprob": True, "return_routed_experts": True, "rid": "mine", "sampling_params": {
        "max_new_tokens": 200, "ignore_eos": True, "sampling_seed": 3, "stop": ["9"], "n": 2}}  # fmt: skip
    whole = live.post("/generate", body)
    events = live.stream("/generate", body)
    for number, answer in enumerate(whole):
        mine = [dict(event) for event in events if event["index"] == number]
        for before, after in pairwise(mine):
            made = before["output_ids"]
            assert after["text"].startswith(before["text"]) and after["output_ids"][: len(made)] == made
            assert before["meta_info"]["finish_reason"] is None and before["meta_info"]["id"] == "mine"
        for each in mine:
            assert [token for _, token, _ in each["meta_info"]["output_token_logprobs"]] == each["output_ids"]
            assert each["meta_info"]["completion_tokens"] == len(each["output_ids"])
        last = mine[-1]
        last["meta_info"].pop("e2e_latency"), answer["meta_info"].pop("e2e_latency"), last.pop("index")
        assert last == answer
    [one, *_] = live.stream("/generate", {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 4, "sampling_seed": 3}})
    assert "index" not in one
    live.settled()


def test_events_of_a_long_sample_do_not_grow_with_its_square(live: Live) -> None:
    params = {"max_new_tokens": 480, "ignore_eos": True, "sampling_seed": 3}
    sizes = [len(event["output_ids"]) for event in live.stream("/generate", {"input_ids": [5], "sampling_params": params})]
    assert sizes[-1] == 480 and all(after - before > before // 64 for before, after in pairwise(sizes[:-1]))


def test_an_aborted_stream_ends_with_what_it_has(live: Live) -> None:
    body = tokens(400) | {"stream": True, "request_id": "cut"}
    with live.gate.closed(1), live.http.stream("POST", "/inference/v1/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.post("/abort_requests", {"request_ids": ["cut"]})
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"abort"' in rest[-2]
    body, timeout = tokens(400, n=8) | {"request_id": "left"}, httpx.Timeout(60, read=0.1)
    with live.gate.closed(8):
        with pytest.raises(httpx.ReadTimeout):
            live.http.post("/inference/v1/generate", json=body, timeout=timeout)
        live.settled()
    assert live.post("/skyrl/v1/generate", tokens(4) | {"stream": True}, 400)["error"]["param"] == "stream"
