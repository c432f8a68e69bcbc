"""Budget forcing: one sample whose steps are cut, or prolonged, to a budget of tokens or seconds.

    think: sample steps until the text `force`, which begins the answer. Where they do not come to it within their budget,
           `force` is appended. Where they come to it early, `extend` is put in its place, `extensions` times, and the steps go
           on.
    then:  sample the answer, at most answer_tokens.

Source: s1, Muennighoff et al. 2025, arXiv 2501.19393, section 3.1: the end-of-thinking delimiter is appended to stop, and
suppressed with "Wait" appended to go on.

The steps have budget_tokens - answer_tokens tokens (max_tokens without a budget). With budget_seconds they are sampled in
chunks of CHUNK tokens, and a chunk is begun only while twice the time of the slowest one so far is left: the second time is
the answer's.
"""

from __future__ import annotations

from dataclasses import replace

from ...errors import RequestError
from ..params import SamplingParams
from .candidates import Candidate, Verdict
from .config import SearchConfig
from .context import Method, Search

CHUNK = 32
"""Tokens between two looks at the clock."""
_EMPTY = Candidate((), 0.0, 0, False, "", None)


def most_steps(config: SearchConfig, params: SamplingParams) -> int:
    """Tokens of the steps. Raises RequestError where the answer takes them all."""
    limit = params.max_tokens if config.budget_tokens is None else min(config.budget_tokens, params.max_tokens)
    if limit <= config.answer_tokens:
        raise RequestError("answer_tokens", f"{config.answer_tokens} of {limit} tokens leave none for the steps", "lower it")
    return limit - config.answer_tokens


def budget_forcing(search: Search) -> Method:
    """One candidate: the steps, and the answer after `force`."""
    config, spending = search.config, search.spending
    steps_limit = most_steps(config, search.params)
    prompt, mark = search.question.prompt_tokens, search.encode(config.force)
    thought, extensions, slowest, used = _EMPTY, config.extensions, 0.0, 0
    while used < steps_limit:
        left = spending.seconds_left
        if left is not None and left <= 2 * slowest:
            break
        began = spending.elapsed
        chunk = steps_limit - used if left is None else min(CHUNK, steps_limit - used)
        found = yield from search.sample([(*prompt, *thought.tokens)], chunk, stop=(config.force,))
        if not found:
            return Verdict(thought if thought.count else None, [thought], reason=search.reason())
        slowest, used = max(slowest, spending.elapsed - began), used + len(found[0].tokens)
        piece = search.candidate(found[0], thought)
        if found[0].finish_reason != "stop":
            thought = piece
            continue
        if found[0].stop_reason != config.force:  # it ended without an answer
            return Verdict(piece, [piece], reason=search.reason())
        steps = piece.text[: piece.text.rfind(config.force)]
        thought = replace(piece, tokens=search.encode(steps), text=steps)
        if not extensions:
            break
        extensions -= 1
        thought = replace(thought, tokens=(*thought.tokens, *search.encode(config.extend)), text=steps + config.extend)
    forced = replace(thought, tokens=(*thought.tokens, *mark), finished=False, answer=None)
    found = yield from search.sample([(*prompt, *forced.tokens)], config.answer_tokens)
    if not found:
        return Verdict(forced, [forced], reason=search.reason())
    whole = search.candidate(found[0], forced)
    return Verdict(whole, [whole], reason="forced" if used >= steps_limit else search.reason())
