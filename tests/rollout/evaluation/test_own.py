"""`blockroll eval` on tasks and documents of one's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockroll.model.checkpoint import save_policy
from blockroll.model.conversion.config import ConversionConfig
from blockroll.model.conversion.data.documents import answer_document, chat_document, text_document
from blockroll.model.policy import Policy
from blockroll.model.tasks.own_config import TaskSource
from blockroll.rollout.conversion.convert import convert
from blockroll.rollout.evaluation.documents import Documents, document_loss, read_documents
from blockroll.rollout.evaluation.options import Options
from blockroll.rollout.evaluation.report import evaluate_policy
from blockroll.settings import parse

OPTIONS = Options(tasks=50, samples=3, k=(1, 3), samplers=("lossless",), temperatures=(1.0,), block_sizes=(8,), max_tokens=12,
                  documents=20, batch=16)  # fmt: skip
REWARD = """
def reward(completion, completion_ids, level):
    return None if level == 0 else len(completion_ids) / 4 - level
"""


@pytest.fixture
def place(tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a policy, 24 tasks of two kinds, a reward and documents."""
    save_policy(policy, tmp_path / "policy")
    rows = [{"prompt": f"Q:{i}+1\nS:", "level": i % 3, "kind": "ab"[i % 2], "worked": f"{i}+1={i + 1}"} for i in range(24)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval_reward.py").write_text(REWARD)
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": f"{i} and {i + 1}" * (1 + i)}) + "\n" for i in range(30)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_figures_are_of_the_rewards(place: Path) -> None:
    values = {"paths": ["tasks.jsonl"], "heldout_share": 1.0, "family": "kind", "completion": "worked", "right": 0.5,
              "reward": {"function": "eval_reward:reward", "batched": False}}  # fmt: skip
    files = parse({"documents": {"kind": "jsonl", "paths": ["held.jsonl"]}}, Documents, "test").documents
    figures = evaluate_policy("policy", OPTIONS, source=parse(values, TaskSource, "test"), documents=files,
                              json_path="figures.json", card_path="card.md")  # fmt: skip
    assert json.loads(Path("figures.json").read_text()).keys() == figures.keys()
    assert figures["source"] == "own" and figures["tasks"] == 24 and figures["families"] == ["a", "b"]
    ways = {way["name"]: way for way in figures["ways"]}
    for name in ("ar", "lossless"):
        way: dict[str, Any] = ways[name]
        # Levels 1 and 2 count in equal parts, level 0 as 0; at most 12 tokens, which few samples end before.
        assert way["unrewarded"] == 8 * 3 and -1.0 <= way["reward"] <= 1.0
        assert figures["reward"][name]["1.0"] == way["reward"]
        assert 0 < way["pass_at_1"] < 1 and way["pass_at_1"] == pytest.approx(way["pass_at"][1])
        assert set(way["families"]) == {"a", "b"}
    assert figures["unrewarded"] == sum(way["unrewarded"] for way in figures["ways"][:2])
    assert figures["documents"] >= 20 and 4 < figures["document_loss"] < 8 and figures["standard_error"]["document_loss"] > 0
    card = Path("card.md").read_text()
    assert "files of one's own; kinds a, b" in card and "Mean reward: " in card and "held-out documents" in card


def test_the_loss_is_that_of_what_is_learned(place: Path, policy: Policy) -> None:
    """Prompts carry no loss; a document longer than the policy is cut, and its parts' first tokens are not predicted."""
    tokenizer = policy.tokenizer
    said = ("user", "1+1"), ("assistant", "2"), ("user", "2+2"), ("assistant", "four")
    messages = [{"role": role, "content": content} for role, content in said]
    documents = [text_document(tokenizer, "some text"), answer_document(tokenizer, "a prompt", "an answer"),
                 chat_document(tokenizer, messages, "here")]  # fmt: skip
    total = count = 0.0
    for document in documents:
        for start, end in document.spans:
            (logprobs,) = policy.logprobs([document.tokens[:start]], [document.tokens[start:end]])
            total, count = total - float(np.float64(logprobs.sum())), count + end - start
    loss, error = document_loss(policy, documents)
    assert loss == pytest.approx(total / count, rel=1e-5) and math.isfinite(error)
    (place / "long.jsonl").write_text(json.dumps({"text": "7" * 700}) + "\n")
    files = parse({"documents": {"kind": "jsonl", "paths": ["long.jsonl"]}}, Documents, "test").documents
    parts = read_documents(files, policy, 5, 0)
    assert [len(part.tokens) for part in parts] == [256, 256, 190]  # with the beginning and the end of the sequence
    assert sum(b - a for part in parts for a, b in part.spans) == 702 - 3


def test_a_conversion_measures_its_documents(place: Path) -> None:
    stage = {"name": "s", "kind": "diffusion", "tokens": 300, "pack_tokens": 256}
    values = {"output": "made", "parent": "policy", "stages": [stage],
              "data": {"pool": 8}, "evaluation_documents": {"kind": "jsonl", "paths": ["held.jsonl"]}}  # fmt: skip
    parse(values, ConversionConfig, "test")
    Path("run.yaml").write_text(json.dumps(values))
    convert("run.yaml")
    figures = json.loads(Path("made/figures.json").read_text())
    assert figures.keys() == {"documents", "document_loss", "parent_document_loss", "standard_error"}
    assert 4 < figures["parent_document_loss"] < 8 and figures["document_loss"] != figures["parent_document_loss"]
