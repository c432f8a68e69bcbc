"""Figures that follow from finished samples alone.

Invariants:
- Standard errors are over tasks: the samples of one task do not count as independent.
- Drafts accepted past the token that ended a sample were never part of it: such a step counts as one that verified, and
  accepted, only the drafts it committed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ..types import StepTrace, Trajectory

Kind = Literal["digits", "letters", "punctuation_space", "newline", "eos"]
KINDS: tuple[Kind, ...] = ("digits", "letters", "punctuation_space", "newline", "eos")
_POSITIONS = 32


def ratio(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Sum over sum, one pair per task, and its standard error by linearisation; (0, 0) where the denominators are zero."""
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    whole = below.sum()
    if not whole:
        return 0.0, 0.0
    value = above.sum() / whole
    return float(value), float(np.sqrt(np.square(above - value * below).sum()) / whole)


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of one value per task, and its standard error."""
    return ratio(values, np.ones(len(values)))


def by_task(samples: Iterable[Trajectory], value: Callable[[Trajectory], float]) -> list[float]:
    """The sum of `value` over the samples of each task, tasks in the order of their names."""
    sums: dict[str, float] = defaultdict(float)
    for sample in samples:
        sums[sample.request_id] += value(sample)
    return [sums[task] for task in sorted(sums)]


def acceptance_by_slot(samples: Sequence[Trajectory]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Conditional acceptance and survival of the k-th draft of a step, k from 1. Both end before the first k that no step
    reached."""
    verified: Counter[int] = Counter()
    reached: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for sample in samples:
        for _, most, taken in _steps(sample):
            for k in range(1, most + 1):
                verified[k] += 1
                reached[k] += taken >= k - 1
                accepted[k] += taken >= k
    survival = tuple(accepted[k] / verified[k] for k in range(1, len(verified) + 1))
    acceptance = []
    for k in range(1, len(verified) + 1):
        if not reached[k]:
            break
        acceptance.append(accepted[k] / reached[k])
    return tuple(acceptance), survival


def acceptance_by_kind(samples: Sequence[Trajectory], kind_of: Callable[[int], Kind]) -> dict[Kind, dict[str, float | None]]:
    """For each kind of committed token: its `share` of all tokens, how many places had a draft that was looked at
    (`verified`), and the fraction of them where that draft was accepted (`acceptance`, None where there was none)."""
    tokens: Counter[Kind] = Counter()
    verified: Counter[Kind] = Counter()
    accepted: Counter[Kind] = Counter()
    for sample in samples:
        kinds = [kind_of(token) for token in sample.tokens]
        tokens.update(kinds)
        for step, most, taken in _steps(sample):
            first = step.anchor + 1 - len(sample.prompt_tokens)
            accepted.update(kinds[first : first + taken])
            verified.update(kinds[first : first + min(taken + 1, most)])
    whole = max(tokens.total(), 1)
    return {kind: {"share": tokens[kind] / whole, "verified": verified[kind],
                   "acceptance": accepted[kind] / verified[kind] if verified[kind] else None}
            for kind in KINDS}  # fmt: skip


def kinds_of(tokenizer: Any, eos_token_ids: Sequence[int]) -> Callable[[int], Kind]:
    """The kind of a token, by its text. A token that holds several kinds of characters is the first of newline, digits,
    letters."""
    known: dict[int, Kind] = {token: "eos" for token in eos_token_ids}

    def kind_of(token: int) -> Kind:
        if token not in known:
            text = tokenizer.decode([token])
            known[token] = "newline" if "\n" in text else "digits" if any(c.isdigit() for c in text) else \
                "letters" if any(c.isalpha() for c in text) else "punctuation_space"  # fmt: skip
        return known[token]

    return kind_of


def tokens_per_step_by_position(samples: Sequence[Trajectory]) -> dict[str, float]:
    """Committed tokens per step by first position of a span of 32 generated tokens, last steps left out."""
    committed: dict[int, list[int]] = defaultdict(list)
    for sample in samples:
        for step in sample.trace[:-1]:  # the last one is cut short by the end
            place = (step.anchor + 1 - len(sample.prompt_tokens)) // _POSITIONS * _POSITIONS
            committed[place].append(step.accepted + 1)
    return {str(place): float(np.mean(counts)) for place, counts in sorted(committed.items())}


def _steps(sample: Trajectory) -> Iterator[tuple[StepTrace, int, int]]:
    """(step, drafts it verified, drafts it accepted), both as far as the sample goes."""
    last = len(sample.prompt_tokens) + len(sample.tokens) - 1
    for step in sample.trace:
        committed = last - step.anchor
        ended_inside = committed <= step.accepted
        yield step, committed if ended_inside else step.drafted, committed if ended_inside else step.accepted
