"""What samples keep of their steps."""

from __future__ import annotations

import weakref

import numpy as np

from blockroll.rollout.sample_log import SampleLog, StepRecord


def record(step: int, samples: int) -> StepRecord:
    numbers = np.full((3, samples, 2), step, dtype=np.float32) + np.array([[[0]], [[0.25]], [[0.5]]], dtype=np.float32)
    drafted = [1] * samples
    return StepRecord(drafted, drafted, [step] * samples, [4] * samples, numbers, 7, 1)


def test_a_long_sample_does_not_keep_the_steps_of_its_neighbours():
    """A record holds the numbers of all samples of its step: they must go while the sample that took least of them runs on."""
    log, kept = SampleLog(), []
    for step in range(1000):
        made = record(step, 256)
        kept.append(weakref.ref(made.numbers_3DR))
        log.take(made, 255, 2 * step, 2)
        del made
    assert sum(each() is not None for each in kept) < 200
    log.settle()
    steps = np.repeat(np.arange(1000), 2)
    assert log.numbers_3N.tolist() == [steps.tolist(), (steps + 0.25).tolist(), (steps + 0.5).tolist()]
    assert log.versions == [7] * 2000 and list(log.from_draft) == [True, False] * 1000
    assert [step[:3] for step in log.trace] == [(2 * step, 1, 1) for step in range(1000)]


def test_a_number_that_is_not_finite_is_seen():
    log = SampleLog()
    for step in range(3):
        log.take(record(step, 4), 2, 2 * step, 2)
    assert log.settle().surely_finite
    for wrong in (np.nan, np.inf, -np.inf):
        made = record(3, 4)
        made.numbers_3DR[1, 2, 0] = wrong
        bad = SampleLog()
        bad.take(record(2, 4), 2, 0, 2)
        bad.take(made, 2, 2, 1)
        assert not bad.settle().surely_finite
