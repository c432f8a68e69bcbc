"""What searches are worth on 400 held-out tasks, by the shipped policy. Run with -s to see the figures."""

from __future__ import annotations

import math
from functools import partial

import pytest

from blockroll.model.tasks import make_tasks, score
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.engine import Engine
from blockroll.rollout.search.candidates import Candidate, Question, SearchResult
from blockroll.rollout.search.config import SearchConfig
from blockroll.rollout.search.driver import search
from blockroll.rollout.search.engine_source import EngineSource
from blockroll.rollout.search.estimators import majority_at_k
from blockroll.rollout.search.self_consistency import stops
from blockroll.rollout.search.votes import tally, winner
from blockroll.rollout.types import SamplingParams

TASKS, SAMPLES, TEMPERATURE = 400, 16, 0.7


class Figures:
    """Runs searches over the tasks with one engine, and counts."""

    def __init__(self) -> None:
        self._engine = Engine("tiny-reasoner", max_batch=64, device="cpu", pages=2400)
        self.tasks = make_tasks("heldout", TASKS, 0)
        encode = partial(encode_prompt, self._engine.policy.tokenizer)
        self._questions = [Question(t.id, tuple(encode(t.prompt)), t.prompt) for t in self.tasks]

    def run(self, method: str, **fields) -> list[SearchResult]:
        params = SamplingParams(temperature=TEMPERATURE)
        return search(EngineSource(self._engine), self._questions, SearchConfig(method=method, **fields), params)  # type: ignore[arg-type]

    def right(self, results: list[SearchResult]) -> float:
        return sum(score(t, r.text) if r.answer is not None and r.text else 0.0
                   for t, r in zip(self.tasks, results, strict=True)) / TASKS  # fmt: skip

    def right_samples(self, task_index: int, candidates: list[Candidate]) -> list[bool]:
        return [c.finished and score(self.tasks[task_index], c.text) == 1.0 for c in candidates]


@pytest.fixture(scope="module")
def figures() -> Figures:
    return Figures()


@pytest.fixture(scope="module")
def majority(figures: Figures) -> list[SearchResult]:
    return figures.run("majority", samples=SAMPLES)


def tokens(results: list[SearchResult]) -> float:
    return sum(result.spent.tokens for result in results) / len(results)


@pytest.mark.slow
def test_a_vote_and_best_of_16_are_above_one_sample(figures: Figures, majority: list[SearchResult]) -> None:
    """Best of 16 and the weighted vote are taken of the majority's samples: all methods draw the same ones."""
    marks = [figures.right_samples(i, list(result.verdict.candidates)) for i, result in enumerate(majority)]
    pass_at_1 = sum(map(sum, marks)) / (TASKS * SAMPLES)
    best = {}
    for name in ("logprob", "mean_logprob"):
        chosen = [max(r.verdict.candidates, key=lambda c: (c.finished, getattr(c, name))) for r in majority]
        best[name] = sum(mark[list(r.verdict.candidates).index(c)]
                         for r, c, mark in zip(majority, chosen, marks, strict=True)) / TASKS  # fmt: skip
    weighted = 0.0
    for mark, result in zip(marks, majority, strict=True):
        candidates = list(result.verdict.candidates)
        answer = winner(tally(candidates, lambda c: math.exp(c.mean_logprob)))
        weighted += any(right for c, right in zip(candidates, mark, strict=True) if c.answer == answer) / TASKS
    print(f"\nT={TEMPERATURE}: pass@1 {pass_at_1:.4f}, majority@16 {figures.right(majority):.4f}, best of 16 {best},"
          f" weighted {weighted:.4f}, pass@16 {sum(map(any, marks)) / TASKS:.4f}, {tokens(majority):.0f} tokens")
    assert figures.right(majority) >= pass_at_1 + 0.05
    assert best["logprob"] >= pass_at_1 + 0.05


@pytest.mark.slow
def test_an_early_stop_gives_the_vote_for_fewer_tokens(figures: Figures, majority: list[SearchResult]) -> None:
    early = figures.run("self_consistency", samples=SAMPLES)
    share = tokens(early) / tokens(majority)
    print(f"\nearly stop: {figures.right(early):.4f} against {figures.right(majority):.4f} for {share:.3f} of the tokens,"
          f" {sum(r.spent.samples for r in early) / TASKS:.2f} samples")
    for rule, confidence in (("certain", 0.95), ("beta", 0.9), ("dirichlet", 0.95)):  # of the same samples
        used, right = 0, 0.0
        for task, result in zip(figures.tasks, majority, strict=True):
            candidates = list(result.verdict.candidates)
            n = next(n for n in range(1, SAMPLES + 1)
                     if n == SAMPLES or stops(tally(candidates[:n]), SAMPLES - n, rule, confidence))  # fmt: skip
            used += sum(c.count for c in candidates[:n])
            answer = winner(tally(candidates[:n]))
            right += next((score(task, c.text) for c in candidates if answer is not None and c.answer == answer), 0.0)
        print(f"{rule} {confidence}: {right / TASKS:.4f} for {used / TASKS / tokens(majority):.3f}")
    assert figures.right(early) >= figures.right(majority) and share <= 0.6


@pytest.mark.slow
def test_markovian_rsa_at_equal_tokens(figures: Figures, majority: list[SearchResult]) -> None:
    """The shipped policy was never trained to aggregate; the figures are said, not judged."""
    for prompt in ("{candidates}\n{question}", "{question}{candidates}\n{question}"):
        rsa = figures.run("markovian_rsa", samples=5, aggregate=3, rounds=2, tail=48, aggregation=prompt)
        k = max(1, min(SAMPLES, round(SAMPLES * tokens(rsa) / tokens(majority))))
        vote = 0.0
        for i, result in enumerate(majority):
            candidates = list(result.verdict.candidates)
            marks = figures.right_samples(i, candidates)
            right = {c.answer for c, mark in zip(candidates, marks, strict=True) if mark}
            votes = {answer: int(count) for answer, count in tally(candidates).items()}
            vote += majority_at_k(votes, right, SAMPLES, k) / TASKS
        print(f"\nRSA (5, 3, 2), tail 48, {prompt!r}: {figures.right(rsa):.4f} for {tokens(rsa):.0f} tokens;"
              f" majority@{k} {vote:.4f} for {k * tokens(majority) / SAMPLES:.0f}")
        assert all(result.spent.samples == 15 for result in rsa)
