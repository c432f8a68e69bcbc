"""Wrong values and wrong types given to the Python library: each is one error of one line that names the field, and nothing is
left
half done. Beside them: what is unusual and can be served."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import blockroll
from blockroll.errors import BlockrollError, CheckpointError, RequestError
from blockroll.model.checkpoint import save_policy
from blockroll.model.policy import Policy
from blockroll.model.scoring import score
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

NORM = "model.norm.weight"
inf, nan = math.inf, math.nan


@cache
def policy() -> Policy:
    return blockroll.load_policy("tiny-reasoner")


@cache
def engine() -> Engine:
    return Engine(policy(), max_batch=2, schedule="ar")


def request(name: str = "a", **changes: Any) -> RolloutRequest:
    return RolloutRequest(**{"id": name, "prompt_tokens": (5, 6), "params": SamplingParams(max_tokens=2)} | changes)


def weights(**changes: Any) -> dict[str, Any]:
    return policy().state_dict() | changes


PARAMS: list[tuple[str, Any]] = [
    ("sampler", "best"), ("sampler", ["ar"]), ("sampler", None),
    ("temperature", "hot"), ("temperature", None), ("temperature", True), ("temperature", nan), ("temperature", inf),
    ("temperature", 1e-40), ("temperature", -0.5), ("temperature", [1.0]), ("temperature", 10**400),
    ("top_k", 1.5), ("top_k", "5"), ("top_k", True), ("top_k", -2), ("top_k", 2**31), ("top_k", None),
    ("top_p", "0.9"), ("top_p", 0), ("top_p", nan), ("top_p", None), ("top_p", True),
    ("min_p", "0"), ("min_p", 1.0), ("min_p", -1e-9), ("min_p", nan),
    ("mix_weight", "w"), ("mix_weight", 1.5), ("mix_weight", nan),
    ("max_tokens", 1.5), ("max_tokens", "16"), ("max_tokens", 0), ("max_tokens", True), ("max_tokens", None), ("max_tokens",
     10**30),
    ("n", 2.0), ("n", "2"), ("n", 10**7), ("n", -1),
    ("seed", 1.0), ("seed", "1"), ("seed", 2**63), ("seed", -1), ("seed", True),
    ("stop_token_ids", [1.5]), ("stop_token_ids", 7), ("stop_token_ids", "7"), ("stop_token_ids", ["7"]), ("stop_token_ids",
     [-1]),
    ("stop_token_ids", [True]), ("stop_token_ids", {"a": 1}),
    ("stop", 5), ("stop", [5]), ("stop", ["x" * 300]), ("stop", {"a": 1}), ("stop", b"x"),
    ("ignore_eos", "no"), ("ignore_eos", 1), ("routed_experts", None), ("include_stop_str_in_output", 0),
    ("min_tokens", 1.0), ("min_tokens", "1"), ("min_tokens", -1), ("min_tokens", 300),
    ("logit_bias", 5), ("logit_bias", {"5": 1.0}), ("logit_bias", {5: "1"}), ("logit_bias", {5: nan}), ("logit_bias", {5: inf}),
    ("logit_bias", {5: 1e7}), ("logit_bias", {1.5: 1}), ("logit_bias", {True: 1}), ("logit_bias", [(1, 1), (1, 2)]),
    ("logit_bias", {10**30: 1}), ("logit_bias", [(1, 2, 3)]),
    ("repetition_penalty", "1"), ("repetition_penalty", inf), ("presence_penalty", None), ("frequency_penalty", "x"),
    ("logprobs", 1.0), ("logprobs", "5"), ("logprobs", 2**20), ("prompt_logprobs", False), ("prompt_logprobs", -1),
    ("logits_processors", 5), ("logits_processors", [None]), ("logits_processors", "f"),
]  # fmt: skip

CALLS: dict[str, tuple[Callable[[], object], str]] = {
    # Requests.
    "an id that is a number": (lambda: request(5), "id"),
    "no id": (lambda: request(""), "id"),
    "an id that is bytes": (lambda: request(b"a"), "id"),
    "tokens that are floats": (lambda: request(prompt_tokens=[5.9, 6.0]), "prompt_tokens"),
    "tokens that are an array of floats": (lambda: request(prompt_tokens=np.array([5.0, 6.0])), "prompt_tokens"),
    "tokens that are a tensor of floats": (lambda: request(prompt_tokens=torch.tensor([5.5])), "prompt_tokens"),
    "tokens that are text": (lambda: request(prompt_tokens="12"), "prompt_tokens"),
    "tokens that are bytes": (lambda: request(prompt_tokens=b"12"), "prompt_tokens"),
    "tokens of text": (lambda: request(prompt_tokens=["1", "2"]), "prompt_tokens"),
    "tokens that are true": (lambda: request(prompt_tokens=[True, False]), "prompt_tokens"),
    "tokens that are none": (lambda: request(prompt_tokens=None), "prompt_tokens"),
    "tokens that are one number": (lambda: request(prompt_tokens=5), "prompt_tokens"),
    "tokens that are a section": (lambda: request(prompt_tokens={5: 6}), "prompt_tokens"),
    "tokens in rows": (lambda: request(prompt_tokens=np.ones((2, 2), int)), "prompt_tokens"),
    "an array of one number": (lambda: request(prompt_tokens=np.array(5)), "prompt_tokens"),
    "no tokens": (lambda: request(prompt_tokens=()), "prompt_tokens"),
    "a token below 0": (lambda: request(prompt_tokens=[5, -1]), "prompt_tokens"),
    "parameters that are a dict": (lambda: request(params={"temperature": 1}), "params"),
    "parameters that are none": (lambda: request(params=None), "params"),
    "a seed that is a float": (lambda: request(seed=1.5), "seed"),
    "a seed that is true": (lambda: request(seed=True), "seed"),
    "samples that are a float": (lambda: request(samples=2.0), "samples"),
    "ten million samples": (lambda: request(samples=10**7), "samples"),
    "samples that are text": (lambda: request(samples="2"), "samples"),
    # Engines.
    "a policy that is a number": (lambda: Engine(5), "policy"),
    "a policy that is none": (lambda: Engine(None), "policy"),
    "a device that does not exist": (lambda: Engine("tiny-reasoner", device="gpu"), "device"),
    "a device that is a number": (lambda: Engine("tiny-reasoner", device=1.5), "device"),
    "an accelerator that is not there": (lambda: Engine("tiny-reasoner", device="cuda:77"), "device"),
    "a dtype that does not exist": (lambda: Engine("tiny-reasoner", dtype="float8"), "dtype"),
    "a config that is a dict": (lambda: Engine(policy(), {"max_batch": 2}), "config"),
    "an unknown option": (lambda: Engine(policy(), max_batsh=2), "max_batsh"),
    "a batch that is a float": (lambda: Engine(policy(), max_batch=2.0), "max_batch"),
    "a batch that is text": (lambda: EngineConfig(max_batch="2"), "max_batch"),
    "no pages": (lambda: EngineConfig(pages=0), "pages"),
    "pages that are a float": (lambda: EngineConfig(pages=1.5), "pages"),
    "a page of text": (lambda: EngineConfig(page_size="x"), "page_size"),
    "a block of a float": (lambda: EngineConfig(block_size=4.0), "block_size"),
    "a block of 1": (lambda: EngineConfig(block_size=1), "block_size"),
    "captured by text": (lambda: EngineConfig(captured="no"), "captured"),
    "a schedule that is a number": (lambda: EngineConfig(schedule=5), "schedule"),
    "a schedule of another name": (lambda: Engine(policy(), schedule="best"), "schedule"),
    "levels that are text": (lambda: Schedule("fused", levels="04"), "levels"),
    "levels of halves": (lambda: Schedule("fused", levels=(0.5,)), "levels"),
    "drafts of halves": (lambda: Schedule("two_pass", drafts=1.5), "schedule.drafts"),
    "a block of a schedule that is text": (lambda: Schedule("fused", block="8"), "schedule.block"),
    # Calls of an engine.
    "a request that is a dict": (lambda: engine().add({"id": "a"}), "requests"),
    "a rollout of text": (lambda: engine().rollout(["a"]), "requests"),
    "a rollout of one request": (lambda: engine().rollout(request()), "requests"),
    "a rollout of nothing": (lambda: engine().rollout(None), "requests"),
    "two requests of one name": (lambda: engine().rollout([request(), request()]), "id"),
    "a token past the vocabulary": (lambda: engine().add(request(prompt_tokens=[10**30])), "prompt_tokens"),
    "a bias past the vocabulary": (lambda: engine().add(request(params=SamplingParams(logit_bias={999: 1}))), "logit_bias"),
    "every token forbidden": (lambda: engine().add(request(params=SamplingParams(logit_bias=dict.fromkeys(range(274), -inf)))),
                              "logit_bias"),
    "every token forbidden or an end": (lambda: engine().add(request(params=SamplingParams(
        logit_bias={i: -1e9 for i in range(274) if i != 2}, min_tokens=1))), "min_tokens"),
    "prompts that are none": (lambda: engine().generate(None), "prompts"),
    "prompts that are a number": (lambda: engine().generate(5), "prompts"),
    "a prompt of floats": (lambda: engine().generate([[1.5, 2.5]]), "prompts[0]"),
    "a prompt that is true": (lambda: engine().generate([True]), "prompts[0]"),
    "an empty prompt": (lambda: engine().generate(["Q", ""]), "prompts[1]"),
    "parameters of text": (lambda: engine().generate(["Q"], "greedy"), "params"),
    "parameters that are a number": (lambda: engine().generate(["Q"], 5), "params"),
    "a list of wrong parameters": (lambda: engine().generate(["Q"], [{"n": 1}]), "params"),
    # Weights.
    "weights that are none": (lambda: engine().load_weights(None, 1), "weights"),
    "weights that are a list": (lambda: engine().load_weights([1], 1), "weights"),
    "weights under numbers": (lambda: engine().load_weights({1: torch.ones(2)}, 1), "weights"),
    "a version that is a float": (lambda: engine().load_weights(weights(), 1.0), "version"),
    "a version below 0": (lambda: engine().load_weights(weights(), -1), "version"),
    "an unknown policy for what runs": (lambda: engine().load_weights(weights(), 1, "later"), "in_flight"),
    "a policy for what runs that is a list": (lambda: engine().load_weights(weights(), 1, []), "in_flight"),
    "weights of an array": (lambda: engine().load_weights(weights(**{NORM: np.ones(128, np.float32)}), 1), "weights"),
    "weights of int8": (lambda: engine().load_weights(weights(**{NORM: torch.ones(128, dtype=torch.int8)}), 1), "weights"),
    "weights of NaN": (lambda: engine().load_weights(weights(**{NORM: torch.full((128,), nan)}), 1), "weights"),
    "weights without numbers": (lambda: engine().load_weights(weights(**{NORM: torch.ones(128, device="meta")}), 1), "weights"),
    "sparse weights": (lambda: engine().load_weights(weights(**{NORM: torch.ones(128).to_sparse()}), 1), "weights"),
    "another head than the embedding": (lambda: engine().load_weights(weights(**{"lm_head.weight": torch.zeros(274, 128)}), 1),
                                        "weights"),
    # Policies, scores, files.
    "a policy of a number": (lambda: blockroll.load_policy(5), "policy"),
    "a policy of a list": (lambda: blockroll.load_policy(["tiny-reasoner"]), "policy"),
    "a policy of 5,000 characters": (lambda: blockroll.load_policy("x" * 5000), "policy"),
    "a policy with a NUL": (lambda: blockroll.load_policy("a\0b"), "policy"),
    "a dtype that is a list": (lambda: blockroll.load_policy("tiny-reasoner", []), "dtype"),
    "the device meta": (lambda: blockroll.load_policy("tiny-reasoner", device="meta"), "device"),
    "a policy made of a dict": (lambda: Policy({"hidden_size": 4}), "config"),
    "a Markov head of text": (lambda: policy().add_markov("4", torch.Generator()), "rank"),
    "a Markov head of 0": (lambda: policy().add_markov(0, torch.Generator()), "rank"),
    "saving what is no policy": (lambda: save_policy({}, "/tmp/never"), "policy"),
    "saving as an unknown dtype": (lambda: save_policy(policy(), "/tmp/never", "float8"), "dtype"),
    "shards of no bytes": (lambda: save_policy(policy(), "/tmp/never", max_shard_bytes=0), "max_shard_bytes"),
    "shards of half a byte": (lambda: save_policy(policy(), "/tmp/never", max_shard_bytes=0.5), "max_shard_bytes"),
    "scores of no policy": (lambda: score("tiny-reasoner", [((1,), (2,))]), "policy"),
    "scores of a number": (lambda: score(policy(), 5), "sequences"),
    "scores of no pairs": (lambda: score(policy(), [(1, 2, 3)]), "sequences"),
    "scores of floats": (lambda: score(policy(), [((1,), (2.5,))]), "tokens"),
    "scores of true": (lambda: score(policy(), [((True,), (2,))]), "prompt_tokens"),
    "scores past the vocabulary": (lambda: score(policy(), [((1,), (274,))]), "tokens"),
    "scores of an empty prompt": (lambda: score(policy(), [((), (2,))]), "prompt_tokens"),
    "scores at a temperature that vanishes": (lambda: score(policy(), [((1,), (2,))], 1e-40), "temperature"),
    "scores at no temperature": (lambda: score(policy(), [((1,), (2,))], nan), "temperature"),
    "scores at a text": (lambda: score(policy(), [((1,), (2,))], "1"), "temperature"),
    "log-probabilities of a number": (lambda: policy().logprobs(5, 6), "prompt_tokens"),
    "log-probabilities of floats": (lambda: policy().logprobs([[1.5]], [[2]]), "prompt_tokens"),
    "log-probabilities at 1e-40": (lambda: policy().logprobs([[1]], [[2]], 1e-40), "temperature"),
}  # fmt: skip


def one_line(error: BlockrollError, field: str) -> None:
    said = str(error)
    assert said.startswith(f"{field}: ") and "; " in said and "\n" not in said and len(said) < 600, said


@pytest.mark.parametrize(("field", "value"), PARAMS, ids=[f"{field}={value!r:.30}" for field, value in PARAMS])
def test_parameters(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    one_line(error.value, field)


@pytest.mark.parametrize("what", CALLS)
def test_calls(what: str) -> None:
    call, field = CALLS[what]
    with pytest.raises((RequestError, CheckpointError, blockroll.errors.InvalidInput)) as error:
        call()
    one_line(error.value, field)
    assert not engine().has_work and engine().version == 0


def test_numbers_of_other_libraries_are_taken_and_become_pythons() -> None:
    given = SamplingParams(n=np.int64(2), top_k=np.int32(3), temperature=np.float32(0.5), stop_token_ids=np.array([7, 8]),
                           seed=np.int64(4), max_tokens=np.uint8(2))  # fmt: skip
    assert (given.n, given.top_k, given.stop_token_ids, given.seed, given.max_tokens) == (2, 3, (7, 8), 4, 2)
    assert {type(value) for value in (given.n, given.top_k, given.seed, given.max_tokens, *given.stop_token_ids)} == {int}
    for tokens in ([5, 6], (5, 6), np.array([5, 6], np.int16), torch.tensor([5, 6]), list(torch.tensor([5, 6])), iter([5, 6]),
                   [np.int64(5), 6], range(5, 7)):  # fmt: skip
        made = request(prompt_tokens=tokens, params=given)
        assert made.prompt_tokens == (5, 6) and {type(token) for token in made.prompt_tokens} == {int}
    sequences = [(np.array([5, 6]), torch.tensor([7]))]
    assert score(policy(), sequences)[0] == score(policy(), [((5, 6), (7,))])[0]


@pytest.mark.parametrize("sampler", ["ar", "lossless", "coupled", "mixed"])
@pytest.mark.parametrize("bias", [-1e9, -inf, -(10.0**300)])
def test_biases_that_forbid(sampler: Any, bias: float) -> None:
    """As vLLM's users write them. Forbidden tokens never come, nor are they drafted, and every number is finite."""
    asked = SamplingParams(sampler, temperature=1.5, max_tokens=12, ignore_eos=True, logit_bias={i: bias for i in range(0,
     274, 2)})
    for sample in Engine(policy()).rollout([request(params=asked, samples=3)]):
        assert all(token % 2 for token in sample.tokens)
        assert np.isfinite(sample.logprobs).all() and np.isfinite(sample.behavior_logprobs).all()


