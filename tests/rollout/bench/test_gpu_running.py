"""The engine that `blockroll bench gpu` measures: forced acceptance, and where its samples stand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from pretend_device import PretendDevice

from blockroll.kernels.dispatch import using
from blockroll.rollout.bench.gpu.parts import passes
from blockroll.rollout.bench.gpu.running import engine_for, measure
from blockroll.rollout.bench.gpu.sizes import DRY
from blockroll.rollout.bench.gpu.steps import StepBench
from blockroll.rollout.planning.roofline import expected_tokens, geometric_survival
from blockroll.rollout.planning.step_costs import rows
from blockroll.rollout.planning.survival import chain, lasting
from blockroll.rollout.schedule import Schedule

FALLING = (0.95, 0.9, 0.9, 0.8, 0.8, 0.6, 0.6, 0.3)
"""Chances by slot."""


def expected(schedule: Schedule, rate_B: tuple[float, ...]) -> float:
    """Tokens per step in the long run, of chances by slot in blocks of 8."""
    rate = np.array([*rate_B, *[0.0] * 9])
    if schedule.kind != "fused":
        return 1 + rate[: schedule.drafts or 0].cumprod().sum()
    move, gain, _ = chain(schedule, np.stack([rate[slot : slot + 8].cumprod() for slot in range(9)]))
    return float(lasting(move) @ gain)


@pytest.mark.parametrize(
    "schedule", [Schedule("ar"), Schedule("two_pass"), Schedule("fused", levels=(0,)), Schedule("fused", levels=(0, 2))],
    ids=lambda schedule: schedule.label,
)  # fmt: skip
def test_forced_acceptance_commits_what_the_curve_says(make_policy, schedule: Schedule) -> None:
    policy = make_policy(torch.float32, num_hidden_layers=1, layer_types=["hybrid"], max_position_embeddings=2000)
    schedule, steps, batch, geometric = schedule.within(8), 80, 12, geometric_survival(4.6, 8)
    assert expected(schedule, geometric[:1] * 8) == pytest.approx(expected_tokens(schedule, geometric, 8))
    most = {"ar": 1, "two_pass": 9, "fused": 8}[schedule.kind]
    for rate_B, tokens, count in (
        (geometric[:1], expected(schedule, geometric[:1] * 8), steps), (FALLING, expected(schedule, FALLING), steps),
        ((0.0,), 1.0, 5), ((1.0,), {"fused": expected(schedule, (1.0,) * 8)}.get(schedule.kind, most), 10),
    ):  # fmt: skip
        engine = engine_for(policy, schedule, batch, 9, (count + 6) * most + 20, 8)
        row = measure(engine, rate_B, 6, count)
        assert row["tokens_per_step"] == pytest.approx(tokens, rel=0.03 if count == steps else 1e-9), rate_B


def test_a_forced_step_waits_once(make_policy) -> None:
    """Its samples stand where their prompts end, on pages of their own."""
    policy = make_policy(torch.float32, vocab_size=24, head_dim=16, num_hidden_layers=1, layer_types=["hybrid"])
    # All of its drafts accepted, a proposal for level 0 leaves none to the next step.
    cases = (Schedule("two_pass", 3).within(8), 4.0), (Schedule("fused", levels=(0,), block=4).within(8), (4 + 1) / 2)
    for schedule, tokens in cases:
        with PretendDevice() as device, using("reference"):
            engine = engine_for(copy.deepcopy(policy).to("cuda:0"), schedule, 2, 19, 40, 8)
            first, second = engine.scheduler.running
            assert first.anchor == first.block_table.length == 18 and not {*first.block_table.pages} & {*second.block_table.pages}
            before = len(device.waits)
            row = measure(engine, (1.0,), 1, 2)
            # The experts' plain products ask the device too, how many rows each has.
            waits = [what for what in device.waits[before:] if what not in ("bincount", "tolist (4,)", "item")]
            assert len(waits) == 3, waits
        assert row["tokens_per_step"] == tokens and first.tokens != second.tokens


def test_forwards_alone_are_of_the_rows_of_a_full_step() -> None:
    bench = StepBench(DRY, torch.device("cpu"))
    for schedule in (schedule.within(bench.policy.block_size) for schedule in DRY.schedules):
        engine = engine_for(bench.policy, schedule, 2, 9, 40, DRY.page_size)
        tables = [sample.block_table for sample in engine.scheduler.running]
        forwards = passes(bench.policy, engine.cache, tables, schedule)
        assert sum(forward.rows for forward in forwards) == rows(schedule)
        with torch.inference_mode():
            assert bench._forward_seconds(engine, schedule) > 0
