"""What AReaL 1.0.4 sends to the servers of AREAL_LLM_SERVER_ADDRS, as read in its wheel: `areal/engine/vllm_remote.py:
VLLMBackend` and, for the answers, `areal/engine/vllm_ext/areal_vllm_server.py`."""

from __future__ import annotations

from typing import Any

from dialect_parts import Live
from http_parts import wait_for
from own_trainers import own_client


def completion(**more: Any) -> dict[str, Any]:
    return {"top_p": 1.0, "top_k": 100_000_000, "max_tokens": 16, "temperature": 1.0, "stop_token_ids": [1], "ignore_eos": False,
            "skip_special_tokens": True, "return_tokens_as_token_ids": True, "logprobs": 0, "use_beam_search": False,
            "stream": False, "prompt": [5, 6, 7], **more}  # fmt: skip


def parsed(answer: Any) -> tuple[list[int], list[float], str]:
    choice = answer["choices"][0]
    tokens = [int(token.split(":")[1]) for token in choice["logprobs"]["tokens"]]
    return tokens, choice["logprobs"]["token_logprobs"], choice["finish_reason"]


def test_generation(live: Live) -> None:
    assert live.get("/health") == ""
    tokens, logprobs, reason = parsed(live.post("/v1/completions", completion()))
    assert len(tokens) == len(logprobs) > 0 and reason in ("stop", "length")


def test_a_pause_ends_what_runs_and_queues_what_comes(live: Live) -> None:
    """Its client sends an aborted completion again, with the tokens that came, as a part of the prompt."""
    with live.in_flight("/v1/completions", completion(max_tokens=300, ignore_eos=True, stop_token_ids=[])) as [running]:
        assert live.post("/areal_pause_generation", {})["success"] is True
    tokens, logprobs, reason = parsed(running.result(10))
    assert reason == "abort" and 0 < len(tokens) == len(logprobs) < 300
    again = live.start("/v1/completions", completion(prompt=[5, 6, 7, *tokens], max_tokens=300 - len(tokens), ignore_eos=True,
                                                     stop_token_ids=[]))  # fmt: skip
    wait_for(lambda: live.figures()["outstanding"] == 1)
    version = live.version()
    answer = live.post("/areal_update_weights", {"model_path": str(live.weights())})
    assert answer["success"] is True and live.version() == version + 1 and not again.done()
    assert live.post("/areal_continue_generation", {})["success"] is True
    assert len(parsed(again.result(60))[0]) == 300 - len(tokens)
    live.settled()


def test_an_update_that_lacks_a_tensor_says_so(live: Live) -> None:
    version = live.version()

    def drop(state: dict[str, Any]) -> None:
        state.pop("model.norm.weight")

    answer = live.post("/areal_update_weights", {"model_path": str(live.weights(drop))}, 400)
    assert answer["success"] is False and "model.norm.weight" in answer["message"] and live.version() == version


def test_its_own_parser(live: Live) -> None:
    found = own_client("areal", live.url)
    assert len(found["tokens"]) == len(found["logprobs"]) == 12 and found["reason"] == "length" and found["said"] == [True, True]