def test_an_empty_engine_steps_to_nothing() -> None:
    assert engine().step() == []
    assert engine().rollout([]) == [] and engine().generate([]) == []
    assert engine().forwards == Engine(policy(), max_batch=2, schedule="ar").forwards == 0 or not engine().has_work


class TestFailedRequests:
    """A sample with a log-probability that is not finite is a failed request, never a trajectory."""

    @staticmethod
    def overflowing() -> Engine:
        """Finite weights whose logits overflow."""
        bad = blockroll.load_policy("tiny-reasoner")
        bad.model.norm.weight.fill_(3e38)
        return Engine(bad, max_batch=3)

    @pytest.mark.parametrize("changes", [dict(), dict(temperature=0.0), dict(top_p=0.9), dict(logprobs=2),
     dict(prompt_logprobs=1)])
    @pytest.mark.parametrize("sampler", ["ar", "lossless", "coupled", "mixed"])
    def test_rollout_raises_and_leaves_the_engine_empty(self, sampler: Any, changes: dict[str, Any]) -> None:
        bad = self.overflowing()
        params = SamplingParams(sampler, max_tokens=4, ignore_eos=True, **changes)
        with pytest.raises(RequestError) as error:
            bad.rollout([request(params=params, samples=5), request("b", params=params)])
        one_line(error.value, "logprobs")
        assert "request 'a'" in str(error.value) and "nan" in str(error.value)
        assert not bad.has_work and not bad.failed and bad.cache.free_pages == bad.cache.total_pages

    def test_step_reports_the_request_whole_and_others_go_on(self) -> None:
        """One request fails half way, at a weight version; the samples of others do not notice."""
        served = Engine(blockroll.load_policy("tiny-reasoner"), max_batch=8, schedule="ar")
        short = SamplingParams("ar", max_tokens=3, ignore_eos=True)
        for name in ("early", "late"):
            served.add(request(name, params=short, samples=2))
        early = []
        while served.has_work:
            early += served.step()
        served.load_weights(policy().state_dict() | {NORM: torch.full((128,), 3e38)}, 1)
        served.add(request("bad", params=short, samples=12))
        served.step()
        done = []
        while served.has_work:
            done += served.step()
        assert len(early) == 4 and not done and list(served.failed) == ["bad"]
        one_line(served.failed["bad"], "logprobs")
        assert served.cache.free_pages == served.cache.total_pages
        served.load_weights(policy().state_dict(), 2)
        served.add(request("bad", params=short))
        again = [sample for _ in range(3) for sample in served.step()]
        assert [sample.request_id for sample in again] == ["bad"] and np.isfinite(again[0].logprobs).all()

    def test_aborted_samples_too(self) -> None:
        bad = self.overflowing()
        bad.add(request(params=SamplingParams("ar", max_tokens=9, ignore_eos=True), samples=2))
        bad.step()
        assert bad.abort() == [] and list(bad.failed) == ["a"]

    def test_a_processor_that_returns_no_number_is_an_error(self) -> None:
        def spoil(_: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[3] = nan
            return logits

        with pytest.raises(RequestError) as error:
            engine().rollout([request(params=SamplingParams(logits_processors=[spoil], max_tokens=2))])
        one_line(error.value, "logits_processors")
        assert not engine().has_work

    def test_scores_are_numbers_or_an_error(self) -> None:
        with pytest.raises(RequestError) as error:
            score(self.overflowing().policy, [((5, 6), (7,))])
        one_line(error.value, "logprobs")
