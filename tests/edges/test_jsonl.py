"""JSON lines, as prompts, as samples to score and as documents to train on: refused before any token is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Case, File, ForkServer, fifo, folder, link_to, sparse, words

GENERATE = ("generate", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "out.jsonl", "--max-tokens", "4")
SCORE = ("score", "--policy", "tiny-reasoner", "--input", "in.jsonl", "--output", "out.jsonl")
GOOD = '{"id": "good", "prompt_tokens": [1, 20, 30]}\n'
DIGITS = "9" * 5000


def prompts(name: str, content: File, *says: str, **limits: float) -> Case:
    return Case(f"prompts: {name}", GENERATE, {"in.jsonl": content}, says=says)


def samples(name: str, content: File, *says: str) -> Case:
    return Case(f"samples: {name}", SCORE, {"in.jsonl": content}, says=says)


RECIPE = """
output: out
parent: tiny-reasoner-ar
data: {pool: 4, sources: [{kind: KIND, paths: [in.jsonl]MORE}]}
stages: [{name: s, kind: diffusion, tokens: 100, pack_tokens: 256}]
"""


def documents(name: str, content: File, *says: str, kind: str = "jsonl", more: str = "") -> Case:
    files = {"in.jsonl": content, "run.yaml": RECIPE.replace("KIND", kind).replace("MORE", more)}
    return Case(f"documents: {name}", ("convert", "run.yaml"), files, says=says)


PROMPT_LINES = {
    "{": "not valid JSON, write one JSON object",
    "[1]": "array, object",
    "7": "number",
    "null": "null",
    "{} {}": "Extra data",
    b'{"id": "\xff"}': "not valid JSON, start byte",
    b'{"id": "a\x00"}': "not valid JSON",
    '{"id": ' + "[" * 100_000: "nested too deeply",
    '{"id": NaN, "prompt_tokens": [1]}': "NaN",
    '{"id": -Infinity, "prompt_tokens": [1]}': "-Infinity",
    '{"id": 1e999, "prompt_tokens": [1]}': "id:, Infinity, whole number",
    '{"id": "b", "prompt_tokens": [1], "seed": NaN}': "NaN",
    '{"id": "b", "prompt_tokens": [1], "reward": NaN}': "NaN",
    '{"prompt_tokens": [1]}': "id:, missing",
    '{"id": null, "prompt_tokens": [1]}': "id:, missing",
    '{"id": "", "prompt_tokens": [1]}': 'id:, ""',
    '{"id": true, "prompt_tokens": [1]}': "id:, true",
    '{"id": 1.5, "prompt_tokens": [1]}': "id:, 1.5",
    '{"id": [1], "prompt_tokens": [1]}': "id:, [1]",
    '{"id": ' + DIGITS + ', "prompt_tokens": [1]}': "too many digits",
    '{"id": ' + DIGITS[:4000] + ', "prompt_tokens": [1]}': "id:, 999, 1024",
    '{"id": "%s", "prompt_tokens": [1]}' % ("x" * 5000): "id:, xxx, 1024",
    GOOD.strip(): 'id:, "good", earlier line',
    '{"id": "b", "prompt": "\\ud800"}': "surrogate, \\ud800",
    '{"id": "\\udc00", "prompt_tokens": [1]}': "surrogate, \\udc00",
    b'{"id": "\xed\xa0\x80", "prompt_tokens": [1]}': "not valid JSON, continuation byte",
    GOOD.encode("utf-16"): "not valid JSON",
    '{"id": "b", "prompt_tokens": [1], "\\udfff": 1}': "surrogate",
    '{"id": "b", "prompt_tokens": [1], "seed": -1}': "seed:, -1",
    '{"id": "b", "prompt_tokens": [1], "seed": 9223372036854775808}': "seed:, 9223372036854775808",
    '{"id": "b", "prompt_tokens": [1], "seed": "7"}': 'seed:, "7"',
    '{"id": "b", "prompt_tokens": [1], "seed": true}': "seed:, true",
    '{"id": "b"}': "prompt:, missing",
    '{"id": "b", "prompt": "x", "prompt_tokens": [1]}': "prompt:, twice",
    '{"id": "b", "prompt": ""}': "prompt:, empty",
    '{"id": "b", "prompt": 7}': "prompt:, 7, text",
    '{"id": "b", "prompt": ["x"]}': "prompt:, text",
    '{"id": "b", "prompt_tokens": []}': "prompt_tokens:, empty",
    '{"id": "b", "prompt_tokens": "1 2"}': "prompt_tokens:, whole numbers",
    '{"id": "b", "prompt_tokens": [1.0]}': "prompt_tokens:, whole numbers",
    '{"id": "b", "prompt_tokens": [true]}': "prompt_tokens:, whole numbers",
    '{"id": "b", "prompt_tokens": [[1]]}': "prompt_tokens:, whole numbers",
    '{"id": "b", "prompt_tokens": [-1]}': "prompt_tokens:, -1, from 0",
    '{"id": "b", "prompt_tokens": [99999]}': "prompt_tokens:, 99999, from 0",
    '{"id": "b", "prompt_tokens": [' + DIGITS[:4000] + ']}': "prompt_tokens:, 999",
}
"""Second lines that are no prompts, and what refuses them."""
SAMPLE_LINES = {
    "{": "not valid JSON",
    '{"id": NaN, "prompt_tokens": [1], "tokens": [5]}': "NaN",
    '{"id": 1, "sample": Infinity, "prompt_tokens": [1], "tokens": [5]}': "Infinity",
    '{"id": 1e999, "prompt_tokens": [1], "tokens": [5]}': "id:, Infinity",
    '{"sample": 1e999, "prompt_tokens": [1], "tokens": [5]}': "sample:, Infinity",
    '{"sample": [1], "prompt_tokens": [1], "tokens": [5]}': "sample:, [1]",
    '{"id": "\\ud812", "prompt_tokens": [1], "tokens": [5]}': "surrogate",
    '{"tokens": [5]}': "prompt_tokens:",
    '{"prompt_tokens": [], "tokens": [5]}': "prompt_tokens:, empty",
    '{"prompt_tokens": [1]}': "tokens:",
    '{"prompt_tokens": [1], "tokens": null}': "tokens:",
    '{"prompt_tokens": [1], "tokens": "5"}': "tokens:",
    '{"prompt_tokens": [1], "tokens": [99999]}': "tokens:, 99999",
    json.dumps({"prompt_tokens": [1], "tokens": [5] * 600}): "tokens:, 601, 512",
}
"""Second lines that are no samples."""
DOCUMENTS = {
    ("jsonl", ""): {
        '{"text": "a"}\n{\n': "in.jsonl line 2, not valid JSON",
        "[1]\n": "in.jsonl line 1, array",
        "[" * 100_000: "in.jsonl line 1, nested too deeply",
        '{"txt": "a"}\n': "in.jsonl line 1, 'text', columns",
        '{"text": 3}\n': "in.jsonl line 1, 'text', 3",
        '{"text": " "}\n': "in.jsonl line 1, 'text', empty",
        '{"text": "\\ud800"}\n': "in.jsonl line 1, surrogate",
    },
    ("rollouts", ""): {
        '{"prompt_tokens": [1], "tokens": [NaN]}\n': "in.jsonl line 1, NaN",
        '{"prompt_tokens": [1], "tokens": []}\n': "line 1, 'tokens', empty",
        '{"prompt_tokens": [1], "tokens": [true]}\n': "line 1, 'tokens'",
        '{"prompt_tokens": [1], "tokens": [99999]}\n': "line 1, 'tokens'",
    },
    ("jsonl", ", format: messages"): {
        '{"messages": [{"content": "a"}]}\n': "line 1, role",
        '{"messages": "a"}\n': "line 1, 'messages'",
    },
}
"""By kind of source and its further fields: files that cannot be trained on."""
CASES = [
    *(prompts(repr(line[:60]), b"%s%s\n" % (GOOD.encode(), line if isinstance(line, bytes) else line.encode()),
              "in.jsonl line 2", *words(refusal)) for line, refusal in PROMPT_LINES.items()),
    *(samples(line[:60], f'{{"prompt_tokens": [1], "tokens": [5]}}\n{line}\n', "in.jsonl line 2", *words(refusal))
      for line, refusal in SAMPLE_LINES.items()),
    *(documents(f"{kind}{more} {content[:60]}", content, *words(refusal), kind=kind, more=more)
      for (kind, more), table in DOCUMENTS.items() for content, refusal in table.items()),
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
    prompts("id twice, as text and number", '{"id": 7, "prompt_tokens": [1]}\n{"id": "7", "prompt_tokens": [1]}\n',
            "line 2", "id:", '"7"', "earlier"),
    samples("a line of 10 MB", json.dumps({"prompt_tokens": [1], "tokens": [5], "text": "x" * 10_000_000}), "line 1", "longer"),
    samples("empty file", "", "in.jsonl", "holds no lines"),
    samples("an endless file", link_to("/dev/zero"), "in.jsonl", "device"),
    samples("a pipe that nobody writes to", fifo, "in.jsonl", "nobody writes"),
    documents("none", "", "in.jsonl", "no records"),
    documents("a pipe", fifo, "in.jsonl", "pipe"),
    documents("an endless file", link_to("/dev/zero"), "in.jsonl", "device"),
    documents("an endless line", sparse(100 << 30), "in.jsonl line 1", "longer"),
    documents("a document too long", json.dumps({"text": "12+3 " * 2000}), "in.jsonl line 1", "256", "too_long"),
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
