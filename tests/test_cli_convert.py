"""`blockroll convert`: from a file of stages to a policy directory and its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import blockroll
from blockroll import cli
from blockroll.rollout.conversion.convert import convert as run_conversion

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
    at_first = [way for way in figures["ways"] if way["temperature"] == 1.0 and way["block_size"] == 8]
    assert [(way["policy"], way["name"], way["schedule"], way["levels"]) for way in at_first] == [
        ("parent", "ar", "ar", []), ("policy", "ar", "ar", []), ("policy", "lossless", "fused", [0, 4]),
        ("policy", "mixed(0.5)", "fused", [0, 4]),
    ]  # fmt: skip
    assert (figures["tasks"], figures["k"], figures["parent"]) == (6, [1, 2, 4], "policy.ar")
    assert figures["ar_loss"] != figures["parent_ar_loss"]
    # All that both stages were trained on, and no less.
    assert 60 <= figures["disjoint"]["training_tasks_compared"] <= 300
    assert not figures["disjoint"]["not_compared"]
    assert (directory / "figures.png").read_bytes().startswith(b"\x89PNG")

    assert (directory / "recipe.yaml").read_bytes() == recipe.read_bytes()
    log = [json.loads(line) for line in (directory / "training.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in log} == {"ar", "diffusion"}
    card = (directory / "card.md").read_text()
    parameters = sum(p.numel() for p in policy.parameters())
    tokens_per_forward = figures["tokens_per_forward"]["lossless"]["1.0"]
    for fact in (f"{parameters:,}", "6 held-out tasks", "mixed(0.5)", "fused {0,4,8}", f"| {tokens_per_forward:.2f} ±"):
        assert fact in card
    assert str(tmp_path) not in card


def test_finished_run_is_measured_again_but_not_trained(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(folder=tmp_path).replace("evaluation_tasks: 6", "evaluation_tasks: 2")
    recipe.write_text(text)
    reported: list[dict] = []
    directory = run_conversion(recipe, reported.append)
    assert {row["stage"] for row in reported} == {"ar", "diffusion"}
    weights = (directory / "model.safetensors").read_bytes()
    first = json.loads((directory / "figures.json").read_text())["ways"]
    recipe.write_text(text.replace("evaluation_tasks: 2", "evaluation_tasks: 0"))
    reported.clear()
    run_conversion(recipe, reported.append)
    assert not reported
    assert (directory / "model.safetensors").read_bytes() == weights
    # A card that nobody measured anew would describe other weights.
    assert not {"figures.json", "figures.png", "card.md"} & {path.name for path in directory.iterdir()}
    recipe.write_text(text)
    run_conversion(recipe)
    again = json.loads((directory / "figures.json").read_text())["ways"]
    for way, same in zip(first, again, strict=True):
        assert {**way, "tokens_per_s": 0} == {**same, "tokens_per_s": 0}


def test_unknown_key_names_key_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path).replace("tokens: 6000", "token: 6000"))
    assert convert(monkeypatch, recipe) == 2
    error = f"error: stages[0].token: unknown key in {recipe}; did you mean `tokens`? (and 1 more)\n"
    assert capsys.readouterr().err == error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
