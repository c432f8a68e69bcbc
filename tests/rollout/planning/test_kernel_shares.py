"""The registered step, kernel by kernel."""

from __future__ import annotations

import pytest
from transformers import ZayaConfig

from blockroll.rollout.planning.kernel_shares import step_shares
from blockroll.rollout.planning.predictions import registered
from blockroll.rollout.planning.roofline import HARDWARE, SORT_INSIDE, Roofline
from blockroll.rollout.schedule import Schedule

GOALS = {"fused(15, {0}, 16) 16 at 2048": 9.5, "fused(15, {0}, 16) 64 at 16384": 26.0}
"""Milliseconds on an MI300X."""


def test_shares_of_a_step_add_up_to_it():
    for device in registered()["devices"].values():
        for name, row in device["steps"].items():
            sampling = {"ar"} if name.startswith("ar ") else {"verify", "draft"}
            kernels = {"attention", "experts", "router", "cca", "residual", "projections", "head", "launches"}
            assert row["parts_ms"].keys() == kernels | sampling and min(row["parts_ms"].values()) >= 0
            assert sum(row["parts_ms"].values()) == pytest.approx(row["ms"], rel=2e-3)


@pytest.mark.parametrize("name", GOALS)
def test_the_step_that_is_predicted_of_an_mi300x(name):
    row = registered()["devices"]["mi300x"]["steps"][name]
    assert row["ms"] <= GOALS[name], row["parts_ms"]


def test_layers_with_a_sliding_window_read_that_much():
    def attention(window, context):
        kinds = ["hybrid" if window is None else "hybrid_sliding"] * 4
        config = ZayaConfig(num_hidden_layers=4, layer_types=kinds, sliding_window=window)
        return step_shares(Roofline.of(config), Schedule("ar"), 64, context, HARDWARE["mi300x"])["attention"]

    assert attention(1024, 16384) == attention(1024, 1024) == attention(None, 1024) < attention(None, 16384) / 4


def test_launches_are_those_of_the_experts_kernels():
    pytest.importorskip("triton")
    from blockroll.kernels.experts import triton

    assert triton._SORT_INSIDE == SORT_INSIDE
