"""Checkpoints that are broken, hostile or of another model, given to the command line. Each row edits a small checkpoint that
loads,
and names what the one line on stderr must hold."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, ForkServer, fifo
from random_zaya import randomise, zaya_config
from safetensors.torch import save

from blockroll.errors import CheckpointError
from blockroll.model.checkpoint import load_policy, resolve
from blockroll.model.policy import Policy
from blockroll.rollout.engine import Engine
from blockroll.rollout.types import SamplingParams

LINE = '{"id": "a", "prompt_tokens": [5, 6], "tokens": [7, 8]}\n'
SCORE = ("score", "--policy", "policy", "--input", "in.jsonl", "--output", "out.jsonl")
GENERATE = ("generate", *SCORE[1:], "--max-tokens", "4")
EVAL = ("eval", "policy", "--tasks", "1")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"


@dataclass
class Checkpoint:
    """A checkpoint to be edited. `files` are written as they are, after config and tensors."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    files: dict[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = SCORE

    def written(self) -> dict[str, Any]:
        files: dict[str, Any] = {"config.json": json.dumps(self.config), "model.safetensors": save(self.tensors,
         {"format": "pt"})}
        files |= self.files
        return {"in.jsonl": LINE} | {f"policy/{name}": held for name, held in files.items() if held is not None}


@cache
def base() -> tuple[str, dict[str, torch.Tensor]]:
    config = zaya_config(num_hidden_layers=2, layer_types=["hybrid", "hybrid_sliding"])
    config.diffusion = {"block_size": 4, "mask_token_id": 39}
    policy = Policy(config)
    randomise(policy)
    return json.dumps(config.to_dict(), default=str), policy.state_dict()


def small() -> Checkpoint:
    config, tensors = base()
    return Checkpoint(json.loads(config), {name: tensor.clone() for name, tensor in tensors.items()})


Edit = Callable[[Checkpoint], object]


def config(**changes: Any) -> Edit:
    return lambda c: c.config.update(changes)


def rope(kind: str = "hybrid", **changes: Any) -> Edit:
    def edit(c: Checkpoint) -> None:
        c.config["rope_parameters"][kind].update(changes)

    return edit


def without(section: str, name: str) -> Edit:
    def edit(c: Checkpoint) -> None:
        place = c.config
        for part in filter(None, section.split(".")):
            place = place[part]
        del place[name]

    return edit


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    def edit(c: Checkpoint) -> None:
        c.tensors[name] = change(c.tensors[name])

    return edit


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.flatten().index_fill(0, torch.tensor([0]), value).view(t.shape)


def written(name: str, content: Any) -> Edit:
    return lambda c: c.files.update({name: content})


def both(*edits: Edit) -> Edit:
    return lambda c: [edit(c) for edit in edits]


def run_by(argv: tuple[str, ...], edit: Edit) -> Edit:
    def all_of(c: Checkpoint) -> None:
        c.argv = argv
        edit(c)

    return all_of


def header(change: Callable[[dict[str, Any]], object]) -> Edit:
    """Edits the JSON header of the tensors' file; their bytes stay."""

    def edit(c: Checkpoint) -> None:
        data = save(c.tensors, {"format": "pt"})
        size = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + size])
        change(entries)
        text = json.dumps(entries).encode()
        c.files["model.safetensors"] = len(text).to_bytes(8, "little") + text + data[8 + size :]

    return edit


def data(change: Callable[[bytes], bytes]) -> Edit:
    return lambda c: c.files.update({"model.safetensors": change(save(c.tensors, {"format": "pt"}))})


def sharded(change: Callable[[dict[str, str]], object] = lambda _: None, **files: bytes | None) -> Edit:
    """Two shards and their index, which `change` edits."""

    def edit(c: Checkpoint) -> None:
        names = sorted(c.tensors)
        parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
        places = {name: file for file, part in parts.items() for name in part}
        change(places)
        c.files |= {file: save({name: c.tensors[name] for name in part}) for file, part in parts.items()}
        c.files |= {"model.safetensors": None, INDEX: json.dumps({"weight_map": places})}
        c.files |= {name.replace("_", "."): held for name, held in files.items()}

    return edit


