"""How each token of a sample was made, from its decode trace.

Invariant: a token's origin follows from the steps alone. A token that no step made is the environment's (a tool's answer, the
user's next turn) where the line has a trace, and unknown where it has none.

Legend: N generated tokens, S decode steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ORIGINS = ("unknown", "accepted", "resampled", "bonus", "sampled", "environment")
UNKNOWN, ACCEPTED, RESAMPLED, BONUS, SAMPLED, ENVIRONMENT = range(len(ORIGINS))
"""accepted: a draft that verification accepted. resampled: drawn in place of a rejected draft. bonus: drawn after all
drafts of a step were accepted. sampled: drawn by a step that verified no draft."""
NO_LEVEL = -1
"""Level of a step without drafts, or with drafts of its own first pass (`two_pass`)."""


class Steps(NamedTuple):
    """The steps of one sample, as int16[S] each; drafts are counted as far as the sample goes.

    Attributes:
        start: first token of the step, counted from the first generated one.
        drafted, accepted: drafts verified, and accepted.
        slot: slot of the first draft in its mask block, from 0.
        level: level of the proposal that the drafts came from.
        length: mask rows of that block.
        forwards: forward passes.
    """

    start: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    slot: np.ndarray
    level: np.ndarray
    length: np.ndarray
    forwards: np.ndarray


def steps_of(trace: Sequence[Sequence[int]], prompt: int, tokens: int) -> Steps:
    """The steps of a trace.

    Args:
        trace: rows as `StepTrace`.
        prompt, tokens: how many tokens the prompt and the sample have.
    """
    rows, before = [], None
    for anchor, drafted, accepted, start, length, forwards in trace:
        committed = prompt + tokens - 1 - anchor  # tokens from the step's first one to the end of the sample
        if committed <= accepted:  # the sample ended inside the accepted drafts
            drafted = accepted = committed
        slot = anchor + 1 - start if drafted else 0
        # A proposal of level l begins l + 1 behind the anchor of the step that made it.
        level = start - before - 1 if drafted and slot and before is not None else NO_LEVEL
        rows.append((anchor + 1 - prompt, drafted, accepted, slot, max(level, NO_LEVEL), length if drafted else 0, forwards))
        before = anchor
    return Steps(*np.array(rows, dtype=np.int32).reshape(-1, len(Steps._fields)).T)


def origins_of(steps: Steps | None, tokens: int, environment: Sequence[int] | None = None) -> np.ndarray:
    """uint8[N], an index into ORIGINS per token.

    Args:
        environment: 0 at the tokens of the environment (TRL's `env_mask`); None where the line does not say.
    """
    origin_N = np.full(tokens, UNKNOWN if steps is None else ENVIRONMENT, dtype=np.uint8)
    if steps is not None:
        for start, drafted, accepted, *_ in np.stack(steps).T.tolist():
            origin_N[start : start + accepted] = ACCEPTED
            if start + accepted < tokens:
                last = SAMPLED if not drafted else BONUS if accepted == drafted else RESAMPLED
                origin_N[start + accepted : start + accepted + 1] = last
    if environment is not None:
        origin_N[np.asarray(environment) == 0] = ENVIRONMENT
    return origin_N
