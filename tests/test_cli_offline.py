"""`blockroll generate` and `blockroll score`: the lines that scripts rely on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ZayaConfig, ZayaForCausalLM

import blockroll
from blockroll import cli
from blockroll.model.policy import Policy
from blockroll.model.tokenizer import BOS, EOS, MASK, PAD, train_tokenizer
from blockroll.rollout.conversion import ablation
from blockroll.rollout.engine import EngineConfig
from blockroll.rollout.evaluation.options import Options
from blockroll.rollout.schedule import Schedule

KEYS = ["id", "sample", "prompt_tokens", "tokens", "text", "logprobs", "behavior_logprobs", "versions",
        "finish_reason", "forwards", "trace"]
LONGEST = 128


def small_config(vocabulary: int) -> ZayaConfig:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    return ZayaConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_experts=2, moe_intermediate_size=16, router_hidden_size=8, max_position_embeddings=LONGEST,
        rope_parameters={"hybrid": rope, "hybrid_sliding": rope},
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random policy, sharp enough that samplers and seeds make a difference."""
    tokenizer = train_tokenizer(["12 + 30 = 42", "what is seven"], 280)
    config = small_config(len(tokenizer))
    config.diffusion = {"block_size": 8, "mask_token_id": MASK}
    made = Policy(config).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.model.embed_tokens.weight.mul_(8)
    made.tokenizer = tokenizer
    return Path(blockroll.save_policy(made, tmp_path_factory.mktemp("policy") / "small"))


@pytest.fixture(scope="module")
def never_converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory written by transformers: no diffusion section, no tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("hf") / "model"
    ZayaForCausalLM(small_config(50)).save_pretrained(directory)
    return directory