def tokenizer(change: Callable[[dict[str, Any]], object], settings: dict[str, Any] | None = None) -> Edit:
    """The tokenizer of a shipped policy, edited."""

    def edit(c: Checkpoint) -> None:
        source = resolve("tiny-reasoner")
        held = json.loads((source / "tokenizer.json").read_text())
        change(held)
        config = json.loads((source / "tokenizer_config.json").read_text()) | (settings or {})
        c.files |= {"tokenizer.json": json.dumps(held), "tokenizer_config.json": json.dumps(config)}

    return edit


def replaces(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "moe_intermediate_size", "num_experts", "router_hidden_size", "max_position_embeddings", "cca_time0",
          "cca_time1")  # fmt: skip
WRONG_SIZES = {"zero": 0, "negative": -3, "a thousand million": 10**9, "a fraction": 2.5, "text": "8", "none": None, "true": True,
               "a list": [8]}  # fmt: skip

ROWS: list[tuple[str, Edit, tuple[str, ...]]] = [
    *((f"{name} is {what}", config(**{name: value}), (name, "no whole number in"))
      for i, name in enumerate(SIZES) for j, (what, value) in enumerate(WRONG_SIZES.items())
      if (i + j) % 2 == 0 and (name, what) != ("max_position_embeddings", "a thousand million")),
    # Config: relations and other values.
    ("heads that do not divide", config(num_attention_heads=5, num_key_value_heads=2), ("num_attention_heads", "5")),
    ("key heads without halves", config(num_key_value_heads=1, head_dim=7), ("head_dim", "two halves")),
    ("more layers than tensors", config(num_hidden_layers=500, layer_types=None), ("num_hidden_layers", "500", "2 layers")),
    ("two experts per token", config(num_experts_per_tok=2), ("num_experts_per_tok", "2")),
    ("fewer kinds than layers", config(layer_types=["hybrid"]), ("layer_types", "not 2 kinds")),
    ("an unknown kind", config(layer_types=["hybrid", "mamba"]), ("layer_types", "not of hybrid")),
    ("kinds as text", config(layer_types="hybrid"), ("layer_types", "'hybrid'")),
    ("kinds of kinds", config(layer_types=[["hybrid"], {}]), ("config.json", "restore the file")),
    ("a hundred thousand kinds", config(layer_types=["hybrid"] * 100_000), ("config.json", "hybrid")),
    ("no window", config(sliding_window=None), ("sliding_window", "hybrid_sliding")),
    ("a window of 0", config(sliding_window=0), ("sliding_window", "0")),
    ("an unknown activation", config(hidden_act="banana"), ("hidden_act", "banana")),
    ("an activation that is a list", config(hidden_act=["silu"]), ("hidden_act", "silu")),
    ("a name of 5,000 characters", config(hidden_act="x" * 5000), ("hidden_act", "xxx...")),
    ("a key of 5,000 characters", config(diffusion={"y" * 5000: 1}), ("diffusion.yyy", "no such key")),
    ("an epsilon of 0", config(rms_norm_eps=0.0), ("rms_norm_eps", "0.0")),
    ("an epsilon that vanishes in float32", config(rms_norm_eps=1e-60), ("rms_norm_eps", "1e-60")),
    ("an epsilon that is not a number", config(rms_norm_eps=math.nan), ("rms_norm_eps", "nan")),
    ("an infinite epsilon", config(rms_norm_eps=math.inf), ("rms_norm_eps", "inf")),
    ("an epsilon that is text", config(rms_norm_eps="small"), ("config.json", "restore the file")),
    ("an infinite spread", config(initializer_range=math.inf), ("initializer_range", "inf")),
    ("tied by a number", config(tie_word_embeddings=1), ("tie_word_embeddings", "restore the file")),
    # Config: rotary sections.
    ("no rotary section for a kind", without("rope_parameters", "hybrid_sliding"), ("rope_parameters.hybrid_sliding",)),
    ("no theta", without("rope_parameters.hybrid", "rope_theta"), ("rope_parameters.hybrid.rope_theta", "None")),
    ("a theta of 0", rope(rope_theta=0), ("rope_theta", "0")),
    ("an infinite theta", rope(rope_theta=math.inf), ("rope_theta", "inf")),
    ("a theta that is text", rope(rope_theta="big"), ("rope_theta", "big")),
    ("a share of 0", rope("hybrid_sliding", partial_rotary_factor=0.0), ("partial_rotary_factor", "0.0")),
    ("a share of nothing", rope(partial_rotary_factor=1e-9), ("rope_parameters", "frequencies")),
    ("a share of 2", rope(partial_rotary_factor=2), ("partial_rotary_factor", "2")),
    ("an unknown rotary kind", rope(rope_type="banana"), ("rope_type", "banana")),
    ("a rotary kind that follows the length", rope(rope_type="dynamic", factor=2.0), ("rope_type", "dynamic")),
    ("yarn without a factor", rope(rope_type="yarn"), ("rope", "factor")),
    ("llama3 without its values", rope(rope_type="llama3", factor=8.0), ("rope",)),
    ("linear by 0", rope(rope_type="linear", factor=0.0), ("rope",)),
    ("linear by text", rope(rope_type="linear", factor="2"), ("rope",)),
    ("a rotary section that is a list", config(rope_parameters=[1]), ("rope_parameters",)),
    ("a rotary section of no kind", config(rope_parameters={"full": {"rope_theta": 1e4}}), ("rope_parameters.full",)),
    ("a rotary section of a name in two lines", config(rope_parameters={"hybrid\n": {}}), ("rope_parameters.hybrid\\n",)),
    ("a diffusion key in two lines", config(diffusion={"a\nb": 1}), ("diffusion.a\\nb",)),
    ("a rotary section that is a number", config(rope_parameters={"hybrid": 7}), ("rope_parameters.hybrid", "7")),
    # Config: tokens and diffusion.
    ("eos past the vocabulary", config(eos_token_id=40), ("eos_token_id", "40")),
    ("eos below 0", config(eos_token_id=[2, -1]), ("eos_token_id", "-1")),
    ("eos that is text", config(eos_token_id="</s>"), ("eos_token_id", "</s>")),
    ("eos that is none among others", config(eos_token_id=[2, None]), ("eos_token_id",)),
    ("pad past the vocabulary", config(pad_token_id=4000), ("pad_token_id", "4000")),
    ("bos past the vocabulary", config(bos_token_id=41), ("bos_token_id", "41")),
    ("mask past the vocabulary", config(diffusion={"mask_token_id": 40}), ("mask_token_id", "vocabulary of 40")),
    ("mask below 0", config(diffusion={"mask_token_id": -1}), ("mask_token_id", "-1")),
    ("mask equal to eos", config(diffusion={"mask_token_id": 2}), ("mask_token_id", "end-of-sequence")),
    ("mask equal to one of several eos", config(eos_token_id=[2, 7], diffusion={"mask_token_id": 7}), ("mask_token_id", "7")),
    ("a block of 0", config(diffusion={"block_size": 0}), ("block_size", "2..64")),
    ("a block of 1", config(diffusion={"block_size": 1}), ("block_size", "2..64")),
    ("a block of a thousand million", config(diffusion={"block_size": 10**9}), ("block_size", "1000000000")),
    ("a block of 4.0", config(diffusion={"block_size": 4.0}), ("block_size", "4.0")),
    ("a Markov head of a thousand million", config(diffusion={"markov_rank": 10**9}), ("markov_rank", "1000000000")),
    ("drafts at temperature 0", config(diffusion={"draft_temperature": 0}), ("draft_temperature", "0.1..2.0")),
    ("drafts at a temperature of NaN", config(diffusion={"draft_temperature": float("nan")}), ("draft_temperature", "nan")),
    ("drafts at a temperature that is text", config(diffusion={"draft_temperature": "0.5"}), ("draft_temperature", "'0.5'")),
    ("a misspelt key", config(diffusion={"blok_size": 4}), ("diffusion.blok_size", "did you mean block_size")),
    ("a diffusion section that is a list", config(diffusion=[4]), ("diffusion", "[4]")),
    ("a diffusion section that is true", config(diffusion=True), ("diffusion", "True")),
    ("a Markov head without tensors", config(diffusion={"markov_rank": 4}), ("markov", "lacks")),
    # Config: the file.
    ("a list", written("config.json", "[]"), ("None model",)),
    ("text", written("config.json", '"zaya"'), ("None model",)),
    ("half a file", written("config.json", '{"model_type": "zaya", '), ("config.json", "not JSON")),
    ("nothing", written("config.json", ""), ("config.json", "not JSON")),
    ("bytes", written("config.json", bytes(range(256))), ("config.json", "not JSON")),
    ("deep nesting", written("config.json", '{"model_type": "zaya", "a": ' + "[" * 200_000 + "]" * 200_000 + "}"),
     ("config.json", "nested too deeply")),
    ("a number of 5,000 digits", written("config.json", '{"model_type": "zaya", "hidden_size": ' + "9" * 5000 + "}"),
     ("config.json", "not JSON")),
    ("2 MB of config", written("config.json", json.dumps({"model_type": "zaya", "x": "y" * (2 << 20)})), ("config.json",
     "bytes")),
    ("another architecture", config(model_type="llama"), ("llama", "ZAYA")),
    ("an architecture that is a list", config(model_type=["zaya"] * 5000), ("['zaya'", "ZAYA")),
    ("a FIFO", written("config.json", fifo), ("policy", "no directory with a config.json")),
    # Tensors.
    ("another head in a tied policy", config(tie_word_embeddings=True), (HEAD, "differs from", "tie_word_embeddings")),
    ("a head that is another by rounding", both(config(tie_word_embeddings=True), tensor(EMBEDDING, lambda t: t.bfloat16()),
     lambda c: c.tensors.update({HEAD: c.tensors[EMBEDDING].float() * (1 + 2**-12)})), (HEAD, "differs from")),
    ("a tied head of another shape", both(config(tie_word_embeddings=True), tensor(HEAD, lambda t: t[:3].clone())), (HEAD,
     "shape")),
    *((f"{kind} tensors", tensor(NORM, lambda t, dtype=dtype: t.to(dtype)), (NORM, name, "use float32"))
      for kind, dtype, name in (("int8", torch.int8, "I8"), ("bool", torch.bool, "BOOL"), ("complex", torch.complex64, "C64"),
                                ("float8", torch.float8_e4m3fn, "F8_E4M3"), ("int64", torch.int64, "I64"))),
    ("NaN", tensor(NORM, first(math.nan)), (NORM, "NaN or infinity")),
    ("NaN in a bias of the router", tensor("model.layers.1.mlp.gate.balancing_biases", first(math.nan)), ("balancing_biases",
     "NaN")),
    ("infinity", tensor(EMBEDDING, first(-math.inf)), (EMBEDDING, "NaN or infinity")),
    ("1e6 as float16", run_by((*SCORE, "--dtype", "float16"), tensor(NORM, first(1e6))), (NORM, "float16",
     "bfloat16 or float32")),
    ("1e300 as float32", tensor(NORM, lambda t: first(1e300)(t.double())), (NORM, "float32 does not reach")),
    ("a tensor lacks", lambda c: c.tensors.pop(NORM), ("lacks 1", NORM)),
    ("a tensor too many", lambda c: c.tensors.update(extra=torch.ones(2)), ("has 1 tensor", "extra")),
    ("a name of 5,000 characters", lambda c: c.tensors.update({"z" * 5000: torch.ones(2)}), ("has 1 tensor", "zzz...")),
    ("a name in two lines", lambda c: c.tensors.update({"z\nerror: y": torch.ones(2)}), ("has 1 tensor", "z\\nerror")),
    ("another shape", tensor(NORM, lambda t: t[:-1].clone()), (NORM, "shape")),
    ("no tensors", written("model.safetensors", None), ("model.safetensors", "missing")),
    ("tensors in another format", both(written("model.safetensors", None), written("pytorch_model.bin", b"PK")), ("missing",)),
    # The header of the tensors' file.
    ("an empty file", written("model.safetensors", b""), ("model.safetensors", "corrupt")),
    ("seven bytes", written("model.safetensors", b"\1\0\0\0\0\0\0"), ("model.safetensors", "corrupt")),
    ("a header past the file", data(lambda b: b"\xff" * 4 + b[4:]), ("model.safetensors", "corrupt")),
    ("a header of 2**63 bytes", data(lambda b: b"\xff" * 8 + b[8:]), ("model.safetensors", "corrupt", "18446744073709551615")),
    ("half a file of tensors", data(lambda b: b[: len(b) // 2]), ("model.safetensors", "corrupt")),
    ("a byte too many", data(lambda b: b + b"\0"), ("model.safetensors", "corrupt")),
    ("a header that is a list", data(lambda b: (2).to_bytes(8, "little") + b"[]"), ("model.safetensors", "corrupt")),
    ("a header of nulls", header(lambda e: e.update({NORM: None})), ("corrupt",)),
    ("offsets that overlap", header(lambda e: e[NORM].update(data_offsets=e[HEAD]["data_offsets"])), ("corrupt",)),
    ("offsets below 0", header(lambda e: e[NORM].update(data_offsets=[-8, 4])), ("corrupt",)),
    ("a shape of 2**62", header(lambda e: e[NORM].update(shape=[2**62, 2**62])), ("corrupt",)),
    ("a shape of text", header(lambda e: e[NORM].update(shape="32")), ("corrupt",)),
    ("a dtype that does not exist", header(lambda e: e[NORM].update(dtype="F33")), ("corrupt",)),
    ("a header of deep nesting", data(lambda b: (len(b"{" * 9)).to_bytes(8, "little") + b'{"a":' * 2 + b"{" * 9), ("corrupt",)),
    # The index.
    ("an index that is a list", sharded(model_safetensors_index_json=b"[]"), ("index.json", "corrupt")),
    ("an index without a map", sharded(model_safetensors_index_json=b"{}"), ("index.json", "corrupt")),
    ("an index of numbers", sharded(lambda m: m.update({NORM: 7})), ("index.json", "corrupt")),
    ("an index that is empty", sharded(lambda m: m.clear()), ("index.json", "corrupt")),
    ("an index out of the directory", sharded(lambda m: m.update({NORM: "../other/model.safetensors"})), ("index.json",
     "'../other")),
    ("an index to the root", sharded(lambda m: m.update({NORM: "/etc/passwd"})), ("index.json", "'/etc/passwd'")),
    ("an index to another format", sharded(lambda m: m.update({NORM: "a.bin"})), ("index.json", "'a.bin'")),
    ("an index to a file that lacks", sharded(lambda m: m.update({NORM: "c.safetensors"})), ("c.safetensors", "missing")),
    ("an index to the wrong shard", sharded(lambda m: m.update({NORM: "a.safetensors"})), ("index.json", NORM, "a.safetensors")),
    ("an index of a tensor nowhere", sharded(lambda m: m.update(extra="a.safetensors")), ("index.json", "extra")),
    ("a tensor in two shards", both(sharded(), lambda c: c.files.update(
        {"b.safetensors": save({name: c.tensors[name] for name in sorted(c.tensors)[8:]})})), ("is in a.safetensors and in b",)),
    ("an index beside a whole file", both(sharded(), written("model.safetensors", b"x")), ("both", "remove the one")),
    ("a shard that is cut", both(sharded(), lambda c: c.files.update({"b.safetensors": c.files["b.safetensors"][:-9]})),
     ("b.safetensors", "corrupt")),
    ("a shard that is a FIFO", both(sharded(), written("b.safetensors", fifo)), ("b.safetensors", "missing")),
    # The tokenizer.
    ("a tokenizer that is a list", written("tokenizer.json", "[]"), ("tokenizer.json", "no section")),
    ("half a tokenizer", written("tokenizer.json", '{"version": "1.0"'), ("tokenizer.json", "not JSON")),
    ("a tokenizer of nothing", written("tokenizer.json", "{}"), ("the tokenizer in", "cannot be read")),
    ("settings without a tokenizer", written("tokenizer_config.json", "{}"), ("the tokenizer in", "vocabulary")),
    ("settings that are a number", written("tokenizer_config.json", "5"), ("tokenizer_config.json", "no section")),
    ("a replacement of 50 MB", tokenizer(lambda t: t.update(normalizer=replaces({"String": "a"}, "b" * (50 << 20)))),
     ("tokenizer.json", "lengthen a text")),
    ("replacements of replacements", tokenizer(lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [
        replaces({"String": "a"}, "a" * 8)] * 8})), ("tokenizer.json", "lengthen a text")),
    ("a prefix of 1 MB", tokenizer(lambda t: t.update(normalizer={"type": "Prepend", "prepend": "b" * (1 << 20)})),
     ("tokenizer.json", "lengthen a text")),
    ("an expression of 100 kB", tokenizer(lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "a" * 100_000},
        "behavior": "Isolated", "invert": False})), ("tokenizer.json", "100000 characters")),
    ("a tokenizer of deep nesting", written("tokenizer.json", "[" * 300_000), ("tokenizer.json", "nested too deeply")),
    # The same by other commands, and names of policies.
    ("no layers, decoded", run_by(GENERATE, config(num_hidden_layers=0)), ("num_hidden_layers", "0")),
    ("no layers, evaluated", run_by(EVAL, config(num_hidden_layers=0)), ("num_hidden_layers", "0")),
    ("NaN, evaluated", run_by(EVAL, tensor(NORM, first(math.nan))), (NORM, "NaN")),
    ("no layers, planned", run_by(("plan", "--model", "policy"), config(num_hidden_layers=-1)), ("num_hidden_layers", "-1")),
    ("a policy of 5,000 characters", run_by(("score", "--policy", "p" * 5000, *SCORE[3:]), config()), ("policy", "too long")),
    ("a policy that is a file", run_by(("score", "--policy", "in.jsonl", *SCORE[3:]), config()), ("in.jsonl", "no directory")),
    ("a policy of no name", run_by(("score", "--policy", "", *SCORE[3:]), config()), ("policy", "no directory")),
    ("an unknown dtype", run_by((*SCORE, "--dtype", "float8"), config()), ("dtype", "float8")),
]  # fmt: skip

