"""The audits find the faults that they are there for. Each is planted in a small kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_audit import Audit, AuditFault, vast


@triton.jit
def _all_write(out, n, STEP: tl.constexpr):
    at = tl.program_id(0) // STEP * 8 + tl.arange(0, 8)
    tl.store(out + at, tl.arange(0, 8), at < n)


@triton.jit
def _neighbour(out, n):
    program = tl.program_id(0)
    tl.store(out + program, tl.load(out + (program + 1) % n) + 1)


@triton.jit
def _count(out):
    tl.atomic_add(out, 1)


@triton.jit
def _row_of(x, out, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + row, tl.load(x + row * stride))


@triton.jit
def _columns(x, out, stride, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i * stride))


def test_two_programs_that_write_to_one_place():
    out = torch.zeros(32, dtype=torch.int32)
    with Audit() as audit:
        _all_write[(4,)](out, 32, 1)
    audit.check_races()
    with Audit() as audit:
        _all_write[(4,)](out, 32, 2)
    with pytest.raises(AuditFault, match="_all_write: programs 0 and 1 both write to out"):
        audit.check_races()


def test_a_program_that_reads_what_another_writes():
    orders = set()
    for seed in range(4):
        out = torch.zeros(6, dtype=torch.int32)
        with Audit(seed) as audit:
            _neighbour[(6,)](out, 6)
        orders.add(tuple(out.tolist()))
        with pytest.raises(AuditFault, match=r"_neighbour: program \d reads what program \d writes to out"):
            audit.check_races()
    assert len(orders) > 1  # the order of the programs shows


def test_atomics_race_unless_they_are_named():
    out = torch.zeros(1, dtype=torch.int32)
    with Audit() as audit:
        _count[(5,)](out)
    with pytest.raises(AuditFault, match="both write to out"):
        audit.check_races()
    audit.check_races(atomics=("_count",))
    assert out.item() == 5


@pytest.mark.parametrize("stride", [1 << 20, (1 << 20) - 7])
def test_an_offset_that_overflows(stride):
    """Of a tensor of 4 GB that takes no memory."""
    rows = 4096
    x, out = vast(rows, stride, dtype=torch.uint8), torch.zeros(rows, dtype=torch.uint8)
    with Audit(programs=3) as audit:
        _row_of[(rows,)](x, out, stride, True)
    assert audit.launches[0].programs == rows and len(audit.launches[0].writes) == 3
    with pytest.raises(AuditFault, match=r"_row_of: program 4095 reads -\d+ bytes from the start of x, in no tensor"), \
            Audit(programs=3):  # fmt: skip
        _row_of[(rows,)](x, out, stride, False)


def test_a_mask_that_is_missing():
    with pytest.raises(AuditFault, match="program 1 writes"), Audit(programs=2):
        _all_write[(2,)](torch.zeros(10, dtype=torch.int32), 16, 1)


def test_strided_reads():
    x, out = torch.zeros(64, 32), torch.zeros(64)
    with Audit() as audit:
        _columns[(1,)](x, out, 1, 64)
    assert audit.line_use()["_columns"] >= 0.6  # tensors begin and end within lines
    with Audit() as audit:
        _columns[(1,)](x, out, 32, 64)
    assert audit.line_use()["_columns"] < 0.1