def run(*arguments: object) -> int:
    argv, sys.argv = sys.argv, ["blockroll", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = argv
    return ended.value.code if isinstance(ended.value.code, int) else 0


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def generate(policy: Path, folder: Path, records: list[dict[str, Any]], *options: object) -> list[dict[str, Any]]:
    source, output = write(folder / "in.jsonl", records), folder / "out.jsonl"
    assert run("generate", "--policy", policy, "--input", source, "--output", output, *options) == 0
    return read(output)


def refused(command: str, policy: Path, folder: Path, text: str) -> bool:
    """Whether a command exits with 2 and writes nothing when its input file holds `text`."""
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text(text)
    return run(command, "--policy", policy, "--input", source, "--output", output) == 2 and not output.exists()


PROMPTS: list[dict[str, Any]] = [
    {"id": "b", "prompt": "12 + 30"},
    {"id": "a", "prompt_tokens": [BOS, 20, 30, 40]},
    {"id": 7, "prompt": "what is 9", "seed": 5},
]


def test_lines_and_their_order(policy: Path, tmp_path: Path) -> None:
    lines = generate(policy, tmp_path, PROMPTS, "--n", 3, "--max-tokens", 11, "--batch", 2)
    assert [(line["id"], line["sample"]) for line in lines] == [(i, s) for i in ("b", "a", 7) for s in range(3)]
    tokenizer = blockroll.load_policy(policy).tokenizer
    for line in lines:
        assert list(line) == KEYS
        count = len(line["tokens"])
        assert 1 <= count <= 11
        assert len(line["logprobs"]) == len(line["behavior_logprobs"]) == len(line["versions"]) == count
        assert line["text"] == tokenizer.decode(line["tokens"], skip_special_tokens=True)
        assert line["finish_reason"] == ("stop" if line["tokens"][-1] == EOS else "length")
        assert line["forwards"] >= 1
    assert lines[3]["prompt_tokens"] == [BOS, 20, 30, 40]
    assert lines[0]["prompt_tokens"][0] == BOS
    assert [os.path.basename(path) for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("sampler", ["ar", "lossless", "coupled", "mixed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_score_recomputes_the_engine_s_logprobs(
    policy: Path, tmp_path: Path, sampler: str, temperature: float
) -> None:
    lines = generate(policy, tmp_path, PROMPTS, "--sampler", sampler, "--temperature", temperature, "--n", 2,
                     "--max-tokens", 20)
    scores = tmp_path / "scores.jsonl"
    assert run("score", "--policy", policy, "--input", tmp_path / "out.jsonl", "--output", scores,
               "--temperature", temperature) == 0
    for line, scored in zip(lines, read(scores), strict=True):
        assert list(scored) == ["id", "sample", "prompt_tokens", "tokens", "logprobs"]
        logprobs = scored.pop("logprobs")
        assert scored == {key: line[key] for key in scored}
        assert np.abs(np.subtract(line["logprobs"], logprobs)).max() <= 1e-5


def test_coupled_is_ar_for_every_schedule(policy: Path, tmp_path: Path) -> None:
    expected = [line["tokens"] for line in generate(policy, tmp_path, PROMPTS, "--sampler", "ar", "--n", 2)]
    for options in (["--schedule", "two_pass"], ["--levels", "0,3", "--block-size", 4], ["--schedule", "ar"]):
        lines = generate(policy, tmp_path, PROMPTS, "--sampler", "coupled", "--n", 2, *options)
        assert [line["tokens"] for line in lines] == expected


def test_defaults_are_the_policy_s_and_the_engine_s(policy: Path, tmp_path: Path) -> None:
    """Block size 8, which the policy was converted for, and the levels of `Schedule`, everywhere."""
    mine = generate(policy, tmp_path, PROMPTS, "--n", 4)
    assert generate(policy, tmp_path, PROMPTS, "--n", 4, "--block-size", 8, "--levels", "0,4,8") == mine
    assert generate(policy, tmp_path, PROMPTS, "--n", 4, "--block-size", 16) != mine
    assert Schedule().levels == EngineConfig().schedule.levels == Options().levels == ablation.Decoding().levels == (0, 4, 8)


def test_seeds(policy: Path, tmp_path: Path) -> None:
    """A line's samples depend on its id, the options and its own seed, not on where it stands."""
    same = {"prompt_tokens": [BOS, 20, 30]}
    records = [{"id": "a", **same}, {"id": "b", **same}, {"id": "c", "seed": 3, **same}, {"id": "d", "seed": 3, **same}]

    def tokens(records: list[dict[str, Any]], *options: object) -> dict[str, list[int]]:
        lines = generate(policy, tmp_path, records, "--max-tokens", 12, *options)
        return {line["id"]: line["tokens"] for line in lines}

    first = tokens(records)
    assert first["a"] != first["b"]
    assert first["c"] == first["d"]
    assert tokens(records[::-1], "--batch", 1) == first
    params = blockroll.SamplingParams(max_tokens=12)
    request = blockroll.RolloutRequest("a", (BOS, 20, 30), params)
    assert blockroll.Engine(blockroll.load_policy(policy)).rollout([request])[0].tokens == first["a"]
    other = tokens(records, "--seed", 1)
    assert other["c"] == first["c"]
    assert other["a"] != first["a"]


def test_directory_of_transformers_without_tokenizer(never_converted: Path, tmp_path: Path) -> None:
    records = [{"id": "a", "prompt_tokens": [1, 2, 3]}]
    expected = generate(never_converted, tmp_path, records, "--sampler", "ar", "--max-tokens", 16)
    lines = generate(never_converted, tmp_path, records, "--sampler", "coupled", "--max-tokens", 16)
    assert [line["text"] for line in lines] == [None]
    assert lines[0]["tokens"] == expected[0]["tokens"]
    assert run("score", "--policy", never_converted, "--input", tmp_path / "out.jsonl",
               "--output", tmp_path / "s.jsonl") == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id"', "line 2: not valid JSON"),
        ("[1]", "line 1: a JSON array, not an object"),
        ('{"prompt": "x"}', "line 1: id: missing"),
        ('{"id": [], "prompt": "x"}', "line 1: id: [] is not a name"),
        ('{"id": "1", "prompt": "x"}\n\n{"id": 1, "prompt": "y"}', "line 3: id: 1 stands on an earlier line too"),
        ('{"id": "a"}', "line 1: prompt: missing; give one of prompt and prompt_tokens"),
        ('{"id": "a", "prompt": "x", "prompt_tokens": [1]}', "line 1: prompt: given twice"),
        ('{"id": "a", "prompt": ""}', "line 1: prompt: empty"),
        ('{"id": "a", "prompt": 3}', "line 1: prompt: 3 is not text"),
        ('{"id": "a", "prompt_tokens": []}', "line 1: prompt_tokens: empty"),
        ('{"id": "a", "prompt_tokens": [1.5]}', "line 1: prompt_tokens: not a list of whole numbers"),
        ('{"id": "a", "prompt_tokens": [true]}', "line 1: prompt_tokens: not a list of whole numbers"),
        ('{"id": "a", "prompt_tokens": [-1]}', "line 1: prompt_tokens: token id -1 is not in the policy's vocabulary"),
        ('{"id": "a", "prompt_tokens": [999]}', "line 1: prompt_tokens: token id 999 is not in"),
        ('{"id": "a", "prompt": "x", "seed": "1"}', 'line 1: seed: "1" is not a seed'),
        ('{"id": "a", "prompt": "x", "seed": -1}', "line 1: seed: -1 is not a seed"),
        (json.dumps({"id": "a", "prompt_tokens": [5] * LONGEST}), "line 1: prompt_tokens: 128 tokens, and this policy's"
         " maximum is 128, one to follow included; shorten it to 127"),
        ("", "in.jsonl: holds no lines"),
    ],
)
def test_bad_lines_of_generate(
    policy: Path, tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("generate", policy, tmp_path, text)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'in.jsonl'}")
    assert said in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt_tokens": [1]}', "line 1: tokens: not a list of whole numbers"),
        ('{"prompt_tokens": [], "tokens": [1]}', "line 1: prompt_tokens: empty"),
        ('{"prompt_tokens": [1], "tokens": [999]}', "line 1: tokens: token id 999"),
        (json.dumps({"prompt_tokens": [5], "tokens": [5] * LONGEST}), "line 1: tokens: 129 tokens"),
    ],
)
def test_bad_lines_of_score(
    policy: Path, tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused("score", policy, tmp_path, text)
    assert said in capsys.readouterr().err


def test_text_needs_a_tokenizer(never_converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}])
    assert run("generate", "--policy", never_converted, "--input", source, "--output", tmp_path / "o") == 2
    assert "line 1: prompt: this policy's directory has no tokenizer; give token ids" in capsys.readouterr().err


