"""Markovian RSA: candidates are aggregated in rounds, and only the end of each candidate is carried on.

With N = samples, C = aggregate, T = rounds, beta = max_tokens, tau = tail:

    round 0:      N samples of the question, at most beta tokens each
    round t >= 1: N times: C tails, drawn uniformly without replacement from the last tau tokens of round t - 1's samples,
                  stand with the question in an aggregation prompt; one sample of it, at most beta tokens
    answer:       majority vote over the samples of round T

Source: ZAYA1-8B Technical Report, arXiv 2605.05365, section VI-A: (N, C, T) = (16, 4, 2), tau <= beta / 2, and an aggregation
prompt that asks the model "to consider the candidates and produce the best solution". The report extracts the answer "from the
final round's outputs"; the vote among them is RSA's (Venkatraman et al. 2025, arXiv 2509.26626). T = 0 is a majority vote, tau
= beta is RSA, C = 1 is Delethink's bounded continuation.

A prompt has at most |q| + C tau + O(1) tokens: tails are put in as tokens, never written again. K/V of the question is shared
by the samples of round 0, and K/V of what prompts of a round have in common, through the prefix cache; so put {question} first
for long questions. The report says that a policy profits that was trained to aggregate; other policies may lose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...seeds import named_generator
from ..types import Trajectory
from .candidates import Candidate
from .context import Method, Search
from .votes import tally, verdict

_BETWEEN = "\n\n"
_PLACES = re.compile(r"(\{question\}|\{candidates\})")


def markovian_rsa(search: Search) -> Method:
    """Rounds go on while the budget lasts; the vote is over the last round that has a sample with an answer."""
    config, question = search.config, search.question
    assert config.samples is not None
    prompts: list[tuple[int, ...]] = [question.prompt_tokens] * config.samples
    candidates: list[Candidate] = []
    for number in range(config.rounds + 1):
        found = yield from search.sample(prompts)
        made = [search.candidate(found[place]) for place in sorted(found)]
        if any(candidate.answer is not None for candidate in made) or not candidates:
            candidates = made
        if len(found) < len(prompts):
            break
        tails = [tail_of(search, found[place]) for place in sorted(found)]
        draw = named_generator(config.seed, f"{question.id}/round/{number}")
        prompts = [aggregation_prompt(search, draw.sample(tails, config.aggregate)) for _ in range(config.samples)]
    return verdict(search, candidates, tally(candidates), search.reason())


def tail_of(search: Search, trajectory: Trajectory) -> tuple[int, ...]:
    """The last tau tokens of a sample, without the special tokens that end it."""
    tokens, special = list(trajectory.tokens), set(search.tokenizer.all_special_ids)
    while tokens and tokens[-1] in special:
        tokens.pop()
    most = search.config.tail if search.config.tail is not None else max(search.params.max_tokens // 2, 1)
    return tuple(tokens[-most:])


def aggregation_prompt(search: Search, tails: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The tokens of the configuration's `aggregation` with the question and the tails in their places."""
    begin = search.tokenizer.bos_token_id
    question = search.question.prompt_tokens
    question = question[1:] if question[0] == begin else question
    between = search.encode(_BETWEEN)
    tokens: list[int] = [] if begin is None else [begin]
    for part in _PLACES.split(search.config.aggregation):
        if part == "{question}":
            tokens += question
        elif part == "{candidates}":
            for i, tail in enumerate(tails):
                tokens += (*(between if i else ()), *tail)
        else:
            tokens += search.encode(part)
    return tuple(tokens)
