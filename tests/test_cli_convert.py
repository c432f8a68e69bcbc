"""`blockroll convert`: from a file of stages to a policy directory and its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import blockroll
from blockroll import cli
from blockroll.rollout.convert import convert as run_conversion

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
    directory = tmp_path / "policy"
    figures = json.loads((directory / "figures.json").read_text())
    rows = figures["rows"]
    assert [(row["policy"], row["sampler"], row["schedule"], row["levels"]) for row in rows] == [
        ("parent", "ar", "ar", []), ("converted", "ar", "ar", []), ("converted", "lossless", "fused", [0, 4]),
        ("converted", "lossless", "fused", [0, 4, 8]), ("converted", "lossless", "two_pass", []),
        ("converted", "coupled", "fused", [0, 4]), ("converted", "mixed", "fused", [0, 4]),
    ]
    for row in rows:
        assert (row["tasks"], row["batch"], row["temperature"]) == (6, 1, 1.0)
        assert 0 <= row["pass_at_1"] <= 1
        assert len(row["families"]) >= 4
        assert set(row["tokens_per_step_by_position"]) <= {str(place) for place in range(0, 256, 32)}
    assert rows[0]["tokens_per_forward"] == rows[1]["tokens_per_forward"] == 1.0
    assert 1.0 < rows[2]["tokens_per_forward"] <= 17.0
    # The same weights, seeds and tasks: what `coupled` answers is what `ar` answers.
    for name in ("pass_at_1", "answer_tokens", "families", "finish_reasons"):
        assert rows[5][name] == rows[1][name]
    assert set(figures["ar_loss"]) == {"parent", "converted"}
    assert figures["ar_loss"]["parent"] != figures["ar_loss"]["converted"]
    assert {"processor", "cores", "torch_threads", "versions", "date"} <= set(figures["machine"])

    assert (directory / "recipe.yaml").read_bytes() == recipe.read_bytes()
    log = [json.loads(line) for line in (directory / "training.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {"ar", "diffusion"}
    card = (directory / "card.md").read_text()
    parameters = sum(p.numel() for p in policy.parameters())
    for fact in (f"{parameters:,}", "6 held-out tasks", "mixed 0.5", "fused {0,4,8}", f"{rows[2]['tokens_per_forward']:.2f}"):
        assert fact in card
    assert str(tmp_path) not in card


def test_finished_run_is_measured_again_but_not_trained(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    reported: list[dict] = []
    directory = run_conversion(recipe, reported.append)
    assert {row["stage"] for row in reported} == {"ar", "diffusion"}
    weights = (directory / "model.safetensors").read_bytes()
    first = json.loads((directory / "figures.json").read_text())["rows"]
    recipe.write_text(RECIPE.format(folder=tmp_path).replace("evaluation_tasks: 6", "evaluation_tasks: 0"))
    reported.clear()
    run_conversion(recipe, reported.append)
    assert not reported
    assert (directory / "model.safetensors").read_bytes() == weights
    # A card that nobody measured anew would describe other weights.
    assert not (directory / "figures.json").exists()
    assert not (directory / "card.md").exists()
    recipe.write_text(RECIPE.format(folder=tmp_path))
    run_conversion(recipe)
    again = json.loads((directory / "figures.json").read_text())["rows"]
    for row, same in zip(first, again, strict=True):
        assert {**row, "tokens_per_s": 0} == {**same, "tokens_per_s": 0}


def test_unknown_key_names_key_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path).replace("tokens: 6000", "token: 6000"))
    assert convert(monkeypatch, recipe) == 2
    error = f"error: stages[0].token: unknown key in {recipe}; did you mean `tokens`? (and 1 more)\n"
    assert capsys.readouterr().err == error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
