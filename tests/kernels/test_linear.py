"""The batch-invariant product (interpreted) against torch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.kernels.linear import linear, linear_float32, wide


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


@pytest.mark.parametrize(
    "implementation, dtype",  # the interpreter multiplies no bfloat16
    [("triton", torch.float16), ("reference", torch.float16), ("reference", torch.bfloat16)],
)
def test_sums_of_16_bit_numbers_stay_float32(poisoned_outputs, monkeypatch, implementation, dtype) -> None:
    monkeypatch.setattr(wide, "_CHUNK", 1 << 12)  # three pieces of the weight
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*size, generator=draw).to(dtype) for size in ((2, 17, 40), (300, 40), (300,)))
    with using(implementation):
        got = linear_float32(x, weight, bias)
    assert got.dtype == torch.float32 and got.shape == (2, 17, 300)
    expected = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    assert (got.to(dtype).float() != got).any()


def test_gradients_of_the_float32_product() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=draw).bfloat16().requires_grad_(True) for size in ((5, 12), (9, 12)))
    seen = torch.randn(5, 9, generator=draw)
    linear_float32(x, weight).backward(seen)
    exact_x, exact_weight = seen.double() @ weight.double(), seen.double().T @ x.double()
    torch.testing.assert_close(x.grad.double(), exact_x, atol=0.1, rtol=0.02)
    torch.testing.assert_close(weight.grad.double(), exact_weight, atol=0.1, rtol=0.02)
