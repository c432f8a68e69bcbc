"""The generator in Triton (interpreted) has the bits of the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from blockroll.kernels.dispatch import using
from blockroll.kernels.philox import Purpose, gumbel, reference, uniform

EDGES = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])


@pytest.fixture(autouse=True)
def interpreted():
    with using("triton"):
        yield


def test_uniform_is_equal_to_the_last_bit_and_broadcasts() -> None:
    seed = torch.tensor([0, 5, 2**32 - 1, 2**40 + 3, 2**62 + 2**31])[:, None]
    position = EDGES[None]
    purpose = torch.tensor([Purpose.ACCEPT, Purpose.RESAMPLE])[:, None, None]
    assert torch.equal(uniform(seed, position, purpose), reference.uniform(seed, position, purpose))
    assert torch.equal(uniform(seed, position, Purpose.DRAFT), reference.uniform(seed, position, Purpose.DRAFT))


@pytest.mark.parametrize("vocab_size", [1, 6, 1024, 1031])
def test_gumbel_equals_the_reference(vocab_size: int) -> None:
    seed, position = torch.tensor([3, 2**45 + 7, 2**62]), torch.tensor([0, 77, 2**31 + 5])
    for dtype in (torch.float64, torch.float32):
        got = gumbel(seed, position, vocab_size, Purpose.DRAFT, dtype)
        expected = reference.gumbel(seed, position, vocab_size, Purpose.DRAFT, dtype)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=1e-13 if dtype == torch.float64 else 0, rtol=0)
