"""OpenAI's official client against a live service: every field, streams, and what is wrong in a request.

Answers are compared with those of an engine in this process: the same seed gives the same tokens wherever a request is served.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import RolloutRequest, SamplingParams, Trajectory
from blockroll.service.lifecycle import Service
from blockroll.trainer_bridge.client import ServiceControl
from blockroll.trainer_bridge.wire.key_files import load_client_keys

sys.path.insert(0, str(Path(__file__).parent))

from http_parts import CONTROL_KEY, KEY, MODEL, url_of, wait_for
from step_gate import StepGate

PROMPT = "Q: 17 + 5 * 3 = ?\n"
CHAT: Any = [{"role": "system", "content": "count"}, {"role": "user", "content": "17 + 5"}]
SEED = 2**63 - 25
"""No float64 holds it: a seed that went through one would be another."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(MODEL, device="cpu")


@pytest.fixture
def raw(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url_of(service), headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as raw:
        yield raw


def served(engine: Engine, prompt: str | tuple[int, ...], **options: Any) -> list[Trajectory]:
    """The samples of a request from an engine of this process."""
    tokens = tuple(encode_prompt(engine.policy.tokenizer, prompt)) if isinstance(prompt, str) else prompt
    params = SamplingParams(**{"sampler": "coupled", "max_tokens": 48, **options})
    return engine.rollout([RolloutRequest("local", tokens, params)])


def texts(engine: Engine, samples: list[Trajectory]) -> list[str]:
    return [sample.text(engine.policy.tokenizer) for sample in samples]


def joined(parts: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(parts))


def extra(choice: Any, name: str) -> Any:
    return choice.model_extra[name]


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.model_extra["max_model_len"], model.model_extra["weight_version"]) == (MODEL, 512, 0)
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found"


def test_completions_are_those_of_an_engine_in_another_process(client: openai.OpenAI, engine: Engine) -> None:
    """A prompt as text, as tokens, and lists of both; n samples with a seed of 63 bits; usage."""
    tokens = tuple(encode_prompt(engine.policy.tokenizer, PROMPT))
    expected = served(engine, PROMPT, n=3, seed=SEED)
    assert len({tuple(sample.tokens) for sample in expected}) > 1
    prompts: list[Any] = [PROMPT, list(tokens), [PROMPT, PROMPT], [list(tokens)] * 2]
    for prompt in prompts:
        done = client.completions.create(model=MODEL, prompt=prompt, n=3, seed=SEED, extra_body={"return_token_ids": True})
        repeats = 2 if prompt in prompts[2:] else 1
        assert [choice.index for choice in done.choices] == list(range(3 * repeats))
        assert [choice.text for choice in done.choices] == texts(engine, expected) * repeats
        assert [extra(choice, "token_ids") for choice in done.choices] == [sample.tokens for sample in expected] * repeats
        assert extra(done.choices[0], "prompt_token_ids") == list(tokens)
        assert [choice.finish_reason for choice in done.choices] == [sample.finish_reason for sample in expected] * repeats
        assert done.usage is not None
        assert done.usage.prompt_tokens == repeats * len(tokens)
        assert done.usage.completion_tokens == repeats * sum(len(sample.tokens) for sample in expected)
    other = client.completions.create(model=MODEL, prompt=PROMPT, n=3, seed=int(float(SEED)) - 1024)
    assert [choice.text for choice in other.choices] != texts(engine, expected)
    unseeded = [client.completions.create(model=MODEL, prompt=PROMPT, temperature=1.5, n=2) for _ in range(2)]
    assert len({choice.text for done in unseeded for choice in done.choices}) > 1
    echoed = client.completions.create(model=MODEL, prompt=list(tokens), seed=SEED, echo=True)
    assert echoed.choices[0].text == "<bos>" + PROMPT + texts(engine, expected)[0]


