"""Pauses and weight updates over HTTP with work in flight: nothing is lost, every token says the version that made it, and what
is wrong leaves the old weights serving."""

from __future__ import annotations

import base64
import re
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

import numpy as np
import pytest
from dialect_parts import Live, tokens
from http_parts import wait_for

import blockroll


def spans(answer: Any) -> list[list[int]]:
    """Weight versions of the first choice: [version, start, end]."""
    return [[int(span["version"]), span["start"], span["end"]] for span in answer["choices"][0]["weight_versions"]]


def test_keep_holds_what_runs_through_an_update(live: Live) -> None:
    version = live.version()
    with live.in_flight("/inference/v1/generate", *[tokens()] * 6) as running:
        assert live.post("/pause", params={"mode": "keep", "clear_cache": "false"}) == {"status": "paused"}
    assert live.get("/is_paused") == {"is_paused": True, "mode": "keep"}
    queued = live.start("/inference/v1/generate", tokens(20))
    wait_for(lambda: live.figures()["outstanding"] == 7)
    refused = live.post("/update_weights", {"weight_dir": str(live.weights()), "in_flight": "finish"}, 503)
    assert "the service is paused and holds" in refused["error"]["message"] and live.version() == version
    answer = live.post("/update_weights", {"weight_dir": str(live.weights())})
    assert answer["weight_version"] == str(version + 1)
    assert not queued.done() and not any(each.done() for each in running)
    assert live.post("/resume") == {"status": "resumed"}
    for answer in [each.result(60) for each in running]:
        found = spans(answer)
        assert [span[0] for span in found] == [version, version + 1] and found[0][1] == 0 and found[1][2] == 300
        assert found[0][2] <= 17  # tokens of the one step that the gate let through: the engine has made none since
        assert answer["choices"][0]["finish_reason"] == "length" and len(answer["choices"][0]["logprobs"]["content"]) == 300
    assert spans(queued.result(60)) == [[version + 1, 0, 20]]
    live.settled()


def test_wait_lets_what_runs_finish_and_refuses_what_comes(live: Live) -> None:
    with live.in_flight("/inference/v1/generate", *[tokens()] * 4) as running:
        pause = live.threads.submit(live.post, "/pause", params={"mode": "wait"})
        wait_for(lambda: live.get("/is_paused")["is_paused"])
        assert not pause.done()
    pause.result(30)
    assert {each.result(10)["choices"][0]["finish_reason"] for each in running} == {"length"}
    for path, body in (("/inference/v1/generate", tokens(4)), ("/v1/completions", {"prompt": [5, 6]}),
                       ("/generate", {"input_ids": [5]})):  # fmt: skip
        assert live.post(path, body, 503)["error"]["code"] == "paused"
    live.post("/resume")
    assert live.get("/is_paused")["is_paused"] is False
    assert len(live.post("/inference/v1/generate", tokens(4))["choices"][0]["token_ids"]) == 4
    live.settled()


def test_an_aborted_sample_goes_on_from_its_tokens(live: Live) -> None:
    with live.in_flight("/inference/v1/generate", *[tokens()] * 3) as running:
        live.post("/pause", params={"mode": "abort"})
        live.post("/resume")
    whole = live.post("/inference/v1/generate", tokens())["choices"][0]
    for answer in [each.result(10) for each in running]:
        choice = answer["choices"][0]
        made = choice["token_ids"]
        assert choice["finish_reason"] == "abort" and 0 < len(made) < 300 and len(choice["logprobs"]["content"]) == len(made)
        body = tokens(300 - len(made))
        body["token_ids"] += made
        assert made + live.post("/inference/v1/generate", body)["choices"][0]["token_ids"] == whole["token_ids"]
    live.settled()


def test_requests_are_aborted_by_name_and_an_update_may_abort_what_runs(live: Live) -> None:
    with live.in_flight("/inference/v1/generate", tokens() | {"request_id": "mine"}, tokens()) as (named, other):
        assert live.post("/abort_requests", {"request_ids": ["mine", "unknown"]})["status"] == "aborted"
    assert named.result(10)["choices"][0]["finish_reason"] == "abort" and named.result()["request_id"] == "mine"
    assert other.result(60)["choices"][0]["finish_reason"] == "length"
    with live.in_flight("/inference/v1/generate", tokens(500)) as [running]:
        live.post("/update_weights", {"weight_dir": str(live.weights()), "in_flight": "abort"})
    assert running.result(10)["choices"][0]["finish_reason"] == "abort"
    live.settled()


