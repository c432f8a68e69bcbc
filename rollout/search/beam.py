"""Beam search over steps, led by a verifier of unfinished texts.

With N = samples, M = width, and steps that end with `step_end`:

    1. sample N first steps; score each text so far;
    2. keep the best N / M (at least one); a finished text keeps its place while its score does;
    3. sample M next steps of each kept text that is not finished; go to 2, until all that is kept is finished.

Source: Snell et al. 2024, arXiv 2408.03314, section 5.1. The score is the scorer's: f(prompt, text so far), or the policy's own
log-probability of the text so far. Steps that begin alike share K/V through the prefix cache.
"""

from __future__ import annotations

from .candidates import Candidate, Verdict
from .context import Method, Search


def beam(search: Search) -> Method:
    """The best finished text, or the best one where the budget ended before any was."""
    config, prompt = search.config, search.question.prompt_tokens
    assert config.samples is not None
    keep = max(1, config.samples // config.width)
    kept: list[tuple[Candidate, bool]] = []  # candidates, and whether they go on
    growing: list[Candidate | None] = [None] * config.samples
    while growing:
        room = [search.params.max_tokens - (0 if each is None else each.count) for each in growing]
        found = yield from search.sample(
            [(*prompt, *(() if each is None else each.tokens)) for each in growing], room,
            stop=(*search.params.stop, config.step_end), include_stop_str_in_output=True,
        )  # fmt: skip
        pool = [each for each in kept if not each[1]]
        for place in sorted(found):
            trajectory = found[place]
            candidate = search.candidate(trajectory, growing[place] or Candidate((), 0.0, 0, False, "", None))
            goes_on = trajectory.finish_reason == "stop" and trajectory.stop_reason == config.step_end
            goes_on = goes_on and candidate.count < search.params.max_tokens
            whole = trajectory.finish_reason == "stop" and trajectory.stop_reason != config.step_end
            pool.append((search.scored(candidate if whole else _unfinished(candidate)), goes_on))
        if len(found) < len(growing):  # the budget is out: what is kept so far competes too
            pool += [each for each in kept if each[1]]
            kept = sorted(pool, key=_rank)
            break
        kept = sorted(pool, key=_rank)[:keep]
        growing = [candidate for candidate, goes_on in kept if goes_on for _ in range(config.width)]
    candidates = [candidate for candidate, _ in kept]
    chosen = max(candidates, key=lambda c: (c.finished, c.score), default=None)
    return Verdict(chosen, candidates, reason=search.reason())


def _rank(entry: tuple[Candidate, bool]) -> float:
    assert entry[0].score is not None
    return -entry[0].score


def _unfinished(candidate: Candidate) -> Candidate:
    return Candidate(candidate.tokens, candidate.logprob, candidate.count, False, candidate.text, None)
