"""Searches by OpenAI's client against a live service, compared with `blockroll.search` through a client of its gateway; and a
second service, which answers as the first one does."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import blockroll
from blockroll.model import tasks
from blockroll.model.tasks import question
from blockroll.model.tokenizer import encode_prompt
from blockroll.model.tokenizer_files import read_tokenizer
from blockroll.rollout.search.candidates import SearchResult
from blockroll.rollout.search.config import SearchConfig
from blockroll.rollout.types import SamplingParams
from blockroll.service import policy_files
from blockroll.service.http import search_threads
from blockroll.service.lifecycle import Service
from blockroll.trainer_bridge.client import ServiceControl
from blockroll.trainer_bridge.client.sample_source import ServiceSource
from blockroll.trainer_bridge.wire.key_files import load_client_keys

sys.path.insert(0, str(Path(__file__).parent))

from http_parts import CONTROL_KEY, KEY, LISTED, MODEL, live_service, url_of, wait_for
from step_gate import StepGate

PROMPT = question("47 + 85 - 12")
TOKENIZER = read_tokenizer(policy_files.find(MODEL))
OTHER = "this:d"
"""A function that the service's configuration does not list."""


def searched(service: Service, prompts: list[Any], fields: dict[str, Any], **params: Any) -> list[SearchResult]:
    """What `blockroll.search` makes of the prompts through a client of the service's gateway."""
    with blockroll.connect(service.address, keys=service.keys) as client:
        return blockroll.search(ServiceSource(client, TOKENIZER, 512), prompts, SearchConfig(**fields),
                                SamplingParams(**{"sampler": "coupled", "max_tokens": 48, **params}))


def control(service: Service) -> ServiceControl:
    assert service.keys is not None
    return ServiceControl(service.address, keys=load_client_keys(service.keys))


@pytest.mark.parametrize("fields", [
    {"method": "majority", "samples": 8}, {"method": "self_consistency", "samples": 12, "stop_rule": "dirichlet"},
    {"method": "best_of_n", "samples": 4, "scorer": "mean_logprob"},
    {"method": "weighted_vote", "samples": 6, "budget_tokens": 150},
    {"method": "beam", "samples": 4, "width": 2}, {"method": "markovian_rsa", "samples": 4, "aggregate": 2, "rounds": 1},
    {"method": "budget_forcing", "budget_tokens": 40}, {"method": "majority", "samples": 4, "answer": LISTED},
], ids=lambda fields: fields["method"])  # fmt: skip
def test_a_search_is_that_of_a_client_of_the_gateway(fields: dict[str, Any], service: Service, client: openai.OpenAI) -> None:
    [expected] = searched(service, [PROMPT], fields | {"seed": 5}, temperature=0.8)
    done = client.completions.create(model=MODEL, prompt=PROMPT, seed=5, temperature=0.8, extra_body={
        "search": fields, "return_token_ids": True})  # fmt: skip
    [choice] = done.choices
    found, chosen = choice.model_extra["search"], expected.verdict.chosen
    assert chosen is not None and (choice.text, choice.model_extra["token_ids"]) == (expected.text, list(chosen.tokens))
    assert (found["method"], found["answer"], found["reason"]) == (fields["method"], expected.answer, expected.verdict.reason)
    assert found["votes"] == pytest.approx(expected.verdict.votes) and list(found["votes"]) == list(expected.verdict.votes)
    assert found["candidates"] == len(expected.verdict.candidates) and found["seed"] == 5
    assert [found["spent"][name] for name in ("samples", "tokens", "forwards", "cancelled")] == [
        getattr(expected.spent, name) for name in ("samples", "tokens", "forwards", "cancelled")]
    assert found["spent"]["seconds"] > 0 and choice.finish_reason == ("stop" if chosen.finished else "length")
    assert done.usage is not None and done.usage.completion_tokens == expected.spent.tokens
    assert done.usage.prompt_tokens == len(encode_prompt(TOKENIZER, PROMPT))


