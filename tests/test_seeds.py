"""Every sample draws from a stream of its own, and from the same one in every process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from blockroll.errors import RequestError
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.seeds import MAX_SEED, derived_seed, sample_seed


def test_streams_of_requests_without_a_seed_are_distinct():
    """5,000 requests with 4 samples each: ids of the kinds that people use."""
    ids = [f"{kind}{i}" for kind, i in itertools.product(("", "task-", "0/", "1/", "epoch 3 prompt "), range(1000))]
    seeds = [RolloutRequest(name, (1,)).seed for name in ids]
    assert len(set(seeds)) == len(ids)
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert len({sample_seed(seed, sample) for seed, sample in itertools.product(seeds, range(4))}) == 4 * len(ids)


def test_streams_of_neighbouring_seeds_are_distinct():
    """A run with seed s + 1 meets no stream of the run with seed s."""
    pairs = itertools.product(range(20), range(200))
    seeds = [derived_seed(seed, str(number)) for seed, number in pairs]
    assert len({sample_seed(seed, sample) for seed, sample in itertools.product(seeds, range(4))}) == 4 * len(seeds)
    assert len({sample_seed(seed, sample) for seed, sample in itertools.product(range(1000), range(20))}) == 20_000


def test_a_seed_is_the_same_in_every_process():
    code = "from blockroll.rollout.types import RolloutRequest as R; print([R(f'r{i}', (1,)).seed for i in range(9)])"
    printed = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       env={**os.environ, "PYTHONHASHSEED": hashed}).stdout.strip()
        for hashed in ("1", "2")
    }  # fmt: skip
    assert printed == {str([RolloutRequest(f"r{i}", (1,)).seed for i in range(9)])}
    assert RolloutRequest("r0", (1,)).seed == derived_seed(0, "r0") == 5000211279079848255


def test_requests_with_one_prompt_and_no_seed_differ(make_policy):
    params = SamplingParams("coupled", max_tokens=20, ignore_eos=True)
    requests = [RolloutRequest(name, (5, 6, 7), params, samples=2) for name in ("a", "b", "c")]
    samples = Engine(make_policy(sharpness=0.6)).rollout(requests)
    assert len({tuple(sample.tokens) for sample in samples}) == 6


def test_what_is_a_seed():
    assert RolloutRequest("a", (1,), seed=0).seed == 0
    seed = RolloutRequest("a", (1,), seed=np.int64(3)).seed
    assert (seed, type(seed)) == (3, int)
    for wrong in (-1, 2**63, 1.5, "3"):
        with pytest.raises(RequestError, match=r"seed: .* is no whole number in 0\.\.2\*\*63-1"):
            RolloutRequest("a", (1,), seed=wrong)
