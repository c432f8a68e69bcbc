"""Other ways to decode the same weights and prompts: transformers, in three ways.

| peer | what runs |
|---|---|
| `transformers` | `generate`, batch after batch |
| `transformers-lookup` | `generate` with prompt-lookup drafts, one prompt after another (it takes no batch) |
| `transformers-continuous` | `generate_batch`, its continuous batching |

A peer that refuses a policy is not measured, and its row says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from ...model.checkpoint import resolve
from ...model.policy import Policy
from ..engine import Engine, EngineConfig
from ..schedule import Schedule
from ..types import RolloutRequest, SamplingParams

PEERS = ("transformers", "transformers-lookup", "transformers-continuous")
_LOOKUP_TOKENS = 10

Prompts = Sequence[tuple[int, ...]]
Decode = Callable[[Prompts, int], tuple[int, int]]
"""(prompts, seed) -> tokens and forwards, summed over samples."""


def load_transformers(policy_name: str | os.PathLike[str], policy: Policy) -> Any:
    """The policy of a name as transformers loads it, on the device and in the dtype of `policy`."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(resolve(policy_name), dtype=policy.dtype).to(policy.device).eval()


def make_peer(
    peer: str, policy: Policy, model: Any, prompt: tuple[int, ...], batch: int, temperature: float, max_tokens: int
) -> tuple[Decode, dict[str, Any]]:
    """The peer's decoding function, and whether its greedy tokens after `prompt` are ours.

    The dictionary holds `greedy_tokens_equal`, or `unsupported` with the peer's own words.
    """
    ends = list(policy.eos_token_ids)
    shared = {"max_new_tokens": max_tokens, "eos_token_id": ends or None, "pad_token_id": ends[0] if ends else 0}
    if peer == "transformers-continuous":
        def run(prompts: Prompts, options: dict[str, Any]) -> list[list[int]]:
            made = model.generate_batch(
                inputs=[list(prompt) for prompt in prompts], progress_bar=False,
                generation_config=GenerationConfig(**shared, **options),
            )  # fmt: skip
            return [output.generated_tokens for output in made.values()]
    else:
        lookup = {"prompt_lookup_num_tokens": _LOOKUP_TOKENS} if peer == "transformers-lookup" else {}

        def run(prompts: Prompts, options: dict[str, Any]) -> list[list[int]]:
            tokens = torch.tensor(prompts, device=policy.device)
            made = []
            for part in tokens.split(1 if lookup else batch):
                out = model.generate(part, attention_mask=torch.ones_like(part), **shared, **options, **lookup)
                made += out[:, part.shape[1] :].tolist()
            return made

    def generate(prompts: Prompts, options: dict[str, Any]) -> list[list[int]]:
        with torch.inference_mode():
            return [_until_end(row, ends) for row in run(prompts, options)]

    def decode(prompts: Prompts, seed: int) -> tuple[int, int]:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        count = sum(map(len, generate(prompts, sampling if temperature > 0 else {"do_sample": False})))
        return count, count

    try:
        greedy = generate([prompt], {"do_sample": False})[0]
    except ValueError as error:
        return decode, {"unsupported": str(error).splitlines()[0]}
    request = RolloutRequest("greedy", prompt, SamplingParams(sampler="ar", temperature=0.0, max_tokens=max_tokens))
    mine = Engine(policy, EngineConfig(schedule=Schedule("ar"), max_batch=1)).rollout([request])[0]
    return decode, {"greedy_tokens_equal": greedy == mine.tokens}


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
