"""The batch-invariant product (interpreted) against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.kernels.linear import linear


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float16, 1e-2)])
@pytest.mark.parametrize("rows, d, f, bias", [(1, 64, 64, False), (65, 33, 70, True), (3, 200, 5, True)])
def test_equals_torch(poisoned_outputs, rows, d, f, bias, dtype, atol) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, d, generator=draw).to(dtype) for size in ((1, rows), (f,)))
    b = torch.randn(f, generator=draw).to(dtype) if bias else None
    with using("triton", batch_invariant=True):
        got = linear(x, weight, b)
    assert got.dtype == dtype and got.shape == (1, rows, f)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, b), atol=atol, rtol=atol)


def test_a_row_alone_equals_the_row_among_many() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 40, generator=draw), torch.randn(30, 40, generator=draw)
    with using("triton", batch_invariant=True):
        together = linear(x, weight)
        for i in (0, 63):
            assert torch.equal(linear(x[i : i + 1], weight)[0], together[i])
