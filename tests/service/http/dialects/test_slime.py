"""What slime sends to SGLang servers, as read in its repository at 624b824a (August 2026): `slime/rollout/sglang_rollout.py`,
`slime/backends/sglang_utils/{sglang_engine,server_control,external}.py`, `slime/ray/actor_group.py` and, for what it reads of an
answer, `slime/utils/types.py: Sample`."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from dialect_parts import Live


def body(**more: Any) -> dict[str, Any]:
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 16, "stop": None, "stop_token_ids": None,
              "skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False, **more}  # fmt: skip
    return {"sampling_params": params, "return_logprob": True, "input_ids": [5, 6, 7]}


def test_start(live: Live) -> None:
    info = live.get("/server_info")
    assert live.get("/get_server_info").keys() == info.keys() and live.get("/health_generate") == ""
    assert (info["tp_size"], info["pp_size"], info["num_gpus"], info["enable_memory_saver"]) == (1, 1, 1, False)


def test_generation(live: Live) -> None:
    output = live.post("/generate", body(sampling_seed=42) | {"return_routed_experts": True})
    meta = output["meta_info"]
    tokens = [item[1] for item in meta["output_token_logprobs"]]
    assert tokens == output["output_ids"] and all(item[0] <= 0 for item in meta["output_token_logprobs"])
    assert isinstance(output["text"], str) and meta["finish_reason"]["type"] in ("stop", "length")
    assert meta["weight_version"] == live.get("/get_weight_version")["weight_version"]
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (3, len(tokens)) and meta["cached_tokens"] >= 0
    experts = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32)
    assert experts.size % (3 + len(tokens) - 1) == 0
    assert live.post("/generate", body(sampling_seed=42))["output_ids"] == tokens
    assert len(live.post("/generate", body(n=3))) == 3


def test_what_it_cannot_have_is_refused_by_name(live: Live) -> None:
    error = live.post("/generate", body(custom_params={"return_top_p_token_ids": True}), 400)["error"]
    assert error["param"] == "sampling_params.custom_params"


def test_an_abort_until_idle(live: Live) -> None:
    long = body(max_new_tokens=300, ignore_eos=True)
    with live.in_flight("/generate", long | {"rid": "one"}, *[long] * 3) as (named, *running):
        live.post("/abort_request", {"rid": "one"})
        assert named.result(10)["meta_info"]["finish_reason"]["type"] == "abort" and named.result()["meta_info"]["id"] == "one"
        assert not any(each.done() for each in running)
        live.post("/abort_request", {"abort_all": True})
        loads = live.get("/v1/loads", params={"include": "core"})["loads"]
        assert sum(load["num_reqs"] for load in loads) == 0
    for each in running:
        output = each.result(10)
        assert output["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(output["meta_info"]["output_token_logprobs"]) == len(output["output_ids"])
    live.settled()


def test_an_update_from_disk(live: Live) -> None:
    version = live.version() + 2
    with live.in_flight("/generate", body(max_new_tokens=300, ignore_eos=True)) as [running]:
        live.post("/pause_generation", {})
    assert running.result(10)["meta_info"]["finish_reason"]["type"] == "abort"
    assert live.http.get("/flush_cache").status_code == 200
    answer = live.post("/update_weights_from_disk", {"model_path": str(live.weights()), "weight_version": str(version)})
    assert answer["success"] is True and live.get("/get_weight_version") == {"weight_version": str(version)}
    live.post("/continue_generation", {})
    assert live.post("/generate", body())["meta_info"]["weight_version"] == str(version)
    live.settled()


def test_modes_that_hold_what_runs(live: Live) -> None:
    for mode in ("in_place", "retract"):
        version = live.version()
        with live.in_flight("/generate", body(max_new_tokens=300, ignore_eos=True)) as [running]:
            live.post("/pause_generation", {"mode": mode})
        assert live.post("/update_weights_from_disk", {"model_path": str(live.weights())})["success"] is True
        live.post("/continue_generation", {})
        meta = running.result(60)["meta_info"]
        assert meta["finish_reason"] == {"type": "length", "length": 300}
        assert [span["version"] for span in meta["weight_versions"]] == [version, version + 1]
    live.settled()