HARMLESS: dict[str, Edit] = {
    "as it is": config(),
    "a thousand million labels": config(num_labels=10**9, problem_type="single_label_classification"),
    "keys of other architectures": config(to_dict=1, dtype="banana", per_layer_config={"0": 1},
     quantization_config={"x": [1] * 99}),
    "in two shards": sharded(),
    "a diffusion section that is empty": config(diffusion={}),
    "a tied head that is there": both(config(tie_word_embeddings=True),
     lambda c: c.tensors.update({HEAD: c.tensors[EMBEDDING].clone()})),
    "a tied head that is not there": both(config(tie_word_embeddings=True), lambda c: c.tensors.pop(HEAD)),
    "float64 and bfloat16 tensors": both(tensor(NORM, lambda t: t.double()), tensor(HEAD, lambda t: t.bfloat16())),
    "code beside a tokenizer": both(tokenizer(lambda t: None, {"tokenizer_class": "Mine",
     "auto_map": {"AutoTokenizer": ["evil.T", None]}}),
                                    written("evil.py", "open('../ran', 'w')")),
    "several eos tokens": config(eos_token_id=[2, 3]),
    "no eos token": config(eos_token_id=None, bos_token_id=None, pad_token_id=None),
    "yarn": rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=80),
}  # fmt: skip


