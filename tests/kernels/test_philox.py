"""The generator is Random123's, and a draw depends on its key and counter alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockroll.kernels.philox import Purpose, gumbel, uniform
from blockroll.kernels.philox import numba as by_numba
from blockroll.kernels.philox.reference import _gumbel_numpy, _gumbel_torch, _rounds, philox_4x32

# Known answers published with Random123 (philox4x32, 10 rounds): counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[torch.Tensor]:
    return [torch.tensor([int(word, 16)]) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter: str, key: str, output: str) -> None:
    got = philox_4x32(*words(key), *words(counter))
    assert [word.item() for word in got] == [int(word, 16) for word in output.split()]


def plain_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """One counter in Python's unbounded integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def test_numpy_and_torch_paths_agree_with_plain_integers() -> None:
    rng = np.random.default_rng(0)
    table = torch.from_numpy(rng.integers(0, 2**32, (6, 37)))
    table[:, :8] = torch.from_numpy(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1], (6, 8)))
    by_numpy, by_torch = philox_4x32(*table), _rounds(*table)
    for i, column in enumerate(table.T.tolist()):
        expected = plain_philox(tuple(column[:2]), tuple(column[2:]))
        assert tuple(int(word[i]) for word in by_numpy) == expected
        assert tuple(int(word[i]) for word in by_torch) == expected


def test_numba_agrees() -> None:
    rng = np.random.default_rng(1)
    seeds, positions = rng.integers(0, 2**63, 20).tolist(), rng.integers(0, 2**32, 20).tolist()
    for seed, position, purpose in zip(seeds, positions, [0, 1, 2, 3] * 5):
        words_W4 = np.empty((3, 4), np.uint32)
        by_numba.fill_words(seed, position, purpose, words_W4)
        key = seed % 2**32, seed // 2**32
        assert [tuple(row) for row in words_W4.tolist()] == [plain_philox(key, (position, purpose, w, 0)) for w in range(3)]
        assert by_numba.uniform(seed, position, purpose) == uniform(torch.tensor([seed]), torch.tensor([position]), purpose)[0]


def test_broadcasting_equals_one_by_one() -> None:
    seed, position = torch.arange(5)[:, None] + 2**40, torch.arange(3)
    got = uniform(seed, position, Purpose.ACCEPT)
    for i in range(5):
        for j in range(3):
            assert got[i, j] == uniform(seed[i], position[j : j + 1], Purpose.ACCEPT)[0]


def test_uniform_stays_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in ((0, 2.0**-33), (2**32 - 1, 1 - 2.0**-33)):
        monkeypatch.setattr(
            "blockroll.kernels.philox.reference.philox_4x32", lambda *_, word=word: (torch.tensor([word]),) * 4
        )
        assert uniform(torch.tensor([1]), torch.tensor([2]), 0).item() == expected


@pytest.mark.parametrize("vocab_size", [1, 3, 8, 513])
def test_gumbel_reads_lane_v_mod_4_of_block_v_div_4(vocab_size: int) -> None:
    seed, position = (5 << 32) + 9, 77
    got = gumbel(torch.tensor([seed]), torch.tensor([position]), vocab_size, Purpose.DRAFT, torch.float64)
    assert got.shape == (1, vocab_size)
    for v in range(vocab_size):
        bits = plain_philox((9, 5), (position, int(Purpose.DRAFT), v // 4, 0))[v % 4]
        expected = -np.log(-np.log((bits + 0.5) / 2**32))
        assert got[0, v].item() == pytest.approx(expected, rel=1e-13)


def test_gumbel_rows_do_not_depend_on_the_batch() -> None:
    seed = torch.randint(0, 2**62, (70,), generator=torch.Generator().manual_seed(0))
    position = torch.arange(70) * 3
    for vocab_size in (11, 9001):  # the second is computed in several blocks
        whole = gumbel(seed, position, vocab_size, Purpose.NOISE)
        for i in (0, 41, 69):
            assert torch.equal(
                whole[i : i + 1], gumbel(seed[i : i + 1], position[i : i + 1], vocab_size, Purpose.NOISE)
            )
        grid = gumbel(seed[:2, None], position[None, :3], vocab_size, Purpose.NOISE)
        assert torch.equal(grid[1, 2:3], gumbel(seed[1:2], position[2:3], vocab_size, Purpose.NOISE))


def test_gumbel_by_torch_equals_gumbel_by_numpy() -> None:
    seed, position = torch.arange(20)[:, None] + 2**40, torch.arange(20)[:, None]
    by_torch = _gumbel_torch(seed, position, torch.arange(9), Purpose.NOISE)
    by_numpy = torch.from_numpy(_gumbel_numpy(seed, position, torch.arange(9), Purpose.NOISE))
    assert by_torch.shape == (20, 36)
    torch.testing.assert_close(by_torch, by_numpy, atol=1e-13, rtol=1e-13)
    assert torch.equal(by_torch.float(), by_numpy.float())


def test_gumbel_has_the_moments_of_gumbel_noise() -> None:
    g = gumbel(torch.arange(400), torch.arange(400) % 7, 1000, Purpose.NOISE, torch.float64).flatten()
    assert abs(g.mean().item() - 0.5772157) < 0.01
    assert abs(g.var().item() - np.pi**2 / 6) < 0.02


def test_seed_position_and_purpose_each_change_the_draw() -> None:
    def at(seed: int, position: int, purpose: int) -> float:
        return uniform(torch.tensor([seed]), torch.tensor([position]), purpose).item()

    variants = [(1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3), (1, 3, 0), (2, 2, 0), (1 + 2**32, 2, 0)]
    assert len({at(*variant) for variant in variants}) == len(variants)
