"""`--device` and `--dtype` of every command that runs a policy, and the same keys of configurations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from blockroll import cli

PROMPT = '{"id": "a", "prompt_tokens": [1, 20, 30], "tokens": [40, 41]}\n'
RECIPE = "output: {folder}/policy\ndevice: {device}\nstages:\n  - {{name: ar, kind: ar, tokens: 256, pack_tokens: 128}}\n"
ABLATION = (
    "output: {folder}/cells\nparent: tiny-reasoner-ar\ndevice: {device}\n"
    "stage: {{name: s, kind: diffusion, tokens: 256, pack_tokens: 128}}\nvariants: {{base: {{}}}}\n"
)
COMMANDS = {
    "ask": ["ask", "1 + 2"],
    "generate": ["generate", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "out.jsonl", "--max-tokens", "2"],
    "score": ["score", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "out.jsonl"],
    "eval": ["eval", "tiny-reasoner", "--tasks", "1", "--json", "out.json"],
    "bench decode": ["bench", "decode", "--policy", "tiny-reasoner", "--json", "out.json"],
    "bench planner": ["bench", "planner", "--policy", "tiny-reasoner", "--json", "out.json"],
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*arguments) in an empty directory: exit status and what stderr says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(PROMPT)

    def call(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["blockroll", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_gpu_that_is_not_here_is_one_line(run, tmp_path: Path, name: str) -> None:
    code, said = run(*COMMANDS[name], "--device", "cuda")
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: device: cuda, and torch ") and "sees no GPU here; use cpu" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name, text", [("convert", RECIPE), ("ablate", ABLATION)])
def test_in_a_configuration(run, tmp_path: Path, name: str, text: str) -> None:
    for device, words in (("cuda", "device: cuda, and torch"), ("gpu", "it should be auto, cpu, cuda or cuda:N")):
        (tmp_path / "recipe.yaml").write_text(text.format(folder=tmp_path, device=device))
        code, said = run(name, "recipe.yaml")
        assert code == 2 and said.splitlines()[-1].startswith("error: device: ") and words in said
        assert not (tmp_path / "policy").exists()


def test_a_dtype_of_ones_own(run, tmp_path: Path) -> None:
    """bfloat16 is decoded on the CPU too, and its log-probabilities are not float32's."""
    scores = {}
    for dtype in ("float32", "bfloat16"):
        assert run(*COMMANDS["score"], "--device", "cpu", "--dtype", dtype)[0] == 0
        scores[dtype] = json.loads((tmp_path / "out.jsonl").read_text())["logprobs"]
    assert scores["float32"] != scores["bfloat16"] == pytest.approx(scores["float32"], rel=0.05)
    assert run(*COMMANDS["generate"], "--device", "cpu", "--dtype", "bfloat16")[0] == 0
    code, said = run(*COMMANDS["ask"], "--dtype", "int8")
    assert code == 2 and said.startswith("error: dtype: unknown dtype 'int8'")