@pytest.mark.parametrize("options", [
    {"temperature": 0.0}, {"temperature": 1.3, "top_p": 0.9}, {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"stop": ["=", "\n"]}, {"stop": "1"}, {"max_tokens": 5}, {"logit_bias": {"20": 3.0, "24": -100.0}},
])
def test_openai_s_sampling_fields(options: dict[str, Any], client: openai.OpenAI, engine: Engine) -> None:
    ours = options | ({"logit_bias": {int(t): b for t, b in options["logit_bias"].items()}} if "logit_bias" in options else {})
    expected = served(engine, PROMPT, seed=7, n=2, **ours)
    done = client.completions.create(model=MODEL, prompt=PROMPT, seed=7, n=2, **options)
    assert [choice.text for choice in done.choices] == texts(engine, expected)
    assert [extra(choice, "stop_reason") for choice in done.choices] == [sample.stop_reason for sample in expected]


@pytest.mark.parametrize("options", [
    {"top_k": 3, "min_p": 0.05}, {"repetition_penalty": 1.3, "min_tokens": 20}, {"ignore_eos": True, "max_tokens": 30},
    {"stop_token_ids": [20, 21]}, {"stop": ["1"], "include_stop_str_in_output": True}, {"sampler": "lossless"}, {"sampler": "ar"},
])
def test_vllm_s_sampling_fields(options: dict[str, Any], client: openai.OpenAI, engine: Engine) -> None:
    """`lossless` depends on the schedule too, which is the same here and there."""
    expected = served(engine, PROMPT, seed=8, **options)
    done = client.completions.create(model=MODEL, prompt=PROMPT, seed=8, extra_body=options)
    assert [choice.text for choice in done.choices] == texts(engine, expected)


def test_log_probabilities_and_what_is_recorded_beside_tokens(client: openai.OpenAI, engine: Engine) -> None:
    [expected] = served(engine, PROMPT, seed=9, logprobs=3, prompt_logprobs=2, top_k=5, routed_experts=True)
    tokenizer = engine.policy.tokenizer
    done = client.completions.create(model=MODEL, prompt=PROMPT, seed=9, logprobs=3, extra_body={
        "prompt_logprobs": 2, "top_k": 5, "routed_experts": True, "behavior_logprobs": True, "tokens_per_forward": True,
        "return_weight_versions": True, "cache_salt": "s", "priority": -3})  # fmt: skip
    [choice] = done.choices
    found = choice.logprobs
    assert found is not None and found.tokens is not None and found.top_logprobs is not None
    assert found.tokens == [tokenizer.decode([token]) for token in expected.tokens]
    assert found.text_offset == np.cumsum([0, *map(len, found.tokens[:-1])]).tolist()
    np.testing.assert_array_equal(np.array(found.token_logprobs, np.float32), expected.logprobs)
    assert [len(top) for top in found.top_logprobs] == [len({*row, token}) for row, token in zip(
        expected.top_tokens.tolist(), expected.tokens)]  # fmt: skip
    np.testing.assert_array_equal(np.array(extra(choice, "behavior_logprobs"), np.float32), expected.behavior_logprobs)
    assert extra(choice, "weight_versions") == [{"version": 0, "start": 0, "end": len(expected.tokens)}]
    assert extra(choice, "tokens_per_forward") > 1
    np.testing.assert_array_equal(extra(choice, "routed_experts"), expected.routed_experts)
    prompt = extra(choice, "prompt_logprobs")
    assert prompt[0] is None and len(prompt) == len(expected.prompt_tokens)
    for row, token, logprob, top in zip(prompt[1:], expected.prompt_tokens[1:], expected.prompt_logprobs.tolist(),
                                        expected.prompt_top_tokens.tolist()):  # fmt: skip
        assert row[str(token)]["logprob"] == pytest.approx(logprob, abs=1e-6) and {*row} == {*map(str, top), str(token)}
        assert [row[str(other)]["rank"] for other in top] == [1, 2]
    listed = client.completions.create(model=MODEL, prompt=PROMPT, seed=9, extra_body={
        "top_k": 5, "logprob_token_ids": [20, 21], "return_tokens_as_token_ids": True}).choices[0].logprobs  # fmt: skip
    assert listed is not None and listed.tokens == [f"token_id:{token}" for token in expected.tokens]
    assert all({"token_id:20", "token_id:21", token} == {*top} for token, top in zip(listed.tokens, listed.top_logprobs or []))
    zero = client.completions.create(model=MODEL, prompt=PROMPT, seed=9, logprobs=0, extra_body={"top_k": 5}).choices[0].logprobs
    assert zero is not None and zero.token_logprobs == found.token_logprobs and len((zero.top_logprobs or [])[0]) == 1