def test_several_prompts_and_a_conversation(service: Service, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"samples": 4, "seed": 9}
    prompts = [PROMPT, question("3 * 4")]
    expected = searched(service, prompts, fields)
    done = client.completions.create(model=MODEL, prompt=prompts, extra_body={"search": fields})
    assert [(choice.index, choice.text) for choice in done.choices] == [(i, each.text) for i, each in enumerate(expected)]
    assert "120" in done.choices[0].model_extra["search"]["votes"]
    tokens = [*TOKENIZER.encode("user: 17 + 5\nassistant: ")]
    [expected_chat] = searched(service, [tokens], fields | {"answer": "text"})
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "17 + 5"}], extra_body={
        "search": fields | {"answer": "text"}, "return_token_ids": True})  # fmt: skip
    assert chat.choices[0].message.content == expected_chat.text and chat.model_extra["prompt_token_ids"] == tokens
    assert chat.choices[0].model_extra["search"]["votes"] == expected_chat.verdict.votes
    seeds = {client.completions.create(model=MODEL, prompt=PROMPT, extra_body={"search": {"samples": 1}})
             .choices[0].model_extra["search"]["seed"] for _ in range(2)}  # fmt: skip
    assert len(seeds) == 2  # as without a search, every request draws others


@pytest.mark.parametrize(("search", "more", "param", "said"), [
    ({"method": "guess"}, {}, "search.method", "unknown method 'guess'"), ({"samples": 0}, {}, "search.samples", "1..4096"),
    ({"samples": 2.5}, {}, "search.samples", "no whole number"), ({"votes": 3}, {}, "search", "unknown key 'votes'"),
    ({"method": "beam", "stop_rule": "beta"}, {}, "search.stop_rule", "given with method beam"), ([], {}, "search", "dictionary"),
    ({"budget_seconds": -1}, {}, "search.budget_seconds", "no number above 0"),
    ({"samples": 4096}, {}, "search.samples", "(http.max_samples)"),
    ({"scorer": OTHER, "method": "best_of_n"}, {}, "search.scorer", "http.search_functions"),
    ({"answer": OTHER}, {}, "search.answer", "http.search_functions"),
    ({"seed": 3}, {"seed": 4}, "seed", "differs from search.seed"),
    ({"method": "best_of_n", "scorer": "verifier"}, {}, "search.scorer", "has no verifier"),
    ({"budget_tokens": 10, "method": "budget_forcing"}, {}, "search.answer_tokens", "leave none"),
    ({"budget_tokens": 1 << 40}, {}, "search.budget_tokens", "is more than"), ({}, {"n": 2}, "n", "give search.samples"),
    ({}, {"stream": True}, "stream", "leave stream out"), ({}, {"logprobs": 1}, "logprobs", "not one sample"),
    ({}, {"logprobs": 0}, "logprobs", "not one sample"), ({}, {"prompt_logprobs": 0}, "prompt_logprobs", "not one sample"),
    ({"method": "beam", "samples": 1, "width": 256}, {"prompt": ["a"] * 5}, "search.width", "(http.max_samples)"),
    ({}, {"echo": True}, "echo", "not one sample"), ({}, {"skip_special_tokens": False}, "skip_special_tokens", "without them"),
    ({}, {"prompt": ["a"] * 100}, "search.samples", "100 prompts of 16 samples"),
])  # fmt: skip
def test_a_search_that_cannot_be_served_is_told_so(search: Any, more: Any, param: str, said: str, service: Service) -> None:
    answer = httpx.post(f"{url_of(service)}/v1/completions", json={"prompt": PROMPT, "search": search, **more},
                        headers={"Authorization": f"Bearer {KEY}"})  # fmt: skip
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert said in error["message"] and "this" not in sys.modules, error