def case(name: str, edit: Edit, says: tuple[str, ...], status: int = 2) -> Case:
    checkpoint = small()
    edit(checkpoint)
    return Case(name, checkpoint.argv, checkpoint.written(), status=status, says=says, makes=() if status else ("out.jsonl",))


def lay_out(one: Case, directory: Path) -> None:
    """Writes the files of a case."""
    for path, held in one.files.items():
        place = directory / path
        place.parent.mkdir(exist_ok=True)
        held(place) if callable(held) else place.write_bytes(held.encode() if isinstance(held, str) else held)


def ids(rows: list[tuple[str, Edit, tuple[str, ...]]]) -> dict[str, Any]:
    return {"argnames": ("name", "edit", "says"), "argvalues": rows, "ids": [row[0] for row in rows]}


def scored(row: tuple[str, Edit, tuple[str, ...]]) -> bool:
    """Whether its command is SCORE."""
    checkpoint = small()
    row[1](checkpoint)
    return checkpoint.argv == SCORE


SCORED = [row for row in ROWS if scored(row)]


@pytest.mark.parametrize(**ids(SCORED))
def test_a_broken_checkpoint_is_an_error_of_one_line(name: str, edit: Edit, says: tuple[str, ...], tmp_path: Path) -> None:
    lay_out(case(name, edit, says), tmp_path)
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_policy(tmp_path / "policy")
    said = str(error.value)
    assert said.startswith("policy: ") and said.count("; ") >= 1 and "\n" not in said and len(said) < 1500, said
    assert all(word in said for word in says), said
    assert time.process_time() - start < 5