def test_chat_messages_are_written_by_the_template(client: openai.OpenAI, engine: Engine) -> None:
    """Also with tools, calls of earlier messages, and parts of text."""
    prompt = "system: count\nuser: 17 + 5\nassistant: "
    [expected] = served(engine, tuple(engine.policy.tokenizer.encode(prompt)), seed=SEED, logprobs=2)
    done = client.chat.completions.create(model=MODEL, messages=CHAT, seed=SEED, logprobs=True, top_logprobs=2,
                                          extra_body={"return_token_ids": True})  # fmt: skip
    [choice] = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text(engine.policy.tokenizer))
    assert engine.policy.tokenizer.decode(done.model_extra["prompt_token_ids"]) == prompt
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(expected.logprobs.tolist(), abs=1e-6)
    assert all(len(entry.top_logprobs) == 2 and bytes(entry.bytes or []) == entry.token.encode()
               for entry in choice.logprobs.content)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                     {"role": "assistant", "tool_calls": [call]},
                     {"role": "tool", "content": "2", "tool_call_id": "c"}]
    for choose, shown in (("auto", True), ("none", False)):
        done = client.chat.completions.create(model=MODEL, messages=messages, tools=[tool], tool_choice=choose, max_tokens=4,
                                              extra_body={"return_token_ids": True})  # type: ignore[call-overload]  # fmt: skip
        text = engine.policy.tokenizer.decode(done.model_extra["prompt_token_ids"])
        assert text.startswith(json.dumps(tool)) == shown
        assert text.endswith("user: a\nb\nassistant: <tool_call>add(1)\ntool: 2\nassistant: ")


@pytest.mark.parametrize("options", [
    {"n": 2}, {"stop": ["1", "=2"]}, {"logprobs": 2, "max_tokens": 20}, {"temperature": 1.8, "max_tokens": 100}])
def test_a_stream_adds_up_to_the_whole_completion(options: dict[str, Any], client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "prompt": [PROMPT, "Q: 2 + 2\n"], "seed": 11, **options, "extra_body": {
        "return_token_ids": True, "return_weight_versions": True, "behavior_logprobs": True}}  # fmt: skip
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    parts = [chunk.choices[0] for chunk in chunks[:-1]]
    for choice in whole.choices:
        mine = [part for part in parts if part.index == choice.index]
        assert "".join(part.text for part in mine) == choice.text
        for name in ("token_ids", "behavior_logprobs"):
            assert joined(extra(part, name) for part in mine) == extra(choice, name)
        if choice.logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs"):
                assert joined(getattr(part.logprobs, name) for part in mine) == getattr(choice.logprobs, name)
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        assert extra(mine[0], "prompt_token_ids") == extra(choice, "prompt_token_ids")
        assert extra(mine[-1], "weight_versions") == extra(choice, "weight_versions")


