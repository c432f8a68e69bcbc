"""Searches by the shipped policy in one engine: what each method returns, and what it spends."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import blockroll
from blockroll.errors import InvalidInput, RequestError
from blockroll.model.tasks import Task, answer, make_tasks, score
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.engine import Engine
from blockroll.rollout.search.candidates import Candidate, Question, SearchResult
from blockroll.rollout.search.config import METHODS, SearchConfig
from blockroll.rollout.search.context import Search
from blockroll.rollout.search.driver import run_searches, search
from blockroll.rollout.search.engine_source import EngineSource
from blockroll.rollout.search.functions import canonical, load_function
from blockroll.rollout.search.self_consistency import stops
from blockroll.rollout.search.votes import tally, winner
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.seeds import derived_seed

PARAMS = SamplingParams(sampler="coupled", temperature=0.8, max_tokens=96)
PLAIN = "{question}{candidates}\n{question}"
"""An aggregation prompt that is as short as can be."""
TASKS = make_tasks("heldout", 4, 3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("tiny-reasoner", max_batch=32, page_size=8, pages=600, device="cpu")


def question(engine: Engine, task: Task) -> Question:
    return Question(task.id, tuple(encode_prompt(engine.policy.tokenizer, task.prompt)), task.prompt, partial(score, task))


def found(engine: Engine, tasks: list[Task] = TASKS, params: SamplingParams = PARAMS, **fields) -> list[SearchResult]:
    config = SearchConfig(**{"samples": 8, "seed": 5, **fields})
    results = search(EngineSource(engine), [question(engine, task) for task in tasks], config, params)
    assert not engine.has_work
    assert [result.id for result in results] == [task.id for task in tasks]
    return results


def short(text: str) -> int:
    return -len(text)


def by_length(prompt: str, text: str) -> float:
    assert prompt.startswith("Q:")
    return float(short(text))


def first_digit(text: str) -> str | None:
    return next((c for c in text if c.isdigit()), None)


def test_sample_j_is_the_same_in_every_method_and_batch(engine: Engine) -> None:
    """It is the one that its seed gives, alone."""
    voted, best, few = found(engine), found(engine, method="best_of_n"), found(engine, TASKS[:1], samples=3)
    prompts = [question(engine, TASKS[0]).prompt_tokens] * 8
    names = [f"{TASKS[0].id}/{j}" for j in range(8)]
    alone = [engine.rollout([RolloutRequest(name, prompt, PARAMS, derived_seed(5, name))])[0]
             for name, prompt in zip(names, prompts, strict=True)]  # fmt: skip
    assert [c.tokens for c in voted[0].verdict.candidates] == [tuple(sample.tokens) for sample in alone]
    assert [c.logprob for c in voted[0].verdict.candidates] == [float(sample.logprobs.sum(dtype=float)) for sample in alone]
    assert [c.tokens for c in few[0].verdict.candidates] == [tuple(sample.tokens) for sample in alone[:3]]
    for one, other in zip(voted, best, strict=True):
        assert [c.tokens for c in one.verdict.candidates] == [c.tokens for c in other.verdict.candidates]
    spent = voted[0].spent
    assert (spent.samples, spent.tokens) == (8, sum(len(sample.tokens) for sample in alone))
    assert (spent.forwards, spent.cancelled) == (sum(sample.forwards for sample in alone), 0)


def test_votes_and_best_of_n_decide_by_their_formulas(engine: Engine) -> None:
    results = {name: found(engine, method=name) for name in ("majority", "weighted_vote", "best_of_n")}
    mean = found(engine, method="best_of_n", scorer="mean_logprob")
    judged = found(engine, method="best_of_n", scorer="verifier")
    by_function = found(engine, method="best_of_n", scorer=f"{__name__}:by_length")
    rights = 0
    for i, task in enumerate(TASKS):
        candidates = results["majority"][i].verdict.candidates
        answers = [c.answer for c in candidates]
        assert answers == [a if c.finished and (a := answer(c.text)) else None for c in candidates]
        counts = {a: answers.count(a) for a in answers if a is not None}
        assert results["majority"][i].verdict.votes == counts
        assert results["majority"][i].answer == max(counts, key=counts.__getitem__)
        weights = {a: sum(math.exp(c.logprob) for c in candidates if c.answer == a) for a in counts}
        assert results["weighted_vote"][i].verdict.votes == pytest.approx(weights)
        assert results["weighted_vote"][i].answer == max(weights, key=weights.__getitem__)
        whole = [c for c in candidates if c.finished]
        assert results["best_of_n"][i].text == max(whole, key=lambda c: c.logprob).text
        assert mean[i].text == max(whole, key=lambda c: c.logprob / c.count).text
        assert by_function[i].text == max(whole, key=lambda c: short(c.text)).text
        right = max(score(task, c.text) for c in whole)
        assert score(task, judged[i].text or "") == right
        rights += right
    assert rights >= 2


def test_a_weighted_vote_tells_long_samples_apart(engine: Engine, monkeypatch) -> None:
    """Samples of thousands of tokens have probabilities below the least float."""
    candidates = [Candidate((5,), -900.0, 2000, True, "A:1", "1"), Candidate((5,), -760.0, 2000, True, "A:2", "2"),
                  Candidate((5,), -900.5, 2000, True, "A:1", "1"), Candidate((5,), -1.0, 9, False, "", None)]  # fmt: skip

    def made(search: Search, count: int | None):
        yield from ()
        return candidates

    monkeypatch.setattr(Search, "candidates", made)
    (result,) = found(engine, TASKS[:1], method="weighted_vote", scorer="logprob")
    assert result.answer == "2" and result.verdict.chosen is not None and result.verdict.chosen.logprob == -760.0


@pytest.mark.parametrize("rule", ["beta", "dirichlet", "certain"])
def test_an_early_stop_uses_the_first_samples_of_the_whole_vote(engine: Engine, rule: str) -> None:
    whole, early = found(engine), found(engine, method="self_consistency", stop_rule=rule, confidence=0.9)
    for full, stopped in zip(whole, early, strict=True):
        candidates, left = full.verdict.candidates, 8
        for used in range(1, 9):  # one by one
            reason, left = stops(tally(candidates[:used]), 8 - used, rule, 0.9), 8 - used
            if reason or not left:
                break
        assert [c.tokens for c in stopped.verdict.candidates] == [c.tokens for c in candidates[:used]]
        assert stopped.answer == winner(tally(candidates[:used]))
        if rule == "certain":
            assert stopped.answer == full.answer
    assert sum(r.spent.tokens for r in early) < sum(r.spent.tokens for r in whole)
    assert {r.verdict.reason for r in early} <= {"certain", "sure", "done"}


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_of_tokens_is_never_exceeded(engine: Engine, method: str) -> None:
    fields = {"aggregate": 2, "aggregation": PLAIN, "tail": 24} if method == "markovian_rsa" else {}
    fields |= {"width": 2} if method == "beam" else {"samples": 4 if method == "markovian_rsa" else None}
    for budget in (17, 60, 250):
        results = found(engine, TASKS[:3], method=method, budget_tokens=budget, **fields)
        assert all(0 < result.spent.tokens <= budget for result in results)
        if method in ("majority", "weighted_vote", "best_of_n"):
            assert all(result.spent.tokens == budget and result.verdict.reason == "budget_tokens" for result in results)


def test_after_a_budget_of_seconds_nothing_runs_on(engine: Engine) -> None:
    results = found(engine, TASKS[:2], samples=None, budget_seconds=0.4)
    for result in results:
        assert result.verdict.reason == "budget_seconds"
        assert 0.4 <= result.spent.seconds < 10  # a step later, on a busy machine too
        assert result.spent.samples == len(result.verdict.candidates)
        assert result.spent.cancelled > 0
        assert result.spent.tokens > sum(c.count for c in result.verdict.candidates)  # the cancelled ones' count too


def test_beam_grows_the_texts_that_its_scorer_prefers(engine: Engine) -> None:
    for result in found(engine, TASKS[:3], method="beam", scorer="mean_logprob", width=2):
        chosen = result.verdict.chosen
        assert chosen is not None and chosen.finished and len(result.verdict.candidates) == 4
        assert chosen.score == pytest.approx(chosen.logprob / chosen.count)
        assert chosen.score == max(c.score for c in result.verdict.candidates if c.finished and c.score is not None)
        assert result.spent.samples > 8  # first steps, and what grew of them
        scored = engine.policy.tokenizer.decode(list(chosen.tokens), skip_special_tokens=True)
        assert chosen.text == scored and answer(scored) is not None
    # Steps of any length, which leave the texts of a round unequal room.
    wild = SamplingParams(sampler="coupled", temperature=3.0, max_tokens=24)
    for result in found(engine, TASKS[:2], wild, method="beam", scorer="logprob", width=2, step_end="1"):
        assert max(c.count for c in result.verdict.candidates) <= 24
    refused = found(engine, TASKS[:1], method="beam", scorer=f"{__name__}:by_length", width=8, samples=8)[0]
    assert len(refused.verdict.candidates) == 1


def test_markovian_rsa_carries_tails_of_tau_tokens_and_shares_keys_and_values(engine: Engine, monkeypatch) -> None:
    prompts: list[tuple[int, ...]] = []
    add = engine.add
    monkeypatch.setattr(engine, "add", lambda request: (prompts.append(request.prompt_tokens), add(request))[1])
    before = engine.cached_tokens
    samples, rounds, tails, tau = 6, 2, 3, 20
    result = found(engine, TASKS[:1], method="markovian_rsa", samples=samples, rounds=rounds, aggregate=tails, tail=tau,
                   aggregation=PLAIN)[0]  # fmt: skip
    monkeypatch.undo()
    asked = question(engine, TASKS[0]).prompt_tokens
    assert len(prompts) == samples * (rounds + 1) and prompts[:samples] == [asked] * samples
    between = 2 * (tails - 1) + 2  # line ends
    for prompt in prompts[samples:]:
        assert len(asked) + tails <= len(prompt) <= 2 * len(asked) + tails * tau + between
        assert prompt[: len(asked)] == asked
    assert len(set(prompts[samples:])) > samples
    assert result.spent.samples == samples * (rounds + 1) and len(result.verdict.candidates) == samples
    assert engine.cached_tokens > before
    none = found(engine, TASKS[:1], method="markovian_rsa", rounds=0, aggregation=PLAIN)[0]
    vote = found(engine, TASKS[:1])[0]
    assert (none.answer, none.verdict.votes) == (vote.answer, vote.verdict.votes)


def test_budget_forcing_cuts_and_prolongs_the_steps(engine: Engine) -> None:
    task = max(make_tasks("heldout", 8, 1, only=["chain_sum"]), key=lambda task: len(task.completion))
    forced = found(engine, [task], method="budget_forcing", budget_tokens=24, answer_tokens=12)[0]
    assert forced.verdict.reason == "forced" and forced.text is not None and "\nA:" in forced.text
    assert forced.spent.tokens <= 24 and forced.spent.samples == 2
    free = found(engine, [task], method="budget_forcing", answer_tokens=12)[0]
    assert free.verdict.reason == "done" and free.answer is not None and free.spent.tokens > 24
    longer = found(engine, [task], method="budget_forcing", answer_tokens=12, extend=";1", extensions=1)[0]
    assert longer.text is not None and ";1" in longer.text and longer.text.count("\nA:") == 1
    assert longer.spent.tokens > free.spent.tokens
    timed = found(engine, [task], method="budget_forcing", budget_seconds=30.0, answer_tokens=12)[0]
    assert timed.answer is not None and timed.spent.samples > 2  # chunks


def test_answers_are_found_by_a_users_function_and_compared_in_canonical_form(engine: Engine) -> None:
    forms = {" 007 ": "7", "-0": "0", "+5": "5", "a  b\n": "a b", "3.": "3", 12: "12", "": None, "1e5": "1e5"}
    assert {given: canonical(given) for given in forms} == forms
    result = found(engine, TASKS[:1], answer=f"{__name__}:first_digit")[0]
    assert set(result.verdict.votes) <= set("0123456789")


@pytest.mark.parametrize(("reference", "said"), [
    (":f", "names no function"), ("math", "names no function"), ("no_such_module:f", "cannot be imported"),
    ("raises_at_import:f", "ZeroDivisionError"), ("math:no_such", "has no function 'no_such'"),
])  # fmt: skip
def test_a_function_that_cannot_be_loaded_is_told_so(
    reference: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "raises_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidInput, match=f"http.search_functions: .*{said}"):
        load_function(reference, "http.search_functions")


def test_what_stops_a_search_leaves_nothing_in_the_engine(engine: Engine) -> None:
    source, questions = EngineSource(engine), [question(engine, task) for task in TASKS]
    running = run_searches(source, questions, SearchConfig(samples=2), PARAMS)
    next(running)
    assert engine.has_work
    running.close()
    assert not engine.has_work
    for name, said in (("explodes", "ZeroDivisionError"), ("leaves", "SystemExit")):
        with pytest.raises(RequestError, match=f"test_search:{name} raised {said}"):
            search(source, questions, SearchConfig(samples=2, answer=f"{__name__}:{name}"), PARAMS)
        assert not engine.has_work
    with pytest.raises(RequestError, match="two questions share"):
        search(source, questions[:1] * 2, SearchConfig(), PARAMS)
    with pytest.raises(RequestError, match="has no verifier"):
        search(source, [replace(questions[0], verifier=None)], SearchConfig(method="best_of_n", scorer="verifier"), PARAMS)
    long = SearchConfig(method="markovian_rsa", samples=4, aggregation=PLAIN + "1" * 500)
    with pytest.raises(RequestError, match="maximum is 512"):
        search(source, questions[:1], long, PARAMS)
    assert not engine.has_work
    engine.add(RolloutRequest("other", (1, 2), PARAMS))
    with pytest.raises(RequestError, match="holds samples"):
        EngineSource(engine)
    engine.abort()


@pytest.mark.parametrize(("fields", "said"), [
    ({"method": "best_of_n", "scorer": "too_large"}, "scorer: .*too_large returned 1000"),
    ({"method": "weighted_vote", "scorer": "nearly_too_large"}, "scorer: .* returned 1e.308 as a weight; return 0 to 1e.300"),
    ({"answer": "without_text"}, "answer: .*without_text raised ZeroDivisionError"),
    ({"answer": "many_digits"}, "answer: .*many_digits raised ValueError"),
])  # fmt: skip
def test_what_a_users_function_returns_is_no_bug_of_ours(engine: Engine, fields: dict, said: str) -> None:
    fields = {name: f"{__name__}:{value}" if name in ("scorer", "answer") else value for name, value in fields.items()}
    with pytest.raises(RequestError, match=said):
        found(engine, TASKS[:1], replace(PARAMS, temperature=0.0), samples=2, **fields)
    assert not engine.has_work


@pytest.mark.parametrize(("prompt", "said"), [
    ("\ud800", "prompt: .* is no Unicode text"), (5, "prompts: 5 is no list"), ([-1], "prompts: -1 is no token id"),
    ([1, 1.5], "prompts: 1.5 at place 1"), (b"ab", "prompts: b'ab' is no list"), ([], "no prompt tokens"),
])  # fmt: skip
def test_a_prompt_that_is_none_is_told_so(engine: Engine, prompt: object, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        blockroll.search(engine, [prompt], SearchConfig(samples=1), PARAMS)  # type: ignore[list-item]
    assert not engine.has_work


def too_large(prompt: str, text: str) -> int:
    return 10**400


def nearly_too_large(prompt: str, text: str) -> float:
    return 1e308


class NoText:
    def __str__(self) -> str:
        return str(1 / 0)


def without_text(text: str) -> NoText:
    return NoText()


def many_digits(text: str) -> int:
    return 10**5000


def explodes(text: str) -> str:
    return str(1 / 0)


def leaves(text: str) -> str:
    sys.exit("no answer")


@pytest.mark.parametrize(("fields", "said"), [
    ({"method": "best"}, "method: unknown method 'best'"),
    ({"method": 3}, "method: unknown method 3"),
    ({"samples": 0}, "samples: 0 is no whole number in 1..4096"),
    ({"samples": True}, "samples: True"),
    ({"samples": None}, "samples: None, and there is no budget"),
    ({"samples": None, "budget_tokens": 9, "method": "beam"}, "samples: None, and beam needs a number"),
    ({"budget_seconds": math.nan}, "budget_seconds: nan"),
    ({"budget_tokens": -1}, "budget_tokens: -1"),
    ({"method": "self_consistency", "confidence": 1.0}, "confidence: 1.0"),
    ({"confidence": 0.9}, "confidence: given with method majority"),
    ({"answer": "last"}, "answer: unknown answer 'last'"),
    ({"answer": "os:system"}, "answer: 'os:system' names a function"),
    ({"method": "best_of_n", "scorer": "os:system"}, "scorer: 'os:system' names a function"),
    ({"method": "markovian_rsa", "aggregation": "{question}"}, "aggregation: '{question}'"),
    ({"method": "markovian_rsa", "samples": 2}, "aggregate: 4 is more than the 2 candidates"),
    ({"tokens": 5}, "search: unknown key 'tokens'"),
    ({"method": "budget_forcing", "force": "é" * 129}, "force: 'éééé"),
    ({"method": "beam", "step_end": "a" * 257}, "step_end: 'aaa"),
])  # fmt: skip
def test_a_configuration_is_checked_when_it_is_made(fields: dict, said: str) -> None:
    with pytest.raises(RequestError) as error:
        SearchConfig.from_mapping(fields)
    assert str(error.value).startswith(said)
