"""Configuration files of grpo, convert and ablate: read within bounds, and refused before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Case, File, ForkServer, fifo, folder, link_to, sparse, words

DIGITS = "9" * 5000
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
STAGES = "stages: [{name: s, kind: diffusion, tokens: 100}]"
EXACT = "reward: {match: exact}"
ABLATION = "output: out\nparent: tiny-reasoner-ar\nstage: {name: s, kind: diffusion, tokens: 100}\n"


def grpo(name: str, text: File, *says: str, **others: File) -> Case:
    files = {"run.yaml": text, **{f"{name}.yaml": file for name, file in others.items()}}
    return Case(f"grpo: {name}", ("grpo", "run.yaml"), files, says=says)


def source(name: str, fields: str, *says: str, close: str = "}") -> Case:
    rows = "".join(f'{{"prompt": "Q:{i}+1", "answer": {i}}}\n' for i in range(40))
    files = {"run.yaml": f"output: out\npolicy: tiny-reasoner\ntasks: {{source: {{{fields}{close}}}\n", "rows.jsonl": rows,
             "pipe.jsonl": fifo, "zero.jsonl": link_to("/dev/zero"), "ends.py": "raise SystemExit(5)\n",
             "dies.py": "import os\nos._exit(5)\n"}  # fmt: skip
    return Case(f"grpo: source: {name}", ("grpo", "run.yaml"), files, says=says)


def convert(name: str, text: str, *says: str) -> Case:
    return Case(f"convert: {name}", ("convert", "run.yaml"), {"run.yaml": text}, says=says)


def stage(name: str, fields: str, *says: str) -> Case:
    text = f"output: out\nparent: tiny-reasoner-ar\nstages: [{{name: s, kind: diffusion, tokens: 100, {fields}}}]\n"
    return convert(name, text, "stages[0]", *says)


def shape(name: str, fields: str, *says: str) -> Case:
    return convert(name, f"output: out\n{STAGES}\narchitecture: {{{fields}}}\n", "architecture", *says)


def data(name: str, fields: str, *says: str) -> Case:
    return convert(name, f"output: out\nparent: tiny-reasoner-ar\n{STAGES}\ndata: {{{fields}}}\n", "data", *says)


def ablate(name: str, text: str, *says: str) -> Case:
    return Case(f"ablate: {name}", ("ablate", "run.yaml"), {"run.yaml": text}, says=says)


GRPO = {
    "output: y": "line 2, `output`, twice",
    "steps: !!python/name:os.system x": "line 2, python",
    "steps: !!int ''": "line 2, int",
    "optimizer: {learning_rate: !!float .inf}": "optimizer.learning_rate",
    "loss: {kl_weight: !!float .nan}": "loss.kl_weight",
    f"steps: {DIGITS}": "line 2, 999",
    f"steps: {DIGITS[:4000]}": "line 2, 2**63",
    f"steps: {2**63}": f"line 2, {2**63}",
    "steps: 0": "steps, 0, greater",
    "steps: true": "steps, true, integer",
    "steps: '3'": 'steps, "3", integer',
    "steps: 1e3": "steps, 1000.0, integer",
    "seed: -1": "seed, -1",
    "tasks: {prompts_per_step: 1000000000}": "tasks.prompts_per_step, 1000000000",
    "tasks: {samples_per_prompt: 1000000000}": "tasks.samples_per_prompt, 1000000000",
    "evaluation: {tasks: 1000000000}": "evaluation.tasks, 1000000000",
    "optimizer: {threads: 1000000}": "optimizer.threads, 1000000",
    "optimizer: {learning_rate: 1e300}": "optimizer.learning_rate, 1e+300",
    "optimizer: {learning_rate: 1e999}": "optimizer.learning_rate",
    "rollouts: {temperature: 1e-40}": "rollouts.temperature, 1e-40",
    "rollouts: {temperature: 1e300}": "rollouts.temperature, 1e+300",
    "loss: {kl_weight: 1e300}": "loss.kl_weight, 1e+300",
    "loss: 3": "loss, 3, section",
    "loss: null": "loss, null",
    "policy: nobody": "policy, 'nobody'",
    f"policy: {'p' * 5000}": "policy, ppp",
}
"""Lines below `output: x` in a GRPO run, and what refuses them."""
STAGE = {
    "repeat: 1000000000": "repeat, 1000000000",
    "masked_copies: 1000000000": "masked_copies, 1000000000",
    "pack_tokens: 1000000000000000": "pack_tokens, 1000000000000000",
    "learning_rate: 1e30": "learning_rate, 1e+30",
    "epsilon: 1e-40": "epsilon, 1e-40",
    "betas: [2.0, 2.0]": "betas",
    "block_length: [0, 0]": "block_length",
    "block_length: [2, 1000000000]": "block_length",
    "autocast: int8": "autocast, int8",
}
"""Fields of a stage."""
SHAPE = {
    "vocab_size: 1000000000000000000": "vocab_size, 1000000000000000000",
    "layers: 1000000000": "layers, 1000000000",
    "layers: 1000, hidden_size: 65536": "layers, parameters",
    "hidden_size: -8": "hidden_size, -8",
    "heads: 5, kv_heads: 2": "kv_heads, 2, 5",
    "head_dim: 6": "head_dim, 6",
    "rope_theta: 1e300": "rope_theta, 1e+300",
}
"""Fields of an architecture."""
DATA = {
    "pool: 1000000000": "pool, 1000000000",
    "shuffle: 1000000000000000": "shuffle",
    "sources: [{kind: tasks, difficulty: {chain_sum: {max_terms: 1000000000}}}]": "max_terms",
    "sources: [{kind: tasks, difficulty: {chain_sum: {'a,b': 3}}}]": "difficulty, a,b",
    "sources: [{kind: tasks, families: [sums]}]": "families, sums",
    "sources: [{kind: csv, paths: [a]}]": "csv",
    "sources: [{kind: tasks, weight: 1e300}]": "weight, 1e+300",
}
"""Fields of a conversion's data."""
SOURCE = {
    "paths: [rows.jsonl]": "tasks.source.reward, missing",
    f"paths: [none.jsonl], {EXACT}": "none.jsonl, no such file",
    f"paths: ['.'], {EXACT}, split: a": "split, save_to_disk",
    f"paths: [rows.jsonl], prompt: question, {EXACT}": "rows.jsonl line 1, 'question'",
    f"paths: [pipe.jsonl], {EXACT}": "pipe.jsonl, pipe",
    f"paths: [zero.jsonl], {EXACT}": "zero.jsonl, device",
    "paths: [rows.jsonl], reward: {function: 'nowhere:reward'}": "function, 'nowhere'",
    "paths: [rows.jsonl], reward: {function: 'ends:reward'}": "SystemExit: 5, ends.py",
    "paths: [rows.jsonl], reward: {function: 'dies:reward'}": "status 5",
    "paths: [rows.jsonl], reward: {function: 'ends:reward:x'}": "names no function",
    f"paths: [rows.jsonl], heldout_share: 0.9, {EXACT}": "tasks.prompts_per_step, 16",
}
"""Fields of tasks of one's own."""
TABLES = ((source, SOURCE), (stage, STAGE), (shape, SHAPE), (data, DATA))
CASES = [
    *(grpo(line[:60], f"output: x\n{line}\n", *words(refusal)) for line, refusal in GRPO.items()),
    *(case(fields[:60], fields, *words(refusal)) for case, table in TABLES for fields, refusal in table.items()),
    # What is no regular file, or no YAML.
    grpo("a pipe", fifo, "run.yaml", "pipe", "check the path"),
    grpo("a directory", folder, "run.yaml", "directory"),
    grpo("an endless file", link_to("/dev/zero"), "run.yaml", "device"),
    grpo("a link to itself", link_to("run.yaml"), "run.yaml", "symbolic links"),
    grpo("a sparse file of 100 GB", sparse(100 << 30), "run.yaml", "more than 131,072 bytes"),
    grpo("300 KB of comments", "# comment\n" * 30_000, "run.yaml", "more than 131,072 bytes"),
    grpo("empty", "", "output", "missing", "add it"),
    grpo("a list", "- a\n", "run.yaml", "list"),
    grpo("a word", "word\n", "run.yaml", "str"),
    grpo("bytes", b"output: \xff\n", "run.yaml", "UTF-8"),
    grpo("UTF-16", "output: x\n".encode("utf-16"), "run.yaml", "UTF-8"),
    grpo("NUL bytes", b"output: a\x00b\n", "run.yaml", "not YAML"),
    grpo("an escaped NUL", 'output: "a\\0b"\n', "run.yaml line 1", "\\u0000"),
    grpo("half a surrogate pair", 'output: "a\\ud800"\n', "run.yaml line 1", "\\ud800"),
    grpo("an escape beyond Unicode", 'output: "\\UFFFFFFFF"\n', "run.yaml", "not YAML"),
    grpo("a version of 5,000 digits", f"%YAML {DIGITS}.1\n---\noutput: x\n", "run.yaml"),
    grpo("a bracket", "output: [", "run.yaml line"),
    grpo("a tab", "\toutput: x", "run.yaml line 1"),
    grpo("two documents", "output: x\n---\noutput: y\n", "run.yaml line 2"),
    grpo("a long key twice", f"{'k' * 900}: x\n{'k' * 900}: y\n", "line 2", "kkk", "twice"),
    grpo("a key that is a list", "? [a]\n: b\n", "line 1", "key"),
    grpo("an unknown alias", "output: *none\n", "line 1", "none"),
    grpo("an alias of itself", "output: &a [*a]\n", "run.yaml"),
    grpo("nine levels of aliases", ALIASES, "20,000 values", "aliases"),
    grpo("nine levels of merges", MERGES, "20,000 values", "aliases"),
    grpo("100,000 brackets", "output: " + "[" * 100_000, "run.yaml line 1", "deeper than 32"),
    grpo("30,000 braces", "output: " + "{a: " * 30_000, "run.yaml line 1", "deeper than 32"),
    grpo("400 levels of indentation", "".join(f"{' ' * i}a:\n" for i in range(400)), "deeper than 32"),
    grpo("1,000 dashes", "output:\n  " + "- " * 1000 + "x\n", "deeper than 32"),
    grpo("60,000 values", "output: [" + "x," * 60_000 + "]\n", "20,000 values"),
    # Tags.
    *(grpo(f"{tag} {value}", f"output: x\nsteps: {tag} {value}\n", "run.yaml line 2", value) for tag, value in (
        ("!!int", "abc"), ("!!int", "0x"), ("!!int", "1:x"), ("!!float", "abc"), ("!!float", "1:x"), ("!!bool", "abc"),
        ("!!timestamp", "abc"))),
    grpo("!!python/object/apply", "output: !!python/object/apply:os.system [echo]\n", "line 1", "python"),
    grpo("a tag of our own", "output: !nonsense x\n", "line 1", "!nonsense"),
    grpo("!!binary", "output: !!binary aGVsbG8=\n", "run.yaml", "plain data"),
    grpo("!!binary of no base 64", "output: !!binary '@'\n", "run.yaml"),
    grpo("!!set", "output: !!set {a, b}\n", "run.yaml", "plain data"),
    grpo("!!timestamp", "output: !!timestamp 2026-01-01\n", "run.yaml", "plain data"),
    grpo("!!timestamp of month 99", "output: !!timestamp 2026-99-99\n", "run.yaml line 1"),
    grpo("!!map of a list", "output: !!map [a]\n", "run.yaml line 1"),
    grpo("!!str of a list", "output: !!str [a]\n", "run.yaml line 1"),
    grpo("!!omap of words", "output: !!omap [a]\n", "run.yaml line 1"),
    # Keys and sections.
    grpo("an unknown key", "outputt: x\n", "outputt", "did you mean `output`"),
    grpo("an unknown key of 100,000 letters", f"output: x\n? {'k' * 100_000}\n: 1\n", "kkk"),
    grpo("10,000 unknown families", f"output: x\ntasks: {{families: {[f'f{i}' for i in range(10_000)]}}}\n", "tasks.families"),
    grpo("an empty output", "output: ''\n", "output", '""'),
    grpo("an output that is a file", "output: run.yaml\n", "run.yaml", "cannot be written"),
    grpo("an output of 5,000 characters", f"output: {'x' * 5000}\n", "xxx", "cannot be written"),
    grpo("an output in no directory", "output: /proc/none/run\n", "/proc/none/run", "cannot be written"),
    source("families beside it", f"paths: [rows.jsonl], {EXACT}}}, families: [gcd", "tasks.families", "source", close="]"),
    # Includes.
    grpo("an include that is not there", "output: !include none.yaml\n", "line 1", "none.yaml", "No such file"),
    grpo("an include that is a pipe", "output: !include part.yaml\n", "line 1", "part.yaml", "pipe", part=fifo),
    grpo("an include that is endless", "output: !include part.yaml\n", "part.yaml", "device", part=link_to("/dev/zero")),
    grpo("an include that is a directory", "output: !include part.yaml\n", "part.yaml", "directory", part=folder),
    grpo("an empty include", "output: !include part.yaml\n", "output", "null", part=""),
    grpo("an empty include to merge", "<<: !include part.yaml\noutput: x\n", "run.yaml", part="# nothing\n"),
    grpo("an include of itself", "output: !include run.yaml\n", "run.yaml includes itself"),
    grpo("an include of bytes", "output: !include part.yaml\n", "part.yaml", "UTF-8", part=b"\xff"),
    grpo("an include with NUL bytes", "output: !include part.yaml\n", "part.yaml", part=b"a: \x00"),
    grpo("an include of brackets", "output: !include part.yaml\n", "part.yaml line 1", "deeper", part="[" * 10_000),
    grpo("an include without a name", "output: !include\n", "line 1", "directory"),
    grpo("an include of a list", "output: !include [a]\n", "line 1", "!include takes"),
    grpo("200 includes", "output: [" + "!include part.yaml," * 200 + "]\n", "100 files", part="a: 1\n"),
    # Conversions.
    convert("a slash in a stage's name", "output: out\nstages: [{name: a/b, kind: ar, tokens: 1}]\n", "stages[0].name", "a/b"),
    convert("a stage called ..", "output: out\nstages: [{name: .., kind: ar, tokens: 1}]\n", "stages[0].name", ".."),
    convert("a stage without a name", "output: out\nstages: [{name: '', kind: ar, tokens: 1}]\n", "stages[0].name"),
    convert("a stage's name of 5,000",
            f"output: out\nstages: [{{name: {'n' * 5000}, kind: ar, tokens: 1}}]\n", "stages[0]", "nnn"),
    convert("a stage's name of two lines", 'output: out\nstages: [{name: "a\\nb", kind: ar, tokens: 1}]\n', "stages[0].name"),
    convert("no stages", "output: out\nstages: []\n", "stages"),
    convert("an output that is /", f"output: /\n{STAGES}\n", "output", "'/'"),
    convert("an output that is ..", f"output: ..\n{STAGES}\n", "output", "'..'"),
    convert("an empty output", f"output: ''\n{STAGES}\n", "output", "''"),
    convert("an output that is a file", f"output: run.yaml\nparent: tiny-reasoner-ar\n{STAGES}\n", "run.yaml", "no"),
    convert("an unknown parent", f"output: out\nparent: nobody\n{STAGES}\n", "policy", "'nobody'"),
    convert("a mask token beyond the vocabulary",
            f"output: out\nparent: tiny-reasoner-ar\nmask_token: 99999\n{STAGES}\n", "mask_token", "99999"),
    convert("a file that is not there", f"output: out\nparent: tiny-reasoner-ar\n{STAGES}\n"
            "data: {sources: [{kind: jsonl, paths: [none.jsonl]}]}\n", "none.jsonl", "no such file"),
    # Ablations.
    ablate("no variants", ABLATION + "variants: {}\n", "variants"),
    ablate("a variant that is null", ABLATION + "variants: {a: null}\n", "variants.a"),
    ablate("a change of what is no section", ABLATION.replace("100}", "100, draft: 3}") + "variants: {a: {draft: {tv: x}}}\n",
           "draft.tv"),
    ablate("a variant's name of 5,000", ABLATION + f"variants: {{? {'v' * 5000} : {{}}}}\n", "variants"),
    ablate("a seed of -1", ABLATION + "variants: {a: {}}\nseeds: [-1]\n", "seeds[0]", "-1"),
    ablate("a seed of 2**63", ABLATION + f"variants: {{a: {{}}}}\nseeds: [{2**63}]\n", str(2**63)),
    ablate("a seed twice", ABLATION + "variants: {a: {}}\nseeds: [1, 1]\n", "seeds", "twice"),
    ablate("a level of 99", ABLATION + "variants: {a: {}}\ndecoding: {levels: [99]}\n", "decoding.levels", "99"),
    ablate("a stage that is a word", "output: out\nparent: p\nstage: x\nvariants: {a: {}}\n", "stage", '"x"'),
    ablate("an unknown parent", ABLATION.replace("tiny-reasoner-ar", "nobody") + "variants: {a: {}}\n", "'nobody'"),
    ablate("an output that is a file", ABLATION.replace("out\n", "run.yaml\n") + "variants: {a: {}}\n",
           "run.yaml", "not a directory"),
    Case("ablate: a config that would be overwritten", ("ablate", "run.json"), {"run.json": ABLATION + "variants: {a: {}}\n"},
         says=("run.json", "two files")),
    Case("ablate: a config called .png", ("ablate", "run.png"), {"run.png": ABLATION + "variants: {a: {}}\n"},
         says=("run.png", "two files")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configs(case: Case, edges: ForkServer, tmp_path: Path) -> None:
    edges.check(case, tmp_path)
