"""What a captured step costs the host, by calls, which no other process on the machine changes."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from blockroll.rollout.bench.gpu import host

MOST_CALLS = 25
"""Calls of functions, Python's own among them, that a step makes for each sample: at some 0.1 us each, those of 64 samples take
less than half of the 0.4 ms that a captured step may cost the host."""


def calls_of_a_step(monkeypatch, batch: int) -> float:
    """Calls per step, of steps that commit several tokens of each sample and now and then reserve a page."""
    count = 0

    def counted(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    def measured(engine, rates, warm, steps, _now):
        engine.runner.verifier.rate_B[:] = rates[0]
        for _ in range(warm):
            engine.step()
        sys.setprofile(counted)
        for _ in range(steps):
            engine.step()
        sys.setprofile(None)
        return dict.fromkeys(("seconds", "fastest", "repeats", "tokens_per_step"), 0.0)

    monkeypatch.setattr(host, "measure", measured)
    host.host_seconds(batch, True, context=64, steps=8, layers=1)
    return count / 8


def test_calls_per_sample_of_a_captured_step(monkeypatch):
    torch.set_num_threads(1)
    few, many = map(partial(calls_of_a_step, monkeypatch), (16, 48))
    assert (many - few) / 32 <= MOST_CALLS
