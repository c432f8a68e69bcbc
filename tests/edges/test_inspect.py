"""`blockroll inspect`: places that hold no run, lines that are no samples, pages that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Case, File, ForkServer, fifo, folder, link_to, sparse

LINE = json.dumps({"id": "a", "prompt_tokens": [1], "tokens": [20, 30]}) + "\n"


def run(name: str, content: File, *says: str, options: tuple[str, ...] = (), **more) -> Case:
    return Case(f"inspect {name}", ("inspect", "in.jsonl", *options), {"in.jsonl": content, **more}, says=says)


CASES = [
    run("an empty file", "", "in.jsonl", "holds no samples"),
    run("a directory without rollouts", folder, "in.jsonl", "rollouts.jsonl", "blockroll generate"),
    run("a pipe", fifo, "in.jsonl", "pipe"),
    run("an endless file", link_to("/dev/zero"), "in.jsonl", "device"),
    run("a sparse file of 100 GB", sparse(100 << 30), "in.jsonl line 1", "longer than"),
    run("bytes", b"\xff\xfe\x00\n", "in.jsonl line 1", "not valid JSON"),
    run("a list", "[1]\n", "in.jsonl line 1", "array"),
    run("deep nesting", "[" * 100_000 + "\n", "in.jsonl line 1", "not valid JSON"),
    run("NaN", '{"tokens": [1], "logprobs": [NaN]}\n', "in.jsonl line 1", "not valid JSON"),
    run("a trace that does not fit", LINE + '{"tokens": [1], "trace": [[0, 0, 0, 0, 0, 0]]}\n', "in.jsonl line 2: trace"),
    run("a page on top of the file", LINE, "two files", options=("--output", "in.jsonl")),
    run("a page in place of a directory", LINE, "out", "directory", options=("--output", "out"), out=folder),
    run("no sample", LINE, "most", "0", options=("--most", "0")),
    run("another policy's tokens", '{"prompt_tokens": [1], "tokens": [9999], "logprobs": [-1]}\n', "tokens: sequence 0", "0..273",
        options=("--policy", "tiny-reasoner", "--entropy")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inspect(case: Case, edges: ForkServer, tmp_path: Path) -> None:
    edges.check(case, tmp_path)


def test_a_page_is_made_of_odd_names(edges: ForkServer, tmp_path: Path) -> None:
    record = {"id": "</script>" * 50, "tokens": [20], "finish_reason": "\u2028<!--", "text": "\x00"}
    outcome = edges.run(Case("odd", ("inspect", "in.jsonl"), {"in.jsonl": json.dumps(record) + "\n"}), tmp_path)
    assert (outcome.status, outcome.appeared) == (0, ("in.html",)), outcome
    assert (tmp_path / "case" / "in.html").read_text().count("</script>") == 2
