"""A finished sample as one line of JSON: what `blockroll generate` and a GRPO run write, and `blockroll inspect` reads.

The `trace` has one row of whole numbers per decode step (`StepTrace`), about three bytes per token. It says how every token was
made, so no other field has to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .types import Trajectory

ROLLOUTS, METRICS, CONFIG = "rollouts.jsonl", "metrics.jsonl", "config.yaml"
"""Files of a training run's directory: samples, a line of figures per step, and the configuration, which names the `policy`."""


def sample_line(name: str | int, sample: Trajectory, tokenizer: Any, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The line of a sample.

    Args:
        name: its `id`.
        tokenizer: the policy's, or None; then `text` is null.
        more: further fields, for instance `step` and `reward`.
    """
    alternatives = {}
    if sample.top_tokens is not None and sample.top_logprobs is not None:
        alternatives = {"top_tokens": sample.top_tokens.tolist(), "top_logprobs": sample.top_logprobs.tolist()}
    return {
        "id": name,
        "sample": sample.sample,
        **(more or {}),
        "prompt_tokens": list(sample.prompt_tokens),
        "tokens": [int(token) for token in sample.tokens],
        "text": None if tokenizer is None else sample.text(tokenizer),
        "logprobs": sample.logprobs.tolist(),
        "behavior_logprobs": sample.behavior_logprobs.tolist(),
        "versions": sample.versions.tolist(),
        "finish_reason": sample.finish_reason,
        "forwards": sample.forwards,
        "trace": [list(step) for step in sample.trace],
        **alternatives,
    }


def dump(record: Mapping[str, Any]) -> str:
    """A line with its end. Numbers have the fewest digits that read back as the same number."""
    return json.dumps(record, allow_nan=False) + "\n"