@pytest.mark.parametrize(**ids([row for i, row in enumerate(ROWS) if i % 16 == 0 or row not in SCORED]))
def test_by_the_command_line(name: str, edit: Edit, says: tuple[str, ...], edges: ForkServer, tmp_path: Path) -> None:
    edges.check(case(name, edit, says), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(**ids(ROWS))
def test_all_by_the_command_line(name: str, edit: Edit, says: tuple[str, ...], edges: ForkServer, tmp_path: Path) -> None:
    edges.check(case(name, edit, says), tmp_path)


def overflowing(c: Checkpoint) -> None:
    c.tensors[NORM].fill_(3e38)
    c.tensors[HEAD] *= 1e30


@pytest.mark.slow
@pytest.mark.parametrize("argv", [SCORE, GENERATE])
def test_weights_that_overflow_in_the_head_give_no_samples_and_no_scores(argv, edges: ForkServer, tmp_path: Path) -> None:
    """The first line is the progress of the work that was done."""
    outcome = edges.run(case("overflow", run_by(argv, overflowing), ()), tmp_path)
    progress, error = outcome.stderr.splitlines()
    assert outcome.status == 2 and progress.endswith("0/1") and not outcome.appeared
    assert error.startswith("error: logprobs: ") and "finite" in error


@pytest.mark.parametrize("name", HARMLESS)
def test_a_checkpoint_that_is_only_unusual_loads(name: str, tmp_path: Path) -> None:
    lay_out(case(name, HARMLESS[name], ()), tmp_path)
    tokens = Engine(load_policy(tmp_path / "policy")).generate([[5, 6]], SamplingParams(max_tokens=4))[0].samples[0].tokens
    assert 1 <= len(tokens) <= 4
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_bytes_changed_at_random(edges: ForkServer, tmp_path: Path) -> None:
    """Each change is one line or a checkpoint that loads."""
    draw = random.Random(5)
    for number in range(300):
        checkpoint = small()
        files = checkpoint.written()
        name = draw.choice(["policy/config.json", "policy/model.safetensors"])
        held = bytearray(files[name].encode() if isinstance(files[name], str) else files[name])
        for _ in range(draw.choice([1, 2, 8])):
            held[draw.randrange(min(len(held), 4000))] = draw.randrange(256)
        files[name] = bytes(held)
        place = tmp_path / str(number)
        place.mkdir()
        outcome = edges.run(Case(str(number), SCORE, files), place)
        assert outcome.status in (0, 2) and "Traceback" not in outcome.stderr, outcome
        assert outcome.status == 0 or (outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1), outcome
        assert outcome.seconds <= 5 and outcome.memory <= 1 << 30, outcome
