"""Acceptance rates of drafts, learnt while decoding, and the tokens per step that a schedule makes of them.

A draft stands in a slot of its mask block: slot j predicts the token j places after the last token the block knows. Each slot has
two rates: `first`, that the first draft of a step is accepted, and `later`, that a draft is accepted after the draft before it
was. The drafts of `two_pass` begin in slot 0 with p's own token, which every sampler but `mixed` accepts. The drafts of `fused`
begin in slot 1 or later, after a token that was sampled when the block had already been drafted. That token is an unlikely one
where it replaced a rejected draft, and then all later slots are accepted less often. So the two schedules are counted apart. In
the long run a schedule makes, per step:

    two_pass(m)          1 + sum_k prod_{j < k} rate(j)          k = 1 .. m, from slot 0
    fused(m, levels)     the same from the slot where the drafts begin, averaged over the stationary distribution of that
                         slot: after `a` accepted drafts it is slot a - level + 1 of the highest level not above a

Invariants:
- Only the numbers of verified and accepted drafts are counted; never a token, never a draft that was not verified.
- A slot's rate with few observations is drawn towards the rate of its kind (`two_pass` or `fused`), that rate towards the
  `later` rate of the other kind (in whole percent, with odds changed by the factor `_EASE`), and that one towards the prior.
- Outcomes are noted step by step and counted when a kind has many new ones: the estimates change then, and at no other time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from itertools import chain as joined
from operator import mul
from typing import Any

import numpy as np

from ..schedule import Schedule

_WEIGHT = 6.0  # observations a slot's rate borrows from the rate of its kind, and both kinds' from the prior
_KIN = 16.0  # observations a kind's rate borrows from the other kind's: texts differ more from each other than kinds do
_EASE = 1.5  # odds of a later draft's acceptance in `two_pass` over those in `fused`, as tiny-reasoner has it
_MEMORY = 4096  # tries after which older ones count half: the samples that run change, and a policy in training moves
_FRESH = 4.0  # tokens after which the first estimate is made; later ones when there are half as many more as tries

Means = list[tuple[float, float]]
"""`Survival.tokens` and `Survival.past` by schedule."""
_Step = tuple[list[int] | None, list[int], list[int]]
"""Arguments of `Survival.note_all`."""


class Survival:
    """Acceptance rates by slot.

    Args:
        slots: slots of the largest block.
        prior: acceptance rate before anything is seen.
    """

    def __init__(self, slots: int, prior: float) -> None:
        self._prior = prior
        # [two_pass or fused][first tries, first hits, later tries or later hits][slot]; lists: single numbers of them change
        self._seen = [[[0.0] * (slots + 1) for _ in range(4)] for _ in range(2)]
        self._known: tuple[Sequence[Schedule], Means] | None = None
        self._chains: tuple[Any, Means] | None = None  # of `fused`: what its means depend on, and these
        self._changes = 0  # how often the counts of `fused` have changed
        # By kind, what was noted since it was counted, in lists of one step: slots (None: all 0), drafted, accepted.
        self._noted: tuple[list[_Step], list[_Step]] = ([], [])
        self._fresh, self._most_fresh = [0, 0], [_FRESH, _FRESH]  # tokens since the last count: how many, and at most

    def note(self, slot: int, drafted: int, accepted: int) -> bool:
        """`note_all` of one sample."""
        return self.note_all([slot] if slot else None, [drafted], [accepted])

    def note_all(self, slot_S: list[int] | None, drafted_S: list[int], accepted_S: list[int]) -> bool:
        """Note what a step made of the drafts of S samples. The lists are kept and must not change.

        Args:
            slot_S: of the first draft; None where that is slot 0, as in `two_pass`.
            drafted_S: drafts that were verified; 0 where the sample says nothing. accepted_S: how many of these were accepted.
        Returns: whether the estimates change by this.
        """
        kind = 0 if slot_S is None else 1
        self._noted[kind].append((slot_S, drafted_S, accepted_S))
        self._fresh[kind] += sum(accepted_S) + len(accepted_S)
        if self._fresh[kind] <= self._most_fresh[kind]:
            return False
        self._count(kind)
        seen = self._seen[kind]
        if sum(seen[0]) + sum(seen[2]) > _MEMORY:
            seen = self._seen[kind] = [[0.5 * count for count in line] for line in seen]
        # What is known changes slowly once much is known.
        self._fresh[kind], self._most_fresh[kind] = 0, _FRESH + (sum(seen[0]) + sum(seen[2])) / 2
        self._known = None
        return True

    @property
    def lacks(self) -> float:
        """Tokens of `two_pass` that may be noted before its estimates change."""
        return self._most_fresh[0] - self._fresh[0]

    @property
    def tried(self) -> bool:
        """Whether anything was noted."""
        return any(self._fresh) or self._most_fresh != [_FRESH, _FRESH]

    def _count(self, kind: int) -> None:
        """Count the outcomes of a kind that were noted."""
        noted = self._noted[kind]
        first_tries, first_hits, later_tries, later_hits = self._seen[kind]
        for (slot, drafted, accepted), times in _outcomes(noted).items():
            if not drafted:
                continue
            first_tries[slot] += times
            if accepted:
                first_hits[slot] += times
                for i in range(slot + 1, slot + accepted):
                    later_tries[i] += times
                    later_hits[i] += times
                if accepted < drafted:
                    later_tries[slot + accepted] += times
        noted.clear()
        self._changes += kind

    def fade(self) -> None:
        """Reduce the weight of all observations so far by 5 %."""
        for kind in (0, 1):
            self._count(kind)
        self._seen = [[[0.95 * count for count in line] for line in lines] for lines in self._seen]
        self._changes += 1

    def rates(self, slot: int) -> tuple[list[float], list[float]]:
        """first_B, later_B: acceptance by slot, of a block whose drafts begin in `slot`."""
        first_tries, first_hits, later_tries, later_hits = self._seen[slot > 0]
        first_hint, later_hint, borrowed = self._hint(slot > 0)
        first_hint = _leaning(sum(first_tries), sum(first_hits), first_hint, borrowed)
        later_hint = _leaning(sum(later_tries), sum(later_hits), later_hint, borrowed)
        first = [_leaning(tries, hits, first_hint, _WEIGHT) for tries, hits in zip(first_tries, first_hits, strict=True)]
        return first, [_leaning(tries, hits, later_hint, _WEIGHT) for tries, hits in zip(later_tries, later_hits, strict=True)]

    def _hint(self, fused: bool) -> tuple[float, float, float]:
        """The `first` and `later` rates that a kind begins with, and as how many observations they count."""
        tries, hits = (sum(line) for line in self._seen[not fused][2:])
        if not tries:
            return (self._prior if fused else 1.0), self._prior, _WEIGHT
        rate, odds = round(_leaning(tries, hits, self._prior, _WEIGHT), 2), 1 / _EASE if fused else _EASE
        return (rate if fused else 1.0), odds * rate / (1 + (odds - 1) * rate), _KIN

    def tokens(self, schedule: Schedule) -> float:
        """Expected tokens per step of one sample, in the long run; `schedule` has its sizes (`Schedule.within`)."""
        return self._of((schedule,))[0][0]

    def past(self, schedule: Schedule) -> float:
        """Tokens that the step which reaches some given length makes beyond it, on average: (E[n^2] / E[n] - 1) / 2 of the
        tokens n of a step (the inspection paradox: that step is more likely a long one)."""
        return self._of((schedule,))[0][1]

    def means(self, schedules: Sequence[Schedule]) -> Means:
        """`tokens` and `past` of each schedule; quick where they are asked for again for the same object `schedules`."""
        if self._known is None or self._known[0] is not schedules:
            self._known = schedules, self._of(schedules)
        return self._known[1]

    def _of(self, schedules: Sequence[Schedule]) -> Means:
        chains = iter(self._chained([schedule for schedule in schedules if schedule.kind == "fused"]))
        (first, *_), (_, *later) = self.rates(0)
        alive_M = list(accumulate([first, *later], mul))
        tokens_M = list(accumulate(alive_M, initial=1.0))
        squares_M = list(accumulate([(2 * m + 3) * alive for m, alive in enumerate(alive_M)], initial=1.0))
        found = []
        for schedule in schedules:
            tokens, squares = 1.0, 1.0
            if schedule.kind == "two_pass":
                assert schedule.drafts is not None
                tokens, squares = tokens_M[schedule.drafts], squares_M[schedule.drafts]
            elif schedule.kind == "fused":
                tokens, squares = next(chains)
            found.append((tokens, (squares / tokens - 1) / 2))
        return found

    def _chained(self, schedules: list[Schedule]) -> Means:
        """Means of a step's tokens and of their squares, of schedules of `fused`."""
        basis = schedules, self._changes, self._hint(True)
        if schedules and (self._chains is None or self._chains[0] != basis):
            self._chains = basis, _lasting_means(tuple(schedules), _alive(self.rates(1)))
        return self._chains[1] if schedules and self._chains is not None else []


