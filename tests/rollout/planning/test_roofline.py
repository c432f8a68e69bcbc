"""The roofline: what a step moves and computes, and what a survival curve makes of it."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import ZayaConfig

from blockroll.errors import CheckpointError
from blockroll.model.checkpoint import resolve
from blockroll.rollout.planning.attention_work import AttentionCall, shares
from blockroll.rollout.planning.plan import plan
from blockroll.rollout.planning.roofline import (
    CUDA_LAUNCH,
    HARDWARE,
    HIP_LAUNCH,
    KERNELS_OF_AR,
    KERNELS_OF_DRAFTS,
    Rates,
    Roofline,
    expected_tokens,
    experts_touched,
    geometric_survival,
    measured_rates,
)
from blockroll.rollout.schedule import Schedule


@pytest.fixture(scope="module")
def zaya() -> Roofline:
    return Roofline.of(ZayaConfig())


def test_about_three_proposals_on_mi300x_by_peaks_and_fewer_by_rates_that_kernels_reach(zaya: Roofline) -> None:
    proposals = {}
    for name, device in HARDWARE.items():
        rows, by_peak = zaya.proposals_until_compute_bound(device.peak)
        _, by_rate = zaya.proposals_until_compute_bound(device.achieved)
        assert rows == pytest.approx(16 * (1 + by_peak))
        assert by_rate < by_peak
        proposals[name] = by_peak
    assert round(proposals["mi300x"]) == 3 and 3.5 <= proposals["mi355x"] <= 5 and 2 <= proposals["h200"] <= 2.5
    # From the definition: a cached position of a key head is K and V, D numbers of two bytes each; every query row and
    # head multiplies and adds with both.
    device, config = HARDWARE["mi300x"], zaya.config
    rows = zaya.proposals_until_compute_bound(device.peak)[0]
    per_position = 2 * 2 * config.num_attention_heads * config.head_dim * rows
    assert per_position / device.flops == pytest.approx(2 * 2 * config.num_key_value_heads * config.head_dim / device.bytes)


def test_experts_touched_is_the_mean_over_all_choices() -> None:
    for experts, rows in ((3, 1), (3, 4), (4, 3)):
        choices = list(itertools.product(range(experts), repeat=rows))
        mean = sum(len(set(choice)) for choice in choices) / len(choices)
        assert experts_touched(experts, rows) == pytest.approx(mean)


def test_a_large_step_reads_every_weight_once_and_a_small_one_few(zaya: Roofline) -> None:
    config = zaya.config
    small, large = (zaya.step(Schedule("ar"), batch, 1) for batch in (1, 4096))
    weights = sum(large.parts[part].bytes for part in ("dense", "experts"))
    embedding = config.vocab_size * config.hidden_size
    assert weights == pytest.approx(2 * (zaya.parameters - embedding), rel=2e-3)  # but for vectors
    one = 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    assert small.parts["experts"].bytes == pytest.approx(2 * one)
    assert small.parts["head"].bytes == pytest.approx(2 * embedding, rel=0.01)
    assert small.experts == pytest.approx(1) and large.experts == pytest.approx(16)


def test_schedules_differ_by_rows_and_passes(zaya: Roofline) -> None:
    ar, two, fused = (
        zaya.step(schedule, 8, 1000)
        for schedule in (Schedule("ar"), Schedule("two_pass", 16), Schedule("fused", levels=(0, 4, 8)))
    )
    assert (ar.rows, two.rows, fused.rows) == (1, 33, 64)
    assert (ar.passes, two.passes, fused.passes) == (1, 2, 1)
    assert two.parts["dense"].bytes == 2 * fused.parts["dense"].bytes == 2 * ar.parts["dense"].bytes
    assert fused.parts["dense"].flops == 64 * ar.parts["dense"].flops
    # The cache is read once per pass; what is new is small beside it.
    assert fused.parts["attention"].bytes == pytest.approx(ar.parts["attention"].bytes, rel=0.07)
    kv = 8 * 1000 * zaya.kv_bytes
    assert ar.parts["attention"].bytes == pytest.approx(kv, rel=0.01)
    rates = Rates(1e15, 1e12, 1e15, 1e12, 1e-6)
    assert ar.seconds(rates) == pytest.approx(ar.total.bytes / 1e12 + ar.kernels * 1e-6)  # all parts move bytes


def test_attention_takes_what_its_programs_take(zaya: Roofline) -> None:
    """Bytes and FLOPs alone where the device is full; more where few programs share a long sequence, or where splits are many."""
    for name in ("mi300x", "h200"):
        rates = HARDWARE[name].achieved
        bare = replace(rates, arch=None)
        for batch in (1, 16, 64):
            for rows in (1, 17, 32):
                for context in (2048, 16384):
                    call = AttentionCall(8, 2, 128, batch, rows, context)
                    made = shares(HARDWARE[name].arch, call)
                    assert bare.attention(call) <= rates.attention(call) < 20 * bare.attention(call)
                    assert made.splits <= 32 and made.partial == (made.splits > 1) * made.splits * batch * rows * 8 * 129 * 8
        long, full = (AttentionCall(8, 2, 128, batch, 1, 16384) for batch in (1, 64))
        assert rates.attention(long) > 1.1 * bare.attention(long)
        assert rates.attention(full) == pytest.approx(bare.attention(full), rel=0.01)
        step = zaya.step(Schedule("ar"), 1, 16384)
        more = rates.attention(long) - bare.attention(long)
        assert step.seconds(rates) - step.seconds(bare) == pytest.approx(zaya.config.num_hidden_layers * more)


def test_a_launch_costs_what_the_makers_graphs_cost(zaya: Roofline) -> None:
    assert HARDWARE["mi300x"].achieved.launch == HIP_LAUNCH == 3.85e-6 and HARDWARE["h200"].achieved.launch == CUDA_LAUNCH
    ar, fused = (zaya.step(schedule, 16, 2048) for schedule in (Schedule("ar"), Schedule("fused", levels=(0,))))
    assert fused.kernels - ar.kernels == KERNELS_OF_DRAFTS - KERNELS_OF_AR > 0
    rates = HARDWARE["mi300x"].achieved
    assert ar.seconds(rates) - ar.seconds(replace(rates, launch=0.0)) == pytest.approx(ar.kernels * HIP_LAUNCH)


def test_a_sliding_window_bounds_what_is_read() -> None:
    config = ZayaConfig(sliding_window=64, layer_types=["hybrid", "hybrid_sliding"] * 20)
    whole, half = (Roofline.of(c).step(Schedule("ar"), 4, 10_000).parts["attention"] for c in (ZayaConfig(), config))
    assert half.bytes / whole.bytes == pytest.approx((20 * 10_000 + 20 * 64) / (40 * 10_000), rel=1e-3)


@pytest.mark.parametrize("schedule", [
    Schedule("fused", levels=(0,)), Schedule("fused", levels=(0, 3, 5)), Schedule("fused", levels=(0, 4), drafts=6),
    Schedule("two_pass", 5),
])  # fmt: skip
def test_expected_tokens_are_those_of_a_simulation(schedule: Schedule) -> None:
    block, rate, draw = 8, 0.8, random.Random(0)
    survival = [rate**k for k in range(1, block + 1)]
    drafts = schedule.drafts or block - 1
    available, committed, steps = drafts, 0, 40_000
    for _ in range(steps):
        accepted = 0
        while accepted < available and draw.random() < rate:
            accepted += 1
        committed += accepted + 1
        if schedule.kind == "fused":
            level = max(level for level in schedule.levels if level <= accepted)
            available = min(block - (accepted - level) - 1, drafts)
    assert expected_tokens(schedule, survival, block) == pytest.approx(committed / steps, rel=0.02)
    assert expected_tokens(Schedule("ar"), survival, block) == 1


def test_a_geometric_curve_gives_the_tokens_asked_for() -> None:
    for tokens in (1.0, 4.6, 7.7, 17.0):
        survival = geometric_survival(tokens, 16)
        assert 1 + sum(survival) == pytest.approx(tokens)
        assert expected_tokens(Schedule("two_pass", 16), survival, 16) == pytest.approx(tokens)


def test_drafts_that_always_survive() -> None:
    """`fused` with one level then takes a whole block, has none left, and begins again: 16 tokens, then 1."""
    assert expected_tokens(Schedule("fused", levels=(0,)), [1.0] * 16, 16) == pytest.approx((16 + 1) / 2)


def test_measured_figures_replace_assumed_ones() -> None:
    fallback = HARDWARE["h200"].achieved
    figures = {"ceilings": {"copy_bytes_per_s": 4.2e12, "matmul_flops_per_s": None}, "attention": {"best_flops_per_s": 5e14}}
    rates = measured_rates(figures, fallback)
    assert (rates.bytes, rates.attention_flops) == (4.2e12, 5e14)
    assert (rates.flops, rates.attention_bytes, rates.launch) == (fallback.flops, fallback.attention_bytes, fallback.launch)


def test_a_plan_for_a_policy_that_no_kernel_serves_is_refused(tmp_path: Path) -> None:
    config = json.loads((Path(resolve("tiny-reasoner")) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 80, "num_key_value_heads": 1}))
    with pytest.raises(CheckpointError, match="num_attention_heads: 80 query heads share 1 key heads"):
        plan(str(tmp_path), ["mi300x"], [1], [2048])
