"""Schedules, engine configurations and prompts that tests of whole engines share."""

from __future__ import annotations

import torch

from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.schedule import Schedule
from blockroll.rollout.types import RolloutRequest, SamplingParams

SCHEDULES = [
    Schedule("ar"),
    Schedule("two_pass"),
    Schedule("two_pass", drafts=3),
    Schedule("fused"),
    Schedule("fused", levels=(0,)),
    Schedule("fused", levels=(0, 2, 7)),
    Schedule("fused", drafts=5, levels=(0, 1, 3)),
]
SMALL = dict(vocab_size=24, head_dim=16, moe_intermediate_size=16, num_hidden_layers=1, layer_types=["hybrid_sliding"])
"""Sizes of a policy whose kernels Triton's interpreter can run."""
MODES = {
    "alone": dict(max_batch=1),
    "batch": dict(max_batch=7, prefill_rows=5),
    "preempted": dict(max_batch=8, pages=9, page_size=8),
}
CUTS = [dict(), dict(top_p=0.8), dict(top_k=5), dict(top_k=9, top_p=0.9, min_p=0.02)]


def small_markov_policy(make_policy):
    """A policy of the sizes SMALL with a Markov head."""
    made = make_policy(torch.float32, sharpness=0.6, **SMALL)
    made.add_markov(4, torch.Generator().manual_seed(3))
    made.requires_grad_(False).markov.next.weight.normal_(generator=torch.Generator().manual_seed(4))
    return made


def prompt(i):
    """1 to 23 tokens of a vocabulary of 40, none of them special."""
    draw = torch.Generator().manual_seed(i)
    return tuple(torch.randint(4, 40, (1 + (i * 5) % 23,), generator=draw).tolist())


def cut_requests(sampler, count, samples=1, **params):
    """Requests of 22 tokens; their cut-offs take turns."""
    return [
        RolloutRequest(
            f"r{i:02d}", prompt(i), SamplingParams(sampler=sampler, max_tokens=22, **CUTS[i % 4], **params), i, samples
        )
        for i in range(count)
    ]


def tokens_of_ar(policy, requests, temperatures=(0.0, 0.7, 1.0)):
    """{temperature: tokens of each sample} of `requests(temperature)`, without drafts."""
    engine = Engine(policy, EngineConfig(Schedule("ar"), max_batch=8))
    return {t: [sample.tokens for sample in engine.rollout(requests(t))] for t in temperatures}
