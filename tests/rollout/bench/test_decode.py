"""Decode benchmark from Python: in turn, on held-out prompts, next to a check; files whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blockroll.errors import InvalidInput
from blockroll.model.checkpoint import save_policy
from blockroll.model.conversion.config import Architecture, ConversionConfig, Stage
from blockroll.model.conversion.train import new_policy
from blockroll.rollout.bench import decode as bench
from blockroll.rollout.bench.decode import bench_decode


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small policy that reads text, with weights large enough for samples to differ."""
    shape = Architecture(
        hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=2, expert_size=32, router_size=8,
        max_position_embeddings=128,
    )
    stage = Stage(name="ar", kind="ar", tokens=1)
    policy = new_policy(ConversionConfig(output="unused", architecture=shape, block_size=8, stages=(stage,)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return save_policy(policy, tmp_path_factory.mktemp("bench") / "policy")


def test_coupled_is_checked_against_ar(directory: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    path = tmp_path / "decode.json"
    rows = bench_decode(directory, batches=(2,), samplers=("coupled", "mixed"), output=path, max_tokens=10, rounds=3)
    assert json.loads(path.read_text()) == rows
    assert [row["sampler"] for row in rows] == ["ar", "coupled", "mixed"]
    ar, coupled, mixed = rows
    assert coupled["tokens_equal_ar"] is True
    assert "tokens_equal_ar" not in ar and "tokens_equal_ar" not in mixed
    for row in rows:
        assert row["max_logprob_error"] == 0 and row["products"].startswith("fixed order")
        assert (row["batch"], row["max_tokens"], row["rounds"]) == (2, 10, 3)
        assert row["context"] > 4
        assert row["machine"]["torch_threads"] == 1
        assert {"torch", "transformers", "blockroll"} <= set(row["machine"]["versions"])
    assert torch.get_num_threads() == before


def test_contestants_take_turns(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    make = bench._ours

    def watched(policy: object, sampler: str, *rest: object) -> bench._Contestant:
        contestant = make(policy, sampler, *rest)  # type: ignore[arg-type]
        decode = contestant.decode

        def decoding(prompts: bench.Prompts, seed: int) -> tuple[int, int]:
            turns.append((sampler, seed))
            return decode(prompts, seed)

        contestant.decode = decoding
        return contestant

    monkeypatch.setattr(bench, "_ours", watched)
    bench_decode(directory, batches=(1,), samplers=("lossless",), max_tokens=4, rounds=3)
    assert turns == [(sampler, seed) for seed in range(4) for sampler in ("ar", "lossless")]


def test_what_cannot_be_measured(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    with pytest.raises(InvalidInput, match="peer: unknown peer 'other'; use one of transformers"):
        bench_decode(directory, peer="other", output=path)
    with pytest.raises(InvalidInput, match="rounds: 2 is less than 3"):
        bench_decode(directory, rounds=2, output=path)
    with pytest.raises(InvalidInput, match="batch: 0"):
        bench_decode(directory, batches=(1, 0), output=path)
    assert not path.exists()
