"""What the engine gives for fixed requests, against what was recorded (golden.py)."""

from __future__ import annotations

import numpy as np
import pytest
from golden import FILE, POLICIES, compute

SLOW = {"random-float64": pytest.mark.slow}  # the other random policy takes the same paths


@pytest.mark.parametrize("policy", [pytest.param(name, marks=SLOW.get(name, ())) for name in POLICIES])
def test_tokens_and_logprobs_are_those_recorded(policy: str) -> None:
    """Tokens exactly; log-probabilities to 1e-5: processors differ in how many numbers of a sum they add at once."""
    recorded, cases = np.load(FILE), 0
    for case, arrays in compute(policy):
        assert np.array_equal(arrays["tokens"], recorded[f"{case}/tokens"]), case
        for kind in ("logprobs", "behavior"):
            assert np.abs(arrays[kind] - recorded[f"{case}/{kind}"]).max() < 1e-5, (case, kind)
        cases += 1
    assert cases == sum(name.startswith(f"{policy}/") for name in recorded.files) / 3
