"""The registered step, kernel by kernel."""

from __future__ import annotations

import pytest

from blockroll.rollout.planning.kernel_shares import COUNTED, counted
from blockroll.rollout.planning.predictions import registered

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


def test_what_was_counted_goes_from_rows_to_rows(monkeypatch):
    monkeypatch.setitem(COUNTED, "device", {"cca": ((16, 1.0), (256, 3.0))})
    assert [counted("device", "cca", rows) for rows in (1, 16, 64, 256, 4096)] == pytest.approx([1, 1, 2, 3, 3])
    assert counted("device", "router", 64) == counted("other", "cca", 64) == 1.0