def test_a_budget_in_seconds_ends_what_runs(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=400, extra_body={
        "ignore_eos": True, "search": {"samples": 200, "budget_seconds": 0.3}})  # fmt: skip
    found = done.choices[0].model_extra["search"]
    assert found["reason"] == "budget_seconds" and found["spent"]["cancelled"] > 0 and found["spent"]["seconds"] >= 0.3
    assert done.choices[0].finish_reason == "length"


def test_a_client_that_goes_away_ends_its_search(service: Service, client: openai.OpenAI, gate: StepGate) -> None:
    """No sample ends by itself meanwhile."""
    with control(service) as watched, gate.closed(1):
        wait_for(lambda: not watched.status().figures["outstanding"])  # what the test before has given up
        before = watched.status().figures
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(model=MODEL, prompt=PROMPT, max_tokens=400, extra_body={
                "ignore_eos": True, "search": {"samples": 250}})  # fmt: skip
        wait_for(lambda: not watched.status().figures["outstanding"])
        figures = watched.status().figures
    assert figures["failed"] - before["failed"] == figures["requested"] - before["requested"] > 0 == figures["missing"]
    assert client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=4).choices[0].finish_reason == "length"


def test_a_function_that_hangs_stops_no_other_search(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, fields = threading.Event(), {"samples": 1, "answer": LISTED}
    monkeypatch.setattr(search_threads, "MAX_LEFT", 2)
    monkeypatch.setattr(tasks, "answer", lambda text: go_on.wait() and "7")
    with httpx.Client(base_url=url_of(service), headers={"Authorization": f"Bearer {KEY}"}, timeout=10) as raw:

        def ask(search: dict[str, Any]) -> httpx.Response:
            return raw.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, "search": search})

        try:
            with monkeypatch.context() as patch:
                patch.setattr(search_threads, "STEP_S", 0.05)
                for status, said in ((504, "has not returned within 0.05 s"),) * 2 + ((503, "2 calls of"),):
                    answer = ask(fields)
                    assert answer.status_code == status and said in answer.text and LISTED in answer.json()["error"]["message"]
            assert ask({"samples": 1}).status_code == 200
        finally:
            go_on.set()
        wait_for(lambda: ask(fields).status_code == 200, 5)


