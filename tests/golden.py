"""Tokens and log-probabilities that a change of structure must not change.

`python tests/golden.py write` records them in golden.npz; `check` compares them bit for bit, which holds on the kind of processor
that recorded them; the test allows log-probabilities 1e-5 for others.

Every sampler, five schedules, two block sizes, three batches, two random policies and the shipped one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from random_zaya import randomise, zaya_config

from blockroll.model.checkpoint import load_policy
from blockroll.model.policy import Policy
from blockroll.model.tasks import make_tasks
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

FILE = Path(__file__).with_name("golden.npz")
POLICIES = ("random-float64", "random-tied-float32", "tiny-reasoner")
SAMPLERS = ("ar", "lossless", "coupled", "mixed")
SCHEDULES = {
    "ar": Schedule("ar"), "two_pass": Schedule("two_pass"), "fused-0": Schedule("fused", levels=(0,)),
    "fused-0-2": Schedule("fused", levels=(0, 2)), "fused-m3": Schedule("fused", drafts=3, levels=(0, 1, 3)),
}  # fmt: skip
MODES = {"alone": dict(max_batch=1), "batch": dict(max_batch=6, prefill_rows=5),
         "preempted": dict(max_batch=6, pages=12, page_size=8)}
CUTS = (dict(), dict(top_p=0.8), dict(temperature=0.7, top_k=5), dict(temperature=0.0))


def make_policy(name: str) -> Policy:
    if name == "tiny-reasoner":
        return load_policy(name)
    tied = name == "random-tied-float32"
    policy = Policy(zaya_config(tie_word_embeddings=tied))
    randomise(policy, int(tied), 0.6)
    return policy.to(torch.float32 if tied else torch.float64).requires_grad_(False).eval()


def requests(policy: Policy, sampler: str) -> list[RolloutRequest]:
    """Four prompts of other lengths, two samples of each, cut-offs and temperatures in turn."""
    draw = torch.Generator().manual_seed(5)
    if policy.tokenizer is not None:
        prompts = [encode_prompt(policy.tokenizer, task.prompt) for task in make_tasks("heldout", 4, 9)]
    else:
        prompts = [torch.randint(4, 40, (3 + 5 * i,), generator=draw).tolist() for i in range(4)]
    return [RolloutRequest(f"r{i}", tuple(p), SamplingParams(sampler=sampler, max_tokens=14, **CUTS[i]), seed=i, samples=2)
            for i, p in enumerate(prompts)]  # fmt: skip


def compute(name: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(case, its tokens, logprobs and behavior_logprobs one sample after the other) for every case of a policy."""
    policy = make_policy(name)
    for sampler, schedule in itertools.product(SAMPLERS, SCHEDULES):
        if (sampler == "ar") != (schedule == "ar"):
            continue
        for block, mode in itertools.product((4, 16), MODES):
            config = EngineConfig(SCHEDULES[schedule], block_size=block, draft_temperature=1.0, **MODES[mode])
            found = Engine(policy, config).rollout(requests(policy, sampler))
            yield f"{name}/{sampler}/{schedule}/{block}/{mode}", {
                "tokens": np.concatenate([t.tokens for t in found]).astype(np.int16),
                "logprobs": np.concatenate([t.logprobs for t in found]),
                "behavior": np.concatenate([t.behavior_logprobs for t in found]),
            }


def main(command: str) -> int:
    torch.set_num_threads(1)
    arrays = {f"{case}/{kind}": a for name in POLICIES for case, some in compute(name) for kind, a in some.items()}
    if command == "write":
        np.savez_compressed(FILE, **arrays)
        print(len(arrays) // 3, "cases,", FILE.stat().st_size >> 10, "KiB")
        return 0
    recorded = np.load(FILE)
    wrong = [name for name, array in arrays.items() if array.tobytes() != recorded[name].tobytes()]
    print(len(wrong), "of", len(arrays), "arrays differ", *wrong[:20])
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
