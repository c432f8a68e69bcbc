"""How far drafts survive, learnt while decoding, and what a schedule makes of it.

A draft stands in a slot of its mask block: slot j predicts the token j places after the last one the block knew. Two rates
per slot decide everything: `first`, that the first draft of a step is accepted (the token before it was sampled after the
block was drafted), and `later`, that a draft is accepted after the one before it was. A block that begins at the anchor
(`two_pass`, slot 0) has seen every committed token; one that began before the last sampled token (`fused`, slot 1 and up) has
not, and all its slots draft the worse for it: the two are counted apart. From the rates, for a schedule that goes on and on:

    two_pass(m)          1 + sum_k prod_{j < k} rate(j)          k = 1 .. m, from slot 0
    fused(m, levels)     the same from the slot where the drafts begin, averaged over the stationary distribution of that
                         slot: `a` accepted drafts lead to slot a - level + 1 of the highest level that is not above a

Invariants:
- Only how many drafts were verified and accepted is counted; never a token, never a draft that was not verified.
- Few observations lean on all of their kind, those on all there are, and those on the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..schedule import Schedule

_WEIGHT = 6.0  # observations a slot's rate borrows from the rate of its kind, and that one from the prior
_MEMORY = 1024  # tries after which older ones count half: the samples that run change, and a policy in training moves


class Survival:
    """Acceptance rates by slot.

    Args:
        slots: slots of the largest block.
        prior: acceptance rate before anything is seen.
    """

    def __init__(self, slots: int, prior: float) -> None:
        self._prior = prior
        # [block begins at the anchor or before, first or later, tries or hits, slot]
        self._seen = np.zeros((2, 2, 2, slots + 1))
        self._expected: dict[Schedule, float] = {}
        self._fresh = [0, 0]

    def note(self, slot: int, drafted: int, accepted: int) -> None:
        """One sample's step: of `drafted` drafts, the first one in `slot`, `accepted` were accepted."""
        if not drafted:
            return
        seen = self._seen[int(slot > 0)]
        first, later = seen
        first[0, slot] += 1
        first[1, slot] += accepted > 0
        if accepted:
            later[0, slot + 1 : slot + min(accepted + 1, drafted)] += 1
            later[1, slot + 1 : slot + accepted] += 1
        self._fresh[int(slot > 0)] += min(accepted + 1, drafted)
        # What is known changes slowly once much is known.
        tries = seen[:, 0].sum()
        if self._fresh[int(slot > 0)] > 4 + tries / 4:
            self._expected.clear()
            self._fresh = [0, 0]
            if tries > _MEMORY:
                seen *= 0.5

    def fade(self) -> None:
        """What was seen counts a little less from here on."""
        self._seen *= 0.95

    def rates(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """first_B, later_B: acceptance by slot, of a block whose drafts begin in `slot`."""
        out = []
        for everything, seen in zip(self._seen.sum(0), self._seen[int(slot > 0)], strict=True):
            rate: np.ndarray = np.array(self._prior)
            for tries, hits in (everything.sum(-1), seen.sum(-1), seen):
                rate = (hits + _WEIGHT * rate) / (tries + _WEIGHT)
            out.append(rate)
        return out[0], out[1]

    def tokens(self, schedule: Schedule) -> float:
        """Expected tokens per step of one sample, in the long run; `schedule` has its sizes (`Schedule.within`)."""
        known = self._expected.get(schedule)
        if known is None:
            known = self._expected[schedule] = self._tokens(schedule)
        return known

    def _tokens(self, schedule: Schedule) -> float:
        if schedule.kind == "ar":
            return 1.0
        assert schedule.drafts is not None and schedule.block is not None
        if schedule.kind == "two_pass":
            return 1.0 + float(_alive(self.rates(0), 0, schedule.drafts).sum())
        rates = self.rates(1)
        move, gain = chain(schedule, lambda slot, drafted: _alive(rates, slot, drafted))
        # Every slot leads to slot 1 with some probability, so a high power has the stationary distribution in each row.
        return float(np.linalg.matrix_power(move, 64)[schedule.block] @ gain)


def chain(schedule: Schedule, alive: Callable[[int, int], Sequence[float] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`fused` from step to step, by the slot its drafts begin in; slot `block` stands for no drafts at all.

    Args:
        schedule: with its sizes.
        alive: (slot, drafted) to the probabilities that the first 1 .. drafted drafts are all accepted, the first in `slot`.
    Returns: move[slot, next slot], the probability of it; gain[slot], the tokens a step commits on average.
    """
    assert schedule.drafts is not None and schedule.block is not None
    block = schedule.block
    move, gain = np.zeros((block + 1, block + 1)), np.ones(block + 1)
    for slot in range(block + 1):
        drafted = max(min(block - slot, schedule.drafts), 0)
        reached = np.concatenate([[1.0], alive(slot, drafted), [0.0]])
        gain[slot] += reached[1:].sum()
        level = 0
        for a in range(drafted + 1):
            if a in schedule.levels:
                level = a
            move[slot, min(a - level + 1, block)] += reached[a] - reached[a + 1]
    return move, gain


def _alive(rates: tuple[np.ndarray, np.ndarray], slot: int, drafted: int) -> np.ndarray:
    """Probability that the first 1 .. drafted drafts are all accepted, the first of them in `slot`."""
    first, later = rates
    rate = later[slot : slot + drafted].copy()
    if drafted:
        rate[0] = first[slot]
    return rate.cumprod()
