"""What the fuzzer feeds bytes to: per surface a function in `TARGETS`, with inputs to start from.

A target catches what the surface may raise at a user, an error of `blockroll.errors`. Every exception it lets out is a fault.
To add one, write a function that imports the surface and returns what takes bytes, and name it here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress


def yaml_target() -> Callable[[bytes], None]:
    """Configuration files, as each command reads them."""
    from blockroll.errors import ConfigError
    from blockroll.model.conversion.config import ConversionConfig
    from blockroll.rollout.conversion.ablation import AblationConfig, cells_of
    from blockroll.settings import parse
    from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig
    from blockroll.yaml_reader import read_yaml

    def run(data: bytes) -> None:
        with suppress(ConfigError):
            plain = read_yaml(data, "run.yaml")
            for config in (GrpoConfig, ConversionConfig, AblationConfig):
                with suppress(ConfigError):
                    made = parse(plain, config, "run.yaml")  # type: ignore[type-var]
                    if isinstance(made, AblationConfig):
                        list(cells_of(made, "run.yaml"))

    return run


def jsonl_target() -> Callable[[bytes], None]:
    """Lines of prompts, of samples to score and of documents."""
    from blockroll.errors import DataError
    from blockroll.inputs import json_object
    from blockroll.model.checkpoint import load_policy
    from blockroll.model.conversion.config import JsonLines
    from blockroll.model.conversion.data.sources import _fields, _rollout, text_document
    from blockroll.rollout.input_lines import Line
    from blockroll.rollout.offline import _request, _scored
    from blockroll.rollout.types import SamplingParams

    policy, params = load_policy("tiny-reasoner"), SamplingParams()
    source = JsonLines(kind="jsonl", paths=("in.jsonl",))

    def run(data: bytes) -> None:
        for raw in data.split(b"\n"):
            with suppress(DataError):
                record = json_object(raw, "line 1")
                line = Line("line 1", record)
                with suppress(DataError):
                    _request(line, policy, params, 2, 0)
                with suppress(DataError):
                    json.dumps(_scored(line, policy)[0], allow_nan=False).encode()
                with suppress(DataError):
                    text_document(policy.tokenizer, _fields(source, record, "line 1")["text"])
                with suppress(DataError):
                    _rollout(record, "line 1", policy.tokenizer)

    return run


TARGETS: dict[str, tuple[Callable[[], Callable[[bytes], None]], tuple[bytes, ...]]] = {
    "yaml": (yaml_target, (
        b"output: run\npolicy: tiny-reasoner\nsteps: 3\ntasks: {families: [gcd]}\nloss: {draft: {tv: 1.0}}\n",
        b"output: a\nparent: b\nstage: &s {name: s, kind: diffusion, tokens: 9}\nvariants: {a: {}, b: {draft: {tv: 0.5}}}\n",
        b"output: a\ndata: {sources: [{kind: jsonl, paths: [x]}]}\nstages:\n- {name: s, kind: ar, tokens: !!int 9}\n",
        b"<<: &m {a: ~}\nb: [*m, \"\\u0041\", !!float 1e-3, '', |\n x\n ]\n%YAML 1.1\n",
    )),
    "jsonl": (jsonl_target, (
        b'{"id": "a", "prompt": "1+2", "seed": 7}\n{"id": 3, "prompt_tokens": [1, 2]}\n',
        b'{"id": 1, "sample": 0, "prompt_tokens": [1], "tokens": [5], "logprobs": [-1.5e-3, NaN]}\n',
        b'{"text": "\\u00e9\\ud83d\\ude00"}\n{"messages": [{"role": "user", "content": ""}]}\n',
    )),
}  # fmt: skip
