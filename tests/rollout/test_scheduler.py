"""The scheduler: the order of admission, and what a step costs while many samples wait."""

from __future__ import annotations

import sys

import pytest
import torch

from blockroll.rollout.cache import PagedCache
from blockroll.rollout.scheduler import Scheduler
from blockroll.rollout.sequence import Sample
from blockroll.rollout.types import RolloutRequest, SamplingParams

PROMPT = tuple(range(9))


@pytest.fixture(scope="module")
def policy(make_policy):
    return make_policy(torch.float32, num_hidden_layers=1, layer_types=["hybrid"])


def scheduler(policy, pages=64, max_batch=4, prefill_rows=64):
    return Scheduler(PagedCache(policy, pages, 4, 2 * max_batch, 5), max_batch, prefill_rows)


def add(scheduler, requests, samples, max_tokens=6, prompt=PROMPT):
    """As many requests, each of as many samples."""
    for arrival in range(requests):
        request = RolloutRequest(f"r{arrival}", prompt, SamplingParams(max_tokens=max_tokens), samples=samples)
        for number in range(samples):
            scheduler.add(Sample(request, number, len(prompt) + max_tokens, list(prompt), frozenset(), arrival))


def step(scheduler, tokens=1):
    """One step: cached positions grow, decoding samples commit `tokens`, finished ones retire. Names of the samples."""
    output = scheduler.next(5)
    for sample, chunk, _ in output.scheduled:
        sample.block_table.length += chunk
        if chunk and sample.prefilled:
            scheduler.prefilled(sample)
    for sample in output.decoding:
        sample.tokens += [0] * min(tokens, sample.remaining)
        sample.block_table.length = sample.anchor
    for sample in output.decoding:
        if not sample.remaining:
            scheduler.retire(sample)
    return [(sample.request.id, sample.number) for sample, _, _ in output.scheduled]


def operations(call):
    """Calls that `call` makes, of Python functions and generators and of C functions."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    ("requests", "samples", "prefill_rows"),
    [pytest.param(lambda n: n, lambda n: 1, 64, id="many requests"), pytest.param(lambda n: 1, lambda n: n, 64, id="one group"),
     pytest.param(lambda n: 1, lambda n: n, 1, id="one group that prefills in chunks")],
)  # fmt: skip
def test_a_step_costs_the_same_however_many_samples_wait(policy, requests, samples, prefill_rows):
    costs = []
    for waiting in (40, 4000):
        each = scheduler(policy, prefill_rows=prefill_rows)
        add(each, requests(waiting), samples(waiting))
        costs.append(operations(lambda each=each: [step(each, 3) for _ in range(8)]))
        assert len(each.waiting) > waiting - 30
    assert costs[1] < 1.1 * costs[0], costs


def test_a_group_waits_for_its_prompt_and_later_requests_do_not(policy):
    each = scheduler(policy, prefill_rows=5)
    add(each, 2, 3)
    assert step(each) == [("r0", 0)]  # 5 of 8 prompt rows; samples 1 and 2 wait for the prompt, the other group's rows do not fit
    assert [sample.number for sample in each.running] == [0, 0]
    assert step(each) == [("r0", 0), ("r1", 0)]  # the last 3 rows, and 2 of the other group
    assert step(each) == [("r0", 0), ("r0", 1), ("r0", 2), ("r1", 0)]  # the samples share the prompt
    assert [sample.number for sample in each.waiting] == [1, 2]


def test_preempted_samples_come_back_before_those_that_never_ran(policy):
    each = scheduler(policy, pages=8, max_batch=3)
    add(each, 4, 1, max_tokens=10)
    order = []
    while each.pending:
        order.append(step(each))
    first = [next(i for i, names in enumerate(order) if (name, 0) in names) for name in ("r0", "r1", "r2", "r3")]
    last = [max(i for i, names in enumerate(order) if (name, 0) in names) for name in ("r0", "r1", "r2", "r3")]
    assert each.preemptions and first == sorted(first) and last == sorted(last)
    assert each.cache.free_pages == 8 and each.cache.free_slots == 6


def test_waiting_samples_are_told_by_age_and_leave_nothing(policy):
    each = scheduler(policy, pages=8, max_batch=3)
    add(each, 3, 2, max_tokens=10)
    for _ in range(12):
        step(each)
    assert each.preemptions
    ages = [(sample.arrival, sample.number) for sample in each.waiting]
    assert ages == sorted(ages) and each.pending == len(each.running) + len(ages)
    given_up = each.clear()
    assert [(s.arrival, s.number) for s in given_up] == sorted((s.arrival, s.number) for s in given_up)
    assert not each.pending and not each.serves("r2") and each.cache.free_pages == 8