def test_searches_that_wait_or_compute_count_as_unfinished(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three searches of 100 samples hang in a function behind their samples; one more sample would be the 301st."""
    go_on, hang = threading.Event(), list[str]()
    monkeypatch.setattr(tasks, "answer", lambda text: hang.append(text) or (go_on.wait(30) and "7"))
    with httpx.Client(base_url=url_of(service), headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as raw:

        def ask(search: Any) -> httpx.Response:
            return raw.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 2, "stop": list("0123456789"), **search})

        with ThreadPoolExecutor(3) as threads:
            try:
                running = [threads.submit(ask, {"search": {"samples": 100, "answer": LISTED}}) for _ in range(3)]
                wait_for(lambda: len(hang) == 3)
                for fields in ({}, {"search": {"samples": 1}}):
                    refused = ask(fields)
                    assert refused.status_code == 429 and "max_unfinished" in refused.text, refused.text
            finally:
                go_on.set()
            assert [each.result(30).status_code for each in running] == [200] * 3
        assert ask({"search": {"samples": 300}}).status_code == 200  # nothing is counted any more


def test_an_abort_ends_a_search_with_what_it_has(service: Service, gate: StepGate) -> None:
    headers = {"Authorization": f"Bearer {CONTROL_KEY}"}
    with httpx.Client(base_url=url_of(service), headers=headers, timeout=30) as raw, ThreadPoolExecutor(1) as threads:
        with gate.closed(1) as waiting:
            running = threads.submit(raw.post, "/v1/completions", json={
                "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "search": {"samples": 30}})  # fmt: skip
            wait_for(lambda: waiting() == 1)
            raw.post("/abort_requests", json={}).raise_for_status()
            [choice] = running.result(20).json()["choices"]
    assert (choice["finish_reason"], choice["search"]["reason"]) == ("abort", "aborted")
    assert choice["search"]["spent"]["cancelled"] > 0


def test_a_pause_holds_a_search_between_two_waves(service: Service, gate: StepGate) -> None:
    headers = {"Authorization": f"Bearer {CONTROL_KEY}"}
    with (httpx.Client(base_url=url_of(service), headers=headers, timeout=60) as raw, ThreadPoolExecutor(2) as threads):
        with gate.closed(1) as waiting:
            running = threads.submit(raw.post, "/v1/completions", json={
                "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "search": {
                    "method": "self_consistency", "stop_rule": "certain", "samples": 36}})  # fmt: skip
            wait_for(lambda: waiting() == 1)
            pause = threads.submit(raw.post, "/pause", params={"mode": "wait"})
            wait_for(lambda: raw.get("/is_paused").json()["is_paused"])
        pause.result(30).raise_for_status()
        assert raw.post("/v1/completions", json={"prompt": PROMPT}).status_code == 503 and not running.done()
        raw.post("/resume").raise_for_status()
        answer = running.result(60)
    assert answer.status_code == 200 and answer.json()["choices"][0]["search"]["spent"]["samples"] == 36, answer.text


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", {"prompt": [5] * 100, "n": 300, "max_tokens": 400, "logprobs": 20}),
    ("/v1/completions", {"prompt": [[5]] * 300, "max_tokens": 400, "logprob_token_ids": list(range(5, 30))}),
    ("/v1/completions", {"prompt": [5] * 500, "n": 300, "max_tokens": 5, "prompt_logprobs": 20}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 300, "max_tokens": 400, "logprobs": True,
                              "top_logprobs": 20}),
    ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"n": 300, "logprobs": 20}}),
])  # fmt: skip
def test_an_answer_that_may_be_too_large_is_refused_before_any_work(path: str, body: Any, service: Service) -> None:
    with control(service) as watched:
        before = watched.status().figures["requested"]
        answer = httpx.post(url_of(service) + path, json=body, headers={"Authorization": f"Bearer {KEY}"})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, "max_tokens", "answer_too_large"), error
        assert "lower max_tokens, n or logprobs" in error["message"] and watched.status().figures["requested"] == before


@pytest.mark.slow
def test_two_services_answer_alike_whole_and_streamed(service: Service, client: openai.OpenAI, tmp_path: Path) -> None:
    """The second one has an engine, a gateway, a ledger and an HTTP face of its own."""
    fields: Any = {"model": MODEL, "prompt": "Q: 17 + 5 * 3 = ?\n", "seed": 2**62 + 3, "n": 3, "temperature": 1.3, "logprobs": 2,
                   "extra_body": {"return_token_ids": True}}  # fmt: skip
    with (live_service(tmp_path) as other,
          openai.OpenAI(base_url=f"{url_of(other)}/v1", api_key=KEY, max_retries=0) as second):  # fmt: skip
        assert other.address != service.address and url_of(other) != url_of(service)
        second.completions.create(model=MODEL, prompt="other work before", n=5)
        wholes = [each.completions.create(**fields).choices for each in (client, second)]
        assert [choice.model_dump() for choice in wholes[0]] == [choice.model_dump() for choice in wholes[1]]
        assert len({choice.text for choice in wholes[0]}) > 1
        for each in (client, second):
            parts = [chunk.choices[0] for chunk in each.completions.create(**fields, stream=True)]
            for choice in wholes[0]:
                mine = [part for part in parts if part.index == choice.index]
                assert "".join(part.text for part in mine) == choice.text and choice.logprobs is not None
                assert [t for part in mine for t in part.model_extra["token_ids"]] == choice.model_extra["token_ids"]
                assert [x for part in mine for x in part.logprobs.token_logprobs] == choice.logprobs.token_logprobs
