"""`blockroll convert`: from a file of stages to a policy directory and its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import blockroll
from blockroll import cli

RECIPE = """
output: {folder}/policy
architecture: {{hidden_size: 32, layers: 2, heads: 2, kv_heads: 1, head_dim: 16, experts: 2, expert_size: 32,
  router_size: 8, max_position_embeddings: 256}}
data: {{pool: 8}}
block_size: 8
stages:
  - {{name: ar, kind: ar, tokens: 6000, pack_tokens: 1024, autocast: float32}}
  - {{name: diffusion, kind: diffusion, tokens: 3000, pack_tokens: 1024, autocast: float32}}
evaluation_tasks: 6
"""


def convert(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> object:
    monkeypatch.setattr(sys, "argv", ["blockroll", "convert", str(recipe)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_trains_converts_and_measures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    assert convert(monkeypatch, recipe) == 0
    policy = blockroll.load_policy(tmp_path / "policy")
    assert (policy.block_size, policy.converted, policy.tokenizer is None) == (8, True, False)
    figures = json.loads((tmp_path / "policy.figures.json").read_text())
    assert [(row["policy"], row["sampler"], row["schedule"], row["batch"]) for row in figures] == [
        ("parent", "ar", "ar", 16), ("converted", "ar", "ar", 16), ("converted", "lossless", "fused", 1),
    ]
    for row in figures:
        assert row["tasks"] == 6
        assert 0 <= row["pass_at_1"] <= 1
        assert len(row["families"]) >= 4
        assert set(row["tokens_per_step_by_position"]) <= {str(place) for place in range(0, 256, 32)}
    assert figures[0]["tokens_per_forward"] == figures[1]["tokens_per_forward"] == 1.0
    assert 1.0 < figures[2]["tokens_per_forward"] <= 17.0
    log = [json.loads(line) for line in (tmp_path / "policy.log.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {"ar", "diffusion"}


def test_unknown_key_names_key_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path).replace("tokens: 6000", "token: 6000"))
    assert convert(monkeypatch, recipe) == 2
    error = f"error: stages[0].token: unknown key in {recipe}; did you mean `tokens`? (and 1 more)\n"
    assert capsys.readouterr().err == error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
