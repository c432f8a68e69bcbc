"""`blockroll sample`: where prompts come from, what is written, and what it says at the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from blockroll import cli

SHORT = ("--samples", "3", "--max-tokens", "64", "--sampler", "coupled", "--device", "cpu")


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """sample(arguments) -> (standard output, standard error)"""

    def run(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["blockroll", "sample", "tiny-reasoner", *SHORT, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out, err

    return run


def test_one_question_to_standard_output(sample) -> None:
    out, err = sample("--prompt", "47 + 85 - 12", "--questions", "--candidates")
    (line,) = map(json.loads, out.splitlines())
    assert (line["id"], line["method"], line["answer"]) == ("0", "majority", "120")
    assert line["text"].endswith("A:120") and line["votes"]["120"] >= 2
    assert [set(c) for c in line["candidates"]] == [{"text", "answer", "tokens", "logprob", "score"}] * 3
    assert line["spent"]["samples"] == 3 and line["spent"]["tokens"] == sum(c["tokens"] for c in line["candidates"])
    assert set(line["spent"]) == {"tokens", "forwards", "seconds", "samples", "cancelled"}
    assert "majority: 1 questions, 1 answered; per question 3.0 samples" in err


def test_files_in_their_order_and_tasks_with_what_was_right(sample, tmp_path: Path) -> None:
    text, lines = tmp_path / "in.txt", tmp_path / "in.jsonl"
    text.write_text("7 * 8\n\n12 + 30\n")
    lines.write_text('{"id": "b", "prompt": "Q:7*8\\nS:"}\n{"id": "a", "prompt_tokens": [1, 20, 30]}\n')
    found = {}
    for name, source in (("text", text), ("jsonl", lines)):
        out, _ = sample("--input", source, "--output", tmp_path / name, *(["--questions"] if name == "text" else []))
        assert out.startswith("majority: 2 questions")
        found[name] = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    assert [line["id"] for line in found["jsonl"]] == ["b", "a"] and [line["id"] for line in found["text"]] == ["0", "1"]
    assert found["text"][0]["answer"] == "56"
    out, _ = sample("--tasks", 3, "--output", tmp_path / "tasks", "--method", "best_of_n", "--scorer", "verifier")
    judged = [json.loads(line) for line in (tmp_path / "tasks").read_text().splitlines()]
    assert [type(line["right"]) for line in judged] == [bool] * 3
    assert [line["right"] for line in judged] == [line["score"] == 1.0 for line in judged]
    assert f"{sum(line['right'] for line in judged) / 3:.3f} right" in out