def test_scores_of_nothing_and_of_a_full_length(policy: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [
        {"prompt_tokens": [1, 5], "tokens": []},
        {"prompt_tokens": [1], "tokens": [5] * (LONGEST - 1), "id": "x"},
    ])
    assert run("score", "--policy", policy, "--input", source, "--output", tmp_path / "o") == 0
    empty, full = read(tmp_path / "o")
    assert empty == {"prompt_tokens": [1, 5], "tokens": [], "logprobs": []}
    assert len(full["logprobs"]) == LONGEST - 1


def test_missing_tensor(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(policy, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    source = write(tmp_path / "in.jsonl", PROMPTS)
    assert run("generate", "--policy", broken, "--input", source, "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: policy: {broken} lacks 1 of the policy's tensors, first 'model.norm.weight'; ")
    assert error.count("\n") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_leaves_no_output(
    policy: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", PROMPTS)
    arguments = ["--policy", policy, "--input", source, "--output", small_disk / "out.jsonl"]
    assert run("generate", *arguments, "--n", 8, "--max-tokens", 32) == 2
    assert "out.jsonl: the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(small_disk) == []


def test_ask_answers_a_question_and_generate_takes_vllm_s_parameters(
    tmp_path: Path, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("ask", "47 + 85 - 12 = ?") == 0
    assert capsys.readouterr().out == "85+47:12,13=132;132-12:0,2,1=120\nA:120\n"
    assert run("ask", "47", "--n", "0") == 2
    assert "n: 0 is no whole number" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "12 + 30"}\n')
    common = ["generate", "--policy", str(policy), "--input", str(tmp_path / "in.jsonl"), "--max-tokens", "40"]
    assert run(*common, "--output", str(tmp_path / "free")) == 0
    text = json.loads((tmp_path / "free").read_text())["text"]
    assert len(text) > 8
    options = ["--stop", "never", "--stop", text[4:6], "--logprobs", "2"]
    assert run(*common, *options, "--output", str(tmp_path / "cut")) == 0
    line = json.loads((tmp_path / "cut").read_text())
    assert line["text"] == text[: text.index(text[4:6])]
    assert len(line["top_tokens"]) == len(line["top_logprobs"]) == len(line["tokens"])
    assert len(line["top_tokens"][0]) == 2
