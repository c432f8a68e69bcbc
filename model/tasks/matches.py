"""A reward by comparison with a field of the row. Runs in the process of reward functions."""

from __future__ import annotations


def exact(completion: str, finish_reason: str, gold: str, after: str | None) -> float:
    """1.0 where the answer is the text of the field."""
    found = answer(completion, finish_reason, after)
    return float(found is not None and found == gold.strip())


def answer(completion: str, finish_reason: str, after: str | None) -> str | None:
    """What is compared: all of it, or what follows the last `after`; None where that is missing, or the sample was cut off."""
    if finish_reason != "stop":
        return None
    if after is not None:
        _, mark, completion = completion.rpartition(after)
        if not mark:
            return None
    return completion.strip()