def test_a_version_labelled_anew_aborts_nothing(live: Live) -> None:
    version = live.version()
    with live.in_flight("/inference/v1/generate", *[tokens()] * 4) as running:
        assert live.post("/update_weight_version", {"new_version": str(version + 5)})["success"] is True
    found = [spans(each.result(60)) for each in running]
    assert [[span[0] for span in each] for each in found] == [[version, version + 5]] * 4
    assert {each.result()["choices"][0]["finish_reason"] for each in running} == {"length"}
    with live.in_flight("/inference/v1/generate", *[tokens()] * 2) as running:
        for wrong, status in ((version, 409), ("step-1", 400), (2**40, 400), (-1, 400)):
            body = {"new_version": wrong, "abort_all_requests": True}
            assert live.post("/update_weight_version", body, status)["error"]["message"]
    assert {each.result(60)["choices"][0]["finish_reason"] for each in running} == {"length"}
    assert live.version() == version + 5
    live.settled()


def engine_tokens(policy: Any) -> tuple[list[int], np.ndarray]:
    """What an engine of this process makes of `tokens(30, sampler="ar")`, and its log-probabilities."""
    params = blockroll.SamplingParams(sampler="ar", max_tokens=30, ignore_eos=True, seed=11)
    [found] = blockroll.Engine(policy, max_batch=1).rollout([blockroll.RolloutRequest("a", (5, 6, 7), params)])
    return found.tokens, found.logprobs


def drop(state: dict[str, Any]) -> None:
    del state[sorted(state)[3]]


def poison(state: dict[str, Any]) -> None:
    state["model.norm.weight"][3] = float("nan")


def shrink(state: dict[str, Any]) -> None:
    state["model.norm.weight"] = state["model.norm.weight"][1:].clone()


def grow(state: dict[str, Any]) -> None:
    state["value_head.weight"] = state["model.norm.weight"].clone()


@pytest.mark.parametrize(("change", "said"), [
    (drop, "lacks tensor 'model."), (poison, "'model.norm.weight' in .* not finite"),
    (shrink, "'model.norm.weight' in .* the policy has"), (grow, "has the unknown tensor 'value_head.weight'")])  # fmt: skip
def test_a_wrong_directory_leaves_the_old_weights_serving(live: Live, change: Any, said: str) -> None:
    version, before = live.version(), live.post("/inference/v1/generate", tokens(20))["choices"][0]
    error = live.post("/update_weights", {"weight_dir": str(live.weights(change))}, 400)["error"]
    assert re.search(said, error["message"]) and error["param"] == "weight_dir", error
    after = live.post("/inference/v1/generate", tokens(20))["choices"][0]
    assert live.version() == version and after["logprobs"] == before["logprobs"]


def test_paths_are_checked(live: Live) -> None:
    for path in ("relative", "/nowhere/at/all", "/etc/\0"):
        assert live.post("/update_weights", {"weight_dir": path}, 400)["error"]["param"] == "weight_dir"
    live.post("/update_weights", {}, 400)
    serving = {"weight_dir": str(live.weights()), "weight_version": live.version()}
    assert "other content" in live.post("/update_weights", serving, 409)["error"]["message"]


def test_shards_in_another_dtype_are_cast(live: Live) -> None:
    version = live.version()
    directory = live.weights(dtype="bfloat16", max_shard_bytes=300_000)
    assert len(list(directory.glob("*.safetensors"))) > 1
    assert live.post("/update_weights", {"weight_dir": str(directory), "weight_version": version + 3})["weight_version"] == str(
        version + 3)  # fmt: skip
    served = live.post("/inference/v1/generate", tokens(30, sampler="ar"))["choices"][0]
    assert served["token_ids"] == engine_tokens(blockroll.load_policy(str(directory)))[0]


