"""Residual scaling and RMS norm in Triton (interpreted) against the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.kernels.residual import Scales, reference, rms_norm, scale_residual, scale_residual_norm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def interpreted(poisoned_outputs):
    with using("triton"):
        yield


def arguments(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """hidden, residual, four scales and biases, the norm's weight."""
    draw = torch.Generator().manual_seed(seed)
    stream = torch.promote_types(dtype, torch.float32)
    hidden = torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype)
    residual = torch.randn(rows, width, generator=draw, dtype=torch.float64).to(stream)
    return [hidden, residual, *(torch.randn(5, width, generator=draw, dtype=torch.float64).to(dtype))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, width", [(1, 1), (3, 17), (5, 64), (2, 515)])
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    hidden, residual, *scales, weight = arguments(rows, width, dtype)
    stream, out = scale_residual_norm(hidden, residual, Scales(*scales), weight, 1e-5)
    expected_stream, expected_out = reference.scale_residual_norm(hidden, residual, Scales(*scales), weight, 1e-5)
    assert stream.dtype == residual.dtype and out.dtype == dtype
    # The stream is elementwise; torch's addcmul may leave out one rounding where it multiplies and adds at once.
    close = 4 * torch.finfo(stream.dtype).eps
    torch.testing.assert_close(stream, expected_stream, atol=close, rtol=close)
    torch.testing.assert_close(out, expected_out, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(scale_residual(hidden, residual, Scales(*scales)), stream)
    assert torch.equal(rms_norm(stream, weight, 1e-5), out)


def test_leading_shapes_and_strides() -> None:
    x = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    weight = torch.rand(10)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_a_zero_row_stays_zero_and_no_rows_are_none() -> None:
    assert rms_norm(torch.zeros(1, 5), torch.ones(5), 1e-6).tolist() == [[0.0] * 5]
    assert rms_norm(torch.zeros(0, 5), torch.ones(5), 1e-6).shape == (0, 5)


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    hidden, residual, *scales, weight = arguments(64, 131, torch.float32)
    rest = Scales(*scales), weight
    stream, out = scale_residual_norm(hidden, residual, *rest, 1e-5)
    for i in (0, 17, 63):
        one_stream, one_out = scale_residual_norm(hidden[i : i + 1], residual[i : i + 1], *rest, 1e-5)
        assert torch.equal(one_stream[0], stream[i]) and torch.equal(one_out[0], out[i])
