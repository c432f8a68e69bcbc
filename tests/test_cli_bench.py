"""`blockroll bench decode`: rows that say what was measured, next to a check of what was decoded."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import ZayaConfig, ZayaForCausalLM

from blockroll import cli
from blockroll.rollout.planning.planner import candidates


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory written by transformers: no tokenizer, never converted, weights that sampling can tell apart."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    torch.manual_seed(0)
    model = ZayaForCausalLM(ZayaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=2, moe_intermediate_size=16, router_hidden_size=8, max_position_embeddings=128,
        rope_parameters={"hybrid": rope, "hybrid_sliding": rope}, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("policy") / "random"
    model.save_pretrained(directory)
    return directory


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, command: str = "decode") -> object:
    monkeypatch.setattr(sys, "argv", ["blockroll", "bench", command, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_rows(
    policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "decode.json"
    options = ["--batch", "1,3", "--samplers", "lossless", "--peer", "transformers", "--json", path]
    assert run(monkeypatch, "--policy", policy, *options, "--rounds", 3, "--max-tokens", 12) == 0
    rows = json.loads(path.read_text())
    assert [(row["batch"], row["engine"], row["sampler"], row["schedule"]) for row in rows] == [
        (batch, *contestant)
        for batch in (1, 3)
        for contestant in [("blockroll", "ar", "ar"), ("blockroll", "lossless", "auto"), ("transformers", "ar", "ar")]
    ]
    for row in rows:
        assert (row["context"], row["temperature"], row["rounds"]) == (32, 1.0, 3)
        assert row["tokens_per_s"] > 0
        if row["sampler"] == "ar":
            assert row["tokens_per_forward"] == 1.0
        if row["engine"] == "blockroll":
            assert row["max_logprob_error"] <= 1e-5
        else:
            assert row["greedy_tokens_equal"]
    ar, lossless, _ = rows[:3]
    assert ar["ratio_to_ar"] == 1.0
    assert lossless["ratio_to_ar"] == pytest.approx(lossless["tokens_per_s"] / ar["tokens_per_s"])
    first = capsys.readouterr().out.splitlines()[0]
    assert f"{rows[0]['machine']['processor']}, context 32, T=1: batch 1: " in first and "; batch 3: " in first


def test_a_peer_that_refuses_says_why(policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    peers = ["--peer", "transformers-lookup,transformers-continuous"]
    assert run(monkeypatch, "--policy", policy, "--batch", 1, "--samplers", "ar", *peers, "--json", path,
               "--rounds", 3, "--max-tokens", 4) == 0  # fmt: skip
    _, *refused = json.loads(path.read_text())
    assert [row["engine"] for row in refused] == ["transformers-lookup", "transformers-continuous"]
    assert all(row["unsupported"] and row["tokens_per_s"] is row["ratio_to_ar"] is None for row in refused)


def test_planner_against_fixed_schedules(
    policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "planner.json"
    options = ["--batch", 3, "--rounds", 3, "--max-tokens", 6, "--json", path]
    assert run(monkeypatch, "--policy", policy, *options, command="planner") == 0
    result = json.loads(path.read_text())
    assert result["tokens_equal"] is True
    labels = [row["schedule"] for row in result["rows"]]
    assert {"ar", "auto", result["best"]} <= set(labels) and len(labels) == len(set(labels)) == len(candidates(16)) + 1
    assert [row["seconds"] for row in result["rows"]] == sorted(row["seconds"] for row in result["rows"])
    (planned,) = [row for row in result["rows"] if row["schedule"] == "auto"]
    assert planned["ratio_to_best"] == result["planner_ratio"] > 0
    assert [(part["from"], part["to"]) for part in result["by_batch"]] == [(1, 1), (2, 3)]
    for part in result["by_batch"]:
        assert part["best"] in labels and set(part["chosen"]) <= set(labels)
        assert part["best_tokens_per_s"] > 0 and part["planner_tokens_per_s"] > 0


    out = capsys.readouterr().out
    assert f"batch 3 falling to 1, coupled: the planner makes {result['planner_ratio']:.2f}x" in out.splitlines()[0]
    assert f"{result['best']}, the best fixed schedule in hindsight" in out.splitlines()[0]
    assert "slower schedules" in out