def test_two_updates_at_once(live: Live) -> None:
    """Neither can end while a sample runs, so the one that is answered is refused."""
    version = live.version()
    bodies = [{"weight_dir": str(live.weights()), "in_flight": "finish"} for _ in range(2)]
    with live.in_flight("/inference/v1/generate", tokens()) as [running]:
        updates = [live.threads.submit(live.http.post, "/update_weights", json=body) for body in bodies]
        [refused], [first] = wait(updates, 60, FIRST_COMPLETED)
        assert refused.result().status_code == 409 and live.version() == version
    assert first.result(60).json()["weight_version"] == str(version + 1) == str(live.version())
    assert spans(running.result(10)) == [[version, 0, 300]]
    live.settled()


def chunk(state: dict[str, Any], names: list[str], part: slice = slice(None)) -> dict[str, Any]:
    data = [state[name].numpy().tobytes() for name in names]
    first = part.start or 0
    return {"update_info": {
        "names": names, "dtype_names": [str(state[name].dtype).removeprefix("torch.") for name in names],
        "shapes": [list(state[name].shape) for name in names], "offsets": [first] * len(names),
        "data": [base64.b64encode(each[part]).decode() for each in data]}}  # fmt: skip


def test_weights_in_chunks(live: Live) -> None:
    version, policy = live.version(), blockroll.load_policy("tiny-reasoner")
    state = policy.state_dict()
    state.pop("lm_head.weight", None)
    names = sorted(state)
    live.post("/update_weights", chunk(state, names[:1]), 409)
    live.post("/finish_weight_update", {}, 409)
    live.post("/start_weight_update")
    assert live.post("/start_weight_update", status=409)["error"]["code"] == "weight_update_in_progress"
    half = state[names[0]].numel() * 2 // 4 * 4
    live.post("/update_weights", chunk(state, names[:1], slice(0, half)))
    live.post("/update_weights", chunk(state, names[:1], slice(half - 4, None)), 400)
    live.post("/update_weights", chunk(state, names[:1], slice(half, None)))
    wrong = chunk(state, names[1:2])
    for field, value, said in (("names", ["other"], "no tensor 'other'"), ("shapes", [[1]], "the policy has"),
                               ("data", ["?"], "no base64"), ("offsets", [4], "do not follow"), ("dtype_names", [], "length")):
        error = live.post("/update_weights", {"update_info": wrong["update_info"] | {field: value}}, 400)["error"]
        assert said in error["message"], error
    for name in names[1:-1]:
        live.post("/update_weights", chunk(state, [name]))
    error = live.post("/finish_weight_update", {}, 400)["error"]
    assert names[-1] in error["message"] and live.version() == version
    live.post("/start_weight_update")
    for first in range(0, len(names), 8):
        live.post("/update_weights", chunk(state, names[first : first + 8]))
    assert live.post("/finish_weight_update", {"weight_version": str(version + 2)})["weight_version"] == str(version + 2)
    served = live.post("/inference/v1/generate", tokens(30, sampler="ar"))["choices"][0]
    made, logprobs = engine_tokens(policy)
    assert served["token_ids"] == made
    np.testing.assert_array_equal(np.float32([entry["logprob"] for entry in served["logprobs"]["content"]]), logprobs)


def test_bodies_that_are_wrong_name_the_field(live: Live) -> None:
    for body, param in (
        ({"token_ids": []}, "token_ids"), ({"token_ids": [1 << 30]}, "token_ids"), ({"token_ids": [1] * 100_000}, "token_ids"),
        (tokens(4, n=100_000), "n"), (tokens(4, best_of=3), "sampling_params.best_of"),
        (tokens(10**9), "sampling_params.max_tokens"),
        (tokens(4, temperature="hot"), "temperature"), (tokens(4, logit_bias={"x": 1}), "sampling_params.logit_bias"),
        (tokens(4) | {"features": {}}, "features"), (tokens(4) | {"stream": "maybe"}, "stream"), (tokens(4) | {"x": 1}, "x"),
        (tokens(4, seed=-1), "seed"), (tokens(4, stop=[1]), "stop"), (tokens(4, logprobs=10_000), "logprobs"),
    ):  # fmt: skip
        answer = live.http.post("/inference/v1/generate", json=body)
        assert 400 <= answer.status_code < 500 and (answer.json()["error"]["param"] or "").startswith(param), (body, answer.text)
    assert live.post("/inference/v1/generate", tokens(4) | {"model": "other"}, 404)["error"]["code"] == "model_not_found"
    assert live.post("/pause", status=400, params={"mode": "sideways"})["error"]["param"] == "mode"
