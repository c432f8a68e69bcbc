"""A coverage-guided fuzzer of checkpoint loading: `python tests/fuzz/fuzz_checkpoint.py CORPUS [libFuzzer options]`.

One input edits a small checkpoint that loads: its first byte chooses a file, the rest is that file's new content, or a list of
edits. `load_policy` must return a policy or raise CheckpointError with one line; anything else ends the run, as do 5 s and 1 GB
above the start (`-timeout`, `-rss_limit_mb`).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["blockroll"], enable_loader_override=False):
    from blockroll.errors import CheckpointError
    from blockroll.model.checkpoint import load_policy, resolve, save_policy
    from blockroll.model.policy import Policy

import torch
from random_zaya import randomise, zaya_config

KINDS = 5
FILES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json")
VALUES = (0, 1, -1, 2, 2**31, 10**9, 10**30, 0.5, -0.0, 1e-60, 1e300, float("nan"), float("inf"), True, False, None, "",
          "silu", "hybrid", "hybrid_sliding", "yarn", "linear", "llama3", "default", [], {}, [2, 3], [None], {"a": {}},
          "x" * 3000, ["hybrid"] * 3, {"block_size": 4}, {"rope_theta": 1e4})  # fmt: skip

torch.set_num_threads(1)
place = Path(tempfile.mkdtemp(prefix="fuzz-"))
BASE, WORK = place / "base", place / "work"


def make_base() -> None:
    config = zaya_config(num_hidden_layers=1, layer_types=["hybrid"], vocab_size=20, hidden_size=8, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=4, moe_intermediate_size=4, num_experts=2,
                         router_hidden_size=4)  # fmt: skip
    config.diffusion = {"block_size": 4, "mask_token_id": 3}
    policy = Policy(config)
    randomise(policy)
    save_policy(policy, BASE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("tiny-reasoner") / name, BASE / name)


make_base()
CONFIG = json.loads((BASE / "config.json").read_text())
TENSORS = (BASE / "model.safetensors").read_bytes()
SIZE = int.from_bytes(TENSORS[:8], "little")
HEADER = json.loads(TENSORS[8 : 8 + SIZE])


def edited(section: dict, data: atheris.FuzzedDataProvider, deep: int = 0) -> dict:
    """Some values of a section replaced, removed or added."""
    section = dict(section)
    for _ in range(data.ConsumeIntInRange(1, 4)):
        names = sorted(section) or ["a"]
        name = names[data.ConsumeIntInRange(0, len(names) - 1)]
        action = data.ConsumeIntInRange(0, 4)
        if action == 0:
            section.pop(name, None)
        elif action == 1 and isinstance(section.get(name), dict) and deep < 3:
            section[name] = edited(section[name], data, deep + 1)
        elif action == 2:
            section[name] = data.ConsumeInt(4)
        elif action == 3:
            section[data.ConsumeUnicode(8)] = VALUES[data.ConsumeIntInRange(0, len(VALUES) - 1)]
        else:
            section[name] = VALUES[data.ConsumeIntInRange(0, len(VALUES) - 1)]
    return section


def load(raw: bytes) -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    for name in os.listdir(BASE):
        os.link(BASE / name, WORK / name)
    data = atheris.FuzzedDataProvider(raw)
    kind = data.ConsumeIntInRange(0, KINDS)
    if kind < len(FILES):
        name, content = FILES[kind], data.ConsumeBytes(1 << 20)
        if kind == 1 and len(content) > 8:  # the bytes are a header, most often
            content = len(content).to_bytes(8, "little") + content + TENSORS[8 + SIZE :]
    elif kind == 4:
        name, content = "config.json", json.dumps(edited(CONFIG, data)).encode()
    else:
        text = json.dumps(edited(HEADER, data)).encode()
        name, content = "model.safetensors", len(text).to_bytes(8, "little") + text + TENSORS[8 + SIZE :]
    (WORK / name).unlink(missing_ok=True)
    (WORK / name).write_bytes(content)
    try:
        load_policy(WORK)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, error


def seeds(corpus: Path) -> None:
    """One input per file that loads."""
    corpus.mkdir(parents=True, exist_ok=True)
    index = json.dumps({"weight_map": dict.fromkeys(HEADER.keys() - {"__metadata__"}, "model.safetensors")})
    held = ((BASE / "config.json").read_bytes(), TENSORS[8 : 8 + SIZE], index.encode(), (BASE / "tokenizer.json").read_bytes())
    for kind, content in enumerate(held):
        # FuzzedDataProvider takes numbers from the end.
        (corpus / f"seed-{kind}").write_bytes(content + bytes([kind]))


if __name__ == "__main__":
    atheris.Setup(sys.argv, load)
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and not Path(sys.argv[1]).is_file():
        seeds(Path(sys.argv[1]))
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place, ignore_errors=True)
