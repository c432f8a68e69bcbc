"""The stage files of `configs/conversion`, and runs made of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conversion_parts import SHAPE, curve

import blockroll
from blockroll.model.conversion.config import ConversionConfig, JsonLines, Parquet
from blockroll.model.conversion.train import run, stage_directory
from blockroll.settings import load_yaml

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "conversion"


def test_zaya1_8b_runs_the_published_stages() -> None:
    config = load_yaml(CONFIGS / "zaya1-8b.yaml", ConversionConfig)
    assert [(stage.name, stage.tokens) for stage in config.runs][:2] == [
        ("convert_32k", 600_000_000_000), ("extend_128k", 500_000_000_000),
    ]  # fmt: skip
    convert, extend, sft = config.runs
    assert convert.pack_tokens == 2**15 and extend.pack_tokens > 100_000
    assert isinstance(config.data.sources[0], Parquet) and sft.data is not None
    assert isinstance(sft.data.sources[0], JsonLines) and sft.data.sources[0].format == "messages"
    for stage in config.runs:
        assert stage.activation_checkpointing and stage.packs_per_step % config.launcher.workers == 0


@pytest.mark.parametrize("name", ["tiny.yaml", "tiny-reasoner.yaml"])
def test_other_runs_are_valid(name: str) -> None:
    assert load_yaml(CONFIGS / name, ConversionConfig).runs


def write_documents(folder: Path) -> None:
    """Counting, as text in two JSON-lines files, as questions and answers in Parquet, and as conversations."""
    draw = random.Random(0)

    def count() -> tuple[str, str]:
        start = draw.randrange(50)
        return f"count from {start}", " ".join(map(str, range(start, start + draw.randrange(4, 16))))

    for part in range(2):
        lines = [json.dumps({"text": "{}: {}".format(*count())}) for _ in range(60)]
        (folder / f"text-{part}.jsonl").write_text("\n".join(lines))
    pairs = [count() for _ in range(80)]
    table = pyarrow.table({"question": [p for p, _ in pairs], "answer": [a for _, a in pairs]})
    pyarrow.parquet.write_table(table, folder / "pairs.parquet", row_group_size=16)
    with open(folder / "chats.jsonl", "w") as file:
        for _ in range(60):
            turns = [{"role": role, "content": text} for _ in range(2) for role, text in zip(("user", "assistant"), count())]
            file.write(json.dumps({"messages": turns}) + "\n")


RUN = """
output: {folder}/policy
architecture: {shape}
block_size: 8
data: {{pool: 16, sources: [{{kind: jsonl, paths: ['{folder}/text-*.jsonl']}}]}}
stages:
  - <<: !include {configs}/tiny/convert.yaml
    tokens: 12000
    learning_rate: 1e-2
  - <<: !include {configs}/tiny/extend.yaml
    tokens: 12000
    learning_rate: 1e-2
    data:
      pool: 16
      sources:
        - kind: parquet
          paths: ['{folder}/pairs.parquet']
          format: completion
          columns: {{prompt: question, completion: answer}}
        - {{kind: jsonl, paths: ['{folder}/text-*.jsonl'], weight: 0.5}}
  - <<: !include {configs}/tiny/sft.yaml
    tokens: {sft}
    data: {{pool: 16, sources: [{{kind: jsonl, paths: ['{folder}/chats.jsonl'], format: messages}}]}}
"""


def test_three_stages_from_text_parquet_and_conversations(tmp_path: Path) -> None:
    write_documents(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(folder=tmp_path, shape=json.dumps(SHAPE), configs=CONFIGS, sft=4000))
    config = load_yaml(path, ConversionConfig)
    run(config)
    rows = curve(tmp_path)
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["convert", "extend", "sft"]
    assert all(rows[-1][name] < 0.8 * rows[0][name] for name in ("ar_loss", "draft_loss"))
    for stage in config.runs:
        assert blockroll.load_policy(stage_directory(config, stage.name)).converted
    policy = blockroll.load_policy(tmp_path / "policy")
    params = blockroll.SamplingParams(sampler="lossless", max_tokens=12)
    prompt = tuple(policy.tokenizer.encode("user: count from 3\nassistant: "))
    request = blockroll.RolloutRequest(id="a", prompt_tokens=prompt, params=params, seed=0)
    assert len(blockroll.Engine(policy).rollout([request])[0].tokens) >= 1

    # A stage is run again alone; those before it stay as they are.
    kept = (tmp_path / "policy.extend" / "model.safetensors").read_bytes()
    for file in (tmp_path / "policy.sft").iterdir():
        file.unlink()
    path.write_text(RUN.format(folder=tmp_path, shape=json.dumps(SHAPE), configs=CONFIGS, sft=2000))
    again: list[str] = []
    run(load_yaml(path, ConversionConfig), lambda row: again.append(row["stage"]))
    assert set(again) == {"sft"}
    assert (tmp_path / "policy.extend" / "model.safetensors").read_bytes() == kept