def _outcomes(noted: list[_Step]) -> Counter[tuple[int, int, int]]:
    """How often each slot of a first draft, number of verified and number of accepted drafts were noted together."""
    slots = joined.from_iterable(slot_S or [0] * len(drafted_S) for slot_S, drafted_S, _ in noted)
    drafted = joined.from_iterable(drafted_S for _, drafted_S, _ in noted)
    accepted = joined.from_iterable(accepted_S for *_, accepted_S in noted)
    return Counter(zip(slots, drafted, accepted, strict=True))


def _leaning(tries: float, hits: float, rate: float, borrowed: float) -> float:
    """The rate of hits, drawn towards `rate` as if `borrowed` more tries had had that rate."""
    return (hits + borrowed * rate) / (tries + borrowed)


def chain(schedule: Schedule, alive_SM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`fused` from step to step, by the slot its drafts begin in; slot `block` stands for no drafts at all.

    Args:
        schedule: with its sizes.
        alive_SM: probability that drafts 0 .. m are all accepted, the first in slot s; at least block + 1 by drafts.
    Returns: move[slot, next slot], the probability of it; gain[slot] and square[slot], the means of the tokens a step commits
        and of their squares.
    """
    assert schedule.drafts is not None and schedule.block is not None
    slots = schedule.block + 1
    drafted_S1 = schedule.block - np.arange(slots)[:, None]
    alive_SM = np.where(np.arange(schedule.drafts) < drafted_S1, alive_SM[:slots, : schedule.drafts], 0.0)
    reached = np.concatenate([np.ones((slots, 1)), alive_SM, np.zeros((slots, 1))], axis=1)
    move = (reached[:, :-1] - reached[:, 1:]) @ _targets(schedule)
    return move, *_moments(alive_SM)


def lasting(move: np.ndarray) -> np.ndarray:
    """The share of steps in each slot, in the long run from no drafts at all. A chain that stays where it is every other time
    has the same shares and no period, so a high power of it has them in its last row."""
    return np.linalg.matrix_power((np.eye(len(move)) + move) / 2, 128)[-1]


def _lasting_means(schedules: tuple[Schedule, ...], alive_SM: np.ndarray) -> list[tuple[float, float]]:
    """Means of a step's tokens and of their squares in the long run of `fused`: as `chain` and `lasting`, of schedules side by
    side, with slots and drafts that a smaller one lacks never reached."""
    drawn_NSM, target_NMS, last_N, weights_M2 = _padded(schedules)
    alive_NSM = alive_SM[: drawn_NSM.shape[1], : drawn_NSM.shape[2]] * drawn_NSM
    reached = np.zeros((len(schedules), drawn_NSM.shape[1], drawn_NSM.shape[2] + 2))
    reached[:, :, 0] = 1.0
    reached[:, :, 1:-1] = alive_NSM
    power = (reached[:, :, :-1] - reached[:, :, 1:]) @ target_NMS
    power += np.eye(power.shape[1])
    power *= 0.5
    for _ in range(7):
        power = power @ power
    share_N1S = power[np.arange(len(schedules)), None, last_N]
    means = 1.0 + (share_N1S @ (alive_NSM @ weights_M2))[:, 0]
    found: list[tuple[float, float]] = means.tolist()
    return found


@cache
def _padded(schedules: tuple[Schedule, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Whether a draft is drawn, `_targets`, and the slot of no drafts, by schedule; and the weights of `_moments`."""
    drafts, slots = max(s.drafts or 0 for s in schedules), max(s.block or 0 for s in schedules) + 1
    drawn, target = np.zeros((len(schedules), slots, drafts)), np.zeros((len(schedules), drafts + 1, slots))
    for n, schedule in enumerate(schedules):
        assert schedule.drafts is not None and schedule.block is not None
        left_S1 = schedule.block - np.arange(schedule.block + 1)[:, None]
        drawn[n, : schedule.block + 1, : schedule.drafts] = np.arange(schedule.drafts) < left_S1
        target[n, : schedule.drafts + 1, : schedule.block + 1] = _targets(schedule)
    weights = np.stack([np.ones(drafts), _square_weights(drafts)], axis=1)
    return drawn, target, np.array([schedule.block for schedule in schedules]), weights


@cache
def _targets(schedule: Schedule) -> np.ndarray:
    """[accepted, slot]: 1 at the slot in which the next drafts begin, of the highest level not above the accepted."""
    assert schedule.drafts is not None and schedule.block is not None
    targets = np.zeros((schedule.drafts + 1, schedule.block + 1))
    for accepted in range(schedule.drafts + 1):
        level = max((level for level in schedule.levels if level <= accepted), default=0)
        targets[accepted, min(accepted - level + 1, schedule.block)] = 1.0
    return targets


def _alive(rates: tuple[Sequence[float], Sequence[float]]) -> np.ndarray:
    """alive_SM of `chain`, for all slots of the rates."""
    first, later = np.array(rates)
    slot = np.arange(len(first))
    beyond = slot[:, None] + slot
    rate_SM = np.where(beyond < len(first), later[np.minimum(beyond, len(first) - 1)], 0.0)
    rate_SM[:, 0] = first
    return rate_SM.cumprod(1)


def _moments(alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of a step's tokens and of their squares, from the probabilities [.., M] that drafts 0 .. m are all accepted."""
    return 1.0 + alive.sum(-1), 1.0 + alive @ _square_weights(alive.shape[-1])


@cache
def _square_weights(drafts: int) -> np.ndarray:
    """By how much (n + 1)^2 grows with the n-th draft, n = 1 .. drafts."""
    return 2.0 * np.arange(1, drafts + 1) + 1.0
