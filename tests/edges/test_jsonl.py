"""JSON lines, as prompts, as samples to score and as documents to train on: refused before any token is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Case, File, ForkServer, fifo, folder, link_to, sparse

GENERATE = ("generate", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "out.jsonl", "--max-tokens", "4")
SCORE = ("score", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "out.jsonl")
GOOD = '{"id": "good", "prompt_tokens": [1, 20, 30]}\n'
DIGITS = "9" * 5000


def prompts(name: str, content: File, *says: str, **limits: float) -> Case:
    return Case(f"prompts: {name}", GENERATE, {"in.jsonl": content}, says=says)


def line(name: str, text: str | bytes, *says: str) -> Case:
    """A second line that is not what a prompt is."""
    raw = text if isinstance(text, bytes) else text.encode()
    return prompts(name, GOOD.encode() + raw + b"\n", "in.jsonl line 2", *says)


def samples(name: str, content: File, *says: str) -> Case:
    return Case(f"samples: {name}", SCORE, {"in.jsonl": content}, says=says)


def sample(name: str, text: str, *says: str) -> Case:
    return samples(name, '{"prompt_tokens": [1], "tokens": [5]}\n' + text + "\n", "in.jsonl line 2", *says)


RECIPE = """
output: out
parent: tiny-reasoner-ar
data: {pool: 4, sources: [{kind: KIND, paths: [in.jsonl]MORE}]}
stages: [{name: s, kind: diffusion, tokens: 100, pack_tokens: 256}]
"""


def documents(name: str, content: File, *says: str, kind: str = "jsonl", more: str = "") -> Case:
    files = {"in.jsonl": content, "run.yaml": RECIPE.replace("KIND", kind).replace("MORE", more)}
    return Case(f"documents: {name}", ("convert", "run.yaml"), files, says=says)


CASES = [
    prompts("empty file", "", "in.jsonl", "holds no lines", "write one"),
    prompts("blank lines", "\n \n\t\n", "in.jsonl", "holds no lines"),
    prompts("a directory", folder, "in.jsonl", "directory", "check the path"),
    prompts("a dangling link", link_to("none"), "in.jsonl", "No such file"),
    prompts("a link to itself", link_to("in.jsonl"), "in.jsonl", "symbolic links"),
    prompts("a pipe that nobody writes to", fifo, "in.jsonl", "nobody writes", "2 s"),
    prompts("an endless file", link_to("/dev/zero"), "in.jsonl", "device"),
    prompts("a sparse file of 100 GB", sparse(100 << 30), "in.jsonl line 1", "longer than", "shorten"),
    prompts("a text of 10 MB", json.dumps({"id": "a", "prompt": "12+3 " * 2_000_000}), "in.jsonl line 1", "longer than"),
    prompts("a text of 1 MB", json.dumps({"id": "a", "prompt": "12+3 " * 200_000}), "line 1: prompt:", "1000000", "512", "511"),
    prompts("a million tokens", json.dumps({"id": "a", "prompt_tokens": [1] * 300_000}), "prompt_tokens:", "300000", "511"),
    prompts("a text of spaces", json.dumps({"id": "a", "prompt": " " * 900_000}), "line 1: prompt:", "900000", "511"),
    prompts("511 tokens and one", json.dumps({"id": "a", "prompt_tokens": [1] * 512}), "prompt_tokens:", "512", "511"),
    line("not JSON", "{", "not valid JSON", "write one JSON object"),
    line("a list", "[1]", "array", "object"),
    line("a number", "7", "number"),
    line("null", "null", "null"),
    line("two objects", "{} {}", "Extra data"),
    line("bytes", b'{"id": "\xff"}', "not valid JSON", "start byte"),
    line("NUL bytes", b'{"id": "a\x00"}', "not valid JSON"),
    line("nested", '{"id": ' + "[" * 100_000, "nested too deeply"),
    line("NaN as id", '{"id": NaN, "prompt_tokens": [1]}', "NaN"),
    line("infinity as id", '{"id": -Infinity, "prompt_tokens": [1]}', "-Infinity"),
    line("1e999 as id", '{"id": 1e999, "prompt_tokens": [1]}', "id:", "Infinity", "whole number"),
    line("NaN as seed", '{"id": "b", "prompt_tokens": [1], "seed": NaN}', "NaN"),
    line("NaN somewhere else", '{"id": "b", "prompt_tokens": [1], "reward": NaN}', "NaN"),
    line("id missing", '{"prompt_tokens": [1]}', "id:", "missing"),
    line("id is null", '{"id": null, "prompt_tokens": [1]}', "id:", "missing"),
    line("id is empty", '{"id": "", "prompt_tokens": [1]}', "id:", '""'),
    line("id is true", '{"id": true, "prompt_tokens": [1]}', "id:", "true"),
    line("id is a fraction", '{"id": 1.5, "prompt_tokens": [1]}', "id:", "1.5"),
    line("id is a list", '{"id": [1], "prompt_tokens": [1]}', "id:", "[1]"),
    line("id of 5,000 digits", '{"id": ' + DIGITS + ', "prompt_tokens": [1]}', "too many digits"),
    line("id of 4,000 digits", '{"id": ' + DIGITS[:4000] + ', "prompt_tokens": [1]}', "id:", "999", "1024"),
    line("id of 5,000 characters", '{"id": "%s", "prompt_tokens": [1]}' % ("x" * 5000), "id:", "xxx", "1024"),
    line("id twice", GOOD.strip(), "id:", '"good"', "earlier line"),
    prompts("id twice, as text and number", '{"id": 7, "prompt_tokens": [1]}\n{"id": "7", "prompt_tokens": [1]}\n',
            "line 2", "id:", '"7"', "earlier"),
    line("lone surrogate in a prompt", '{"id": "b", "prompt": "\\ud800"}', "surrogate", "\\ud800"),
    line("lone surrogate in an id", '{"id": "\\udc00", "prompt_tokens": [1]}', "surrogate", "\\udc00"),
    line("lone surrogate as bytes", b'{"id": "\xed\xa0\x80", "prompt_tokens": [1]}', "not valid JSON", "continuation byte"),
    line("UTF-16", GOOD.encode("utf-16"), "not valid JSON"),
    line("lone surrogate in a key", '{"id": "b", "prompt_tokens": [1], "\\udfff": 1}', "surrogate"),
    line("seed is negative", '{"id": "b", "prompt_tokens": [1], "seed": -1}', "seed:", "-1"),
    line("seed of 2**63", '{"id": "b", "prompt_tokens": [1], "seed": 9223372036854775808}', "seed:", "9223372036854775808"),
    line("seed is text", '{"id": "b", "prompt_tokens": [1], "seed": "7"}', "seed:", '"7"'),
    line("seed is true", '{"id": "b", "prompt_tokens": [1], "seed": true}', "seed:", "true"),
    line("no prompt", '{"id": "b"}', "prompt:", "missing"),
    line("two prompts", '{"id": "b", "prompt": "x", "prompt_tokens": [1]}', "prompt:", "twice"),
    line("empty text", '{"id": "b", "prompt": ""}', "prompt:", "empty"),
    line("prompt is a number", '{"id": "b", "prompt": 7}', "prompt:", "7", "text"),
    line("prompt is a list", '{"id": "b", "prompt": ["x"]}', "prompt:", "text"),
    line("empty tokens", '{"id": "b", "prompt_tokens": []}', "prompt_tokens:", "empty"),
    line("tokens are text", '{"id": "b", "prompt_tokens": "1 2"}', "prompt_tokens:", "whole numbers"),
    line("tokens are fractions", '{"id": "b", "prompt_tokens": [1.0]}', "prompt_tokens:", "whole numbers"),
    line("tokens are booleans", '{"id": "b", "prompt_tokens": [true]}', "prompt_tokens:", "whole numbers"),
    line("tokens are nested", '{"id": "b", "prompt_tokens": [[1]]}', "prompt_tokens:", "whole numbers"),
    line("token is negative", '{"id": "b", "prompt_tokens": [-1]}', "prompt_tokens:", "-1", "from 0"),
    line("token beyond the vocabulary", '{"id": "b", "prompt_tokens": [99999]}', "prompt_tokens:", "99999", "from 0"),
    line("token of 4,000 digits", '{"id": "b", "prompt_tokens": [' + DIGITS[:4000] + ']}', "prompt_tokens:", "999"),
    sample("not JSON", "{", "not valid JSON"),
    sample("NaN as id", '{"id": NaN, "prompt_tokens": [1], "tokens": [5]}', "NaN"),
    sample("infinity as sample", '{"id": 1, "sample": Infinity, "prompt_tokens": [1], "tokens": [5]}', "Infinity"),
    sample("1e999 as id", '{"id": 1e999, "prompt_tokens": [1], "tokens": [5]}', "id:", "Infinity"),
    sample("1e999 as sample", '{"sample": 1e999, "prompt_tokens": [1], "tokens": [5]}', "sample:", "Infinity"),
    sample("sample is a list", '{"sample": [1], "prompt_tokens": [1], "tokens": [5]}', "sample:", "[1]"),
    sample("lone surrogate as id", '{"id": "\\ud812", "prompt_tokens": [1], "tokens": [5]}', "surrogate"),
    sample("no prompt", '{"tokens": [5]}', "prompt_tokens:"),
    sample("empty prompt", '{"prompt_tokens": [], "tokens": [5]}', "prompt_tokens:", "empty"),
    sample("no tokens", '{"prompt_tokens": [1]}', "tokens:"),
    sample("tokens are null", '{"prompt_tokens": [1], "tokens": null}', "tokens:"),
    sample("tokens are text", '{"prompt_tokens": [1], "tokens": "5"}', "tokens:"),
    sample("token beyond the vocabulary", '{"prompt_tokens": [1], "tokens": [99999]}', "tokens:", "99999"),
    sample("too many tokens", json.dumps({"prompt_tokens": [1], "tokens": [5] * 600}), "tokens:", "601", "512"),
    samples("a line of 10 MB", json.dumps({"prompt_tokens": [1], "tokens": [5], "text": "x" * 10_000_000}), "line 1", "longer"),
    samples("empty file", "", "in.jsonl", "holds no lines"),
    samples("an endless file", link_to("/dev/zero"), "in.jsonl", "device"),
    samples("a pipe that nobody writes to", fifo, "in.jsonl", "nobody writes"),
    documents("none", "", "in.jsonl", "no records"),
    documents("a pipe", fifo, "in.jsonl", "pipe"),
    documents("an endless file", link_to("/dev/zero"), "in.jsonl", "device"),
    documents("an endless line", sparse(100 << 30), "in.jsonl line 1", "longer"),
    documents("not JSON", '{"text": "a"}\n{\n', "in.jsonl line 2", "not valid JSON"),
    documents("a list", "[1]\n", "in.jsonl line 1", "array"),
    documents("nested", "[" * 100_000, "in.jsonl line 1", "nested too deeply"),
    documents("no field", '{"txt": "a"}\n', "in.jsonl line 1", "'text'", "columns"),
    documents("text is a number", '{"text": 3}\n', "in.jsonl line 1", "'text'", "3"),
    documents("text is empty", '{"text": " "}\n', "in.jsonl line 1", "'text'", "empty"),
    documents("lone surrogate", '{"text": "\\ud800"}\n', "in.jsonl line 1", "surrogate"),
    documents("a document too long", json.dumps({"text": "12+3 " * 2000}), "in.jsonl line 1", "256", "too_long"),
    documents("NaN as token", '{"prompt_tokens": [1], "tokens": [NaN]}\n', "in.jsonl line 1", "NaN", kind="rollouts"),
    documents("empty tokens", '{"prompt_tokens": [1], "tokens": []}\n', "line 1", "'tokens'", "empty", kind="rollouts"),
    documents("true as token", '{"prompt_tokens": [1], "tokens": [true]}\n', "line 1", "'tokens'", kind="rollouts"),
    documents("token beyond", '{"prompt_tokens": [1], "tokens": [99999]}\n', "line 1", "'tokens'", kind="rollouts"),
    documents("message without a role", '{"messages": [{"content": "a"}]}\n', "line 1", "role", more=", format: messages"),
    documents("messages are text", '{"messages": "a"}\n', "line 1", "'messages'", more=", format: messages"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lines(case: Case, edges: ForkServer, tmp_path: Path) -> None:
    edges.check(case, tmp_path)


def test_a_pipe_and_the_standard_input_are_read(edges: ForkServer, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": i, "prompt_tokens": [1, 20, 30]}) + "\n" for i in range(3))
    arguments = (*GENERATE[:4], "/dev/stdin", *GENERATE[5:])
    case = Case("standard input", arguments, stdin=lines.encode(), status=0, makes=("out.jsonl",), seconds=60.0)
    edges.check(case, tmp_path)
    out = (tmp_path / "case" / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in out] == [0, 1, 2]
    program = """
import os, sys, threading
os.mkfifo("pipe")
write = lambda: open("pipe", "w").write('{"id": "a", "prompt_tokens": [1, 20, 30]}\\n')
threading.Thread(target=write).start()
from blockroll.rollout.offline import generate_file
from blockroll import SamplingParams
generate_file("tiny-reasoner", "pipe", "out.jsonl", params=SamplingParams(max_tokens=4))
"""
    (tmp_path / "pipe").mkdir()
    edges.check(Case("pipe", program=program, status=0, makes=("pipe", "out.jsonl"), seconds=60.0), tmp_path / "pipe")