def test_a_chat_stream_adds_up_and_comes_while_tokens_are_made(client: openai.OpenAI, gate: StepGate) -> None:
    fields: Any = {"model": MODEL, "messages": CHAT, "seed": 12, "n": 2, "max_tokens": 300, "logprobs": True,
                   "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**fields)
    with gate.closed(1):
        stream = client.chat.completions.create(**fields, stream=True)
        first = next(stream)
    chunks = [chunk.choices[0] for chunk in (first, *stream)]
    assert chunks[0].logprobs.content and chunks[0].finish_reason is None
    for choice in whole.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert [chunk.delta.role for chunk in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert "".join(chunk.delta.content or "" for chunk in mine) == choice.message.content
        assert choice.logprobs is not None
        assert joined(chunk.logprobs.content for chunk in mine if chunk.logprobs) == choice.logprobs.content
        assert mine[-1].finish_reason == choice.finish_reason == "length"


def test_tokens_to_text_and_back(raw: httpx.Client, engine: Engine) -> None:
    text = "12 + ∑ = é\n"
    found = raw.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == encode_prompt(engine.policy.tokenizer, text) and found["count"] == len(found["tokens"])
    assert len(found["token_strs"]) == found["count"] and found["max_model_len"] == 512
    assert raw.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": f"<bos>{text}"}
    plain = raw.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == found["tokens"][1:]
    chat = raw.post("/tokenize", json={"messages": CHAT}).json()["tokens"]
    assert engine.policy.tokenizer.decode(chat) == "system: count\nuser: 17 + 5\nassistant: "


def body(**fields: object) -> str:
    return json.dumps({"prompt": "a", **fields})


@pytest.mark.parametrize(("text", "status", "param"), [
    ("{", 400, None), ("", 400, None), ("[]", 400, None), ('"a"', 400, None), ("[" * 100_000, 400, None),
    ('{"prompt": NaN}', 400, None), (body(temperature=float("nan")), 400, None), ('{"prompt": "a", "temperature": 1e999}', 400,
                                                                                  "temperature"),
    ('{"prompt": "\\ud800"}', 400, None), ("{}", 400, "prompt"), (body(prompt=3), 400, "prompt"),
    (body(prompt=[]), 400, "prompt"),
    (body(prompt=[1, "a"]), 400, "prompt"), (body(prompt=[[1], []]), 400, "prompt"), (body(prompt=[-1]), 400, "prompt"),
    (body(prompt=[320]), 400, "prompt"), (body(prompt=[2**70]), 400, "prompt"), (body(prompt=[True]), 400, "prompt"),
    (body(prompt=[5] * 512), 400, "prompt"), (body(prompt="1 " * 3000), 400, "prompt"), (body(n=0), 400, "n"),
    (body(n="2"), 400, "n"), (body(n=1.5), 400, "n"), (body(n=2000), 400, "n"), (body(prompt=["a"] * 40, n=64), 400, "n"),
    (body(model="gpt-9"), 404, "model"), (body(model=7), 400, "model"), (body(temperature=-1), 400, "temperature"),
    (body(temperature=1e-9), 400, "temperature"), (body(top_p=0), 400, "top_p"), (body(seed=2**63), 400, "seed"),
    (body(seed=-1), 400, "seed"), (body(seed=1.0), 400, "seed"), (body(max_tokens=0), 400, "max_tokens"),
    (body(stop=""), 400, "stop"), (body(stop=["x" * 300]), 400, "stop"), (body(stop_token_ids=[-1]), 400, "stop_token_ids"),
    (body(logit_bias={"a": 1}), 400, "logit_bias"), (body(logit_bias={"999": 1}), 400, "logit_bias"),
    (body(logprobs=21), 400, "logprobs"), (body(prompt_logprobs=-1), 400, "prompt_logprobs"),
    (body(logprob_token_ids=[400]), 400, "logprob_token_ids"), (body(sampler="greedy"), 400, "sampler"),
    (body(mix_weight=2), 400, "mix_weight"), (body(cache_salt="x" * 300), 400, "cache_salt"),
    (body(priority=2**40), 400, "priority"),
    (body(min_tokens=9, max_tokens=3), 400, "min_tokens"), (body(best_of=3), 400, "best_of"), (body(suffix="a"), 400, "suffix"),
    (body(echo=True, logprobs=1), 400, "echo"), (body(temprature=1), 400, "temprature"),
    (body(guided_json={}), 400, "guided_json"),
    (body(stream_options={"x": 1}), 400, "stream_options"), (body(stream=True, prompt=[320]), 400, "prompt"),
    (body(stream=True, logit_bias={"999": 1}), 400, "logit_bias"), ('{"prompt": "' + "a" * 10_000_000 + '"}', 413, None),
])
def test_a_request_that_cannot_be_served_is_told_so_in_openai_s_form(
    text: str, status: int, param: str | None, raw: httpx.Client
) -> None:
    answer = raw.post("/v1/completions", content=text, headers={"Content-Type": "application/json"})
    check_error(answer, status, param)


@pytest.mark.parametrize(("change", "param"), [
    ({"messages": []}, "messages"), ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"messages": [{"role": "forbidden", "content": "a"}]}, "messages"), ({"messages": [{"content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "1 " * 400}]}, "messages"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"continue_final_message": True}, "continue_final_message"),
])
def test_a_conversation_that_cannot_be_served_is_told_so(change: dict[str, Any], param: str, raw: httpx.Client) -> None:
    check_error(raw.post("/v1/chat/completions", json={"messages": CHAT, **change}), 400, param)


def check_error(answer: httpx.Response, status: int, param: str | None) -> None:
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert {*error} == {"message", "type", "param", "code"} and error["param"] == param, error
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert len(error["message"]) < 500 and "\n" not in error["message"]


def test_other_things_that_are_no_request(raw: httpx.Client, service: Service) -> None:
    crowd = raw.post("/v1/completions", json={"prompt": "a", "n": 301})
    assert crowd.status_code == 429 and crowd.json()["error"]["type"] == "rate_limit_error"
    chunked = (b" " * 65_536 for _ in range(200))
    for content, kind, status in ((b'{"prompt": "\xff"}', "application/json", 400), (body(), "text/plain", 415),
                                  (chunked, "application/json", 413)):  # fmt: skip
        answer = raw.post("/v1/completions", content=content, headers={"Content-Type": kind})
        check_error(answer, status, None)
    check_error(raw.get("/v1/nothing"), 404, None)
    check_error(raw.get("/v1/completions"), 405, None)
    foreign = raw.post("/v1/completions", json={"prompt": "a"}, headers={"Origin": "http://evil.example"})
    assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "foreign_origin"


def test_beyond_loopback_every_route_needs_the_key(service: Service) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    paths = {**httpx.get(f"{url_of(service)}/openapi.json", headers=key).json()["paths"], "/openapi.json": {"get": {}}}
    routes = [(method, path) for path, item in paths.items() for method in item]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/metrics"} <= {
        path for _, path in routes}  # fmt: skip
    with httpx.Client(base_url=url_of(service)) as client:
        for method, path in routes:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer \u00e9"}):
                shown = {name: value.encode("latin-1") for name, value in headers.items()}
                answer = client.request(method, path, headers=shown)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key", (method, path)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        for key in (KEY, CONTROL_KEY):
            assert client.get("/health", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_metrics_are_those_of_the_service(raw: httpx.Client) -> None:
    lines = raw.get("/metrics").text.splitlines()
    assert any(line.startswith("blockroll_requested_total ") for line in lines)
    assert any(line.startswith("blockroll_engine_version{") for line in lines)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_work(stream: bool, raw: httpx.Client, service: Service, gate: StepGate) -> None:
    """No sample ends by itself meanwhile."""
    fields = {"prompt": PROMPT, "n": 64, "max_tokens": 480, "ignore_eos": True, "stream": stream}
    assert service.keys is not None
    with ServiceControl(service.address, keys=load_client_keys(service.keys)) as control, gate.closed(1):
        before = control.status().figures
        if stream:
            with raw.stream("POST", "/v1/completions", json=fields) as answer:
                assert next(answer.iter_lines()).startswith("data: {")
                assert int(control.status().figures["in_flight"]) > 0
        else:
            with pytest.raises(httpx.ReadTimeout):
                raw.post("/v1/completions", json=fields, timeout=httpx.Timeout(5, read=0.4))
        wait_for(lambda: not any(control.status().figures[name] for name in ("outstanding", "in_flight")))
        after = control.status().figures
    assert int(after["failed"]) - int(before["failed"]) == 64
    assert int(after["requested"]) == int(after["unique"]) + int(after["failed"])
