"""The two passes of a `two_pass` step, laid out as one and apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from blockroll.model.backends.packed.backend import PackedBackend
from blockroll.model.layout import DecodeRows, decode
from blockroll.rollout.cache import PagedCache
from blockroll.rollout.engine import Engine
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.steps.model_runner import ModelRunner
from blockroll.rollout.types import RolloutRequest, SamplingParams

SAMPLERS = "lossless", "ar", "coupled", "mixed", "lossless"


def test_a_plan_of_two_passes_is_their_own_two(make_policy) -> None:
    """Sequences with a prompt, with mask blocks and without; the second pass has fewer sequences and rows of its own."""
    policy = make_policy(torch.float32, seed=4, layer_types=["hybrid", "hybrid_sliding"], num_hidden_layers=2, sliding_window=4)
    cache, backend = PagedCache(policy, 60, 4, 3, 12), PackedBackend(policy)
    held = [cache.open() for _ in range(3)]
    assert all(cache.reserve(table, 30) for table in held)
    first = [DecodeRows([5, 6, 7, 8], 0, (4,), 3), DecodeRows([9], 11, (1,), 3), DecodeRows([3, 4], 7, (), 0)]
    second = [DecodeRows([0, 0, 0], 4, (), 0), DecodeRows([0, 0], 12, (), 0)]
    layout = decode(first + second, policy.mask_token_id)
    both = backend.split(backend.prepare(layout, cache.view(held + held[:2], layout))[1], len(first))
    for rows, tables, found in zip((first, second), (held, held[:2]), both, strict=True):
        alone = decode(rows, policy.mask_token_id)
        expected = backend.prepare(alone, cache.view(tables, alone))[1]
        for name, own, other in zip(expected._fields, expected, found, strict=True):
            if name == "place_SL":
                own, other = ([line[:n] for line, n in zip(lines, expected.start_S)] for lines in (own, other))
                assert all(map(np.array_equal, own, other))
            else:
                assert other >= own if name == "longest" else np.array_equal(own, other), name


@pytest.mark.parametrize("records", [False, True])
def test_samples_are_the_same(make_policy, monkeypatch: pytest.MonkeyPatch, records: bool) -> None:
    """Samplers that draft and one that does not, samples that come and go, and the last steps, in which drafts are few."""
    policy, seconds, run = make_policy(torch.float32, seed=4), [], ModelRunner.run_second
    monkeypatch.setattr(ModelRunner, "run_second", lambda *arguments: (seconds.append(1), run(*arguments))[1])
    asked = [
        RolloutRequest(f"{n}", (5,) * (1 + 3 * n), SamplingParams(
            SAMPLERS[n], max_tokens=4 + 5 * n, ignore_eos=True, routed_experts=records and n != 2), n, 2)
        for n in range(5)
    ]  # fmt: skip
    made = []
    for splits in (True, False):
        monkeypatch.setattr(PackedBackend, "splits", splits)
        seconds.clear()
        made.append(Engine(policy, schedule=Schedule("two_pass", 6), max_batch=4, prefill_rows=5).rollout(asked))
        assert bool(seconds) == splits
    for one, other in zip(*made, strict=True):
        assert one.tokens == other.tokens and one.trace == other.trace
        assert np.array_equal(one.logprobs, other.logprobs) and np.array_equal(one.behavior_logprobs, other.behavior_logprobs)
        assert (one.routed_experts is None) == (not records or one.request_id == "2")
        assert one.routed_experts is None or np.array_equal(one.routed_experts, other.routed_experts)
