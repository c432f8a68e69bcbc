"""Exact distributions of a sample's first tokens, for tests that hold the engine's samples against them.

p comes from transformers' model of the same weights. Parameters are applied by transformers' logits processors, and by hand where
it has none. q comes from the layout that training uses. The distribution is the sum over every way in which a schedule can draft,
accept and reject the tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from transformers import ZayaForCausalLM
from transformers.generation import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blockroll.model.layout import CLEAN, diffusion
from blockroll.rollout.engine import Engine, EngineConfig
from blockroll.rollout.types import RolloutRequest

VOCABULARY, PROMPT, LENGTH, BLOCK, TEMPERATURE = 5, (4, 3, 1), 4, 4, 0.8
"""The samples: their first four tokens have 625 outcomes. Blocks of four, so that a second block begins within them."""

GOOD, BROKEN = 1e-5, 1e-12
"""The p-value of a right sampler lies above the first. That of a broken one lies below the second."""


def small_policy(make_policy):
    """A policy of one layer, whose q differs from p and yet is often accepted."""
    return make_policy(
        torch.float32, seed=3, sharpness=0.5, vocab_size=VOCABULARY, num_hidden_layers=1, layer_types=None,
        sliding_window=None, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16,
    )  # fmt: skip


def hugging_face(policy):
    """transformers' model of the same weights, as a function: tokens -> logits of the next token."""
    model = ZayaForCausalLM(policy.config).to(policy.dtype).eval()
    model.set_experts_implementation("eager")  # the grouped product takes no float64
    weights = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("markov.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("rotary" in name for name in missing)

    @torch.no_grad()
    def logits(prefix):
        return model(torch.tensor([list(prefix)])).logits[0, -1]

    return logits


def adjusted(params, prompt, made, logits):
    """Logits after `prompt` and `made` tokens, changed by everything that comes before the temperature."""
    x, ids = logits.clone()[None], torch.tensor([[*prompt, *made]])
    if params.min_tokens and params.stop_token_ids:
        x = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(params.stop_token_ids))(ids, x)
    if params.logit_bias:
        bias = SequenceBiasLogitsProcessor([[[token], value] for token, value in params.logit_bias])
        x = bias(ids, x).to(x.dtype)
    for processor in params.logits_processors:
        x = processor([*prompt, *made], x[0])[None]
    if params.repetition_penalty != 1:
        x = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, x)
    for token, count in Counter(made).items():
        x[0, token] -= params.presence_penalty + params.frequency_penalty * count
    return x[0]


def cut(params, logits):
    """Log-probabilities after the temperature and the cut-offs."""
    x, ids = logits[None], torch.zeros(1, 0, dtype=torch.int64)
    if params.temperature != 1:
        x = TemperatureLogitsWarper(float(params.temperature))(ids, x)
    if params.top_k > 0:
        x = TopKLogitsWarper(params.top_k)(ids, x)
    if params.top_p < 1:
        x = TopPLogitsWarper(params.top_p)(ids, x)
    if params.min_p > 0:
        x = MinPLogitsWarper(params.min_p)(ids, x)
    return x[0].log_softmax(-1)


class Enumeration:
    """The outcomes of one policy: exact probabilities, and samples of the engine.

    Args:
        policy: `small_policy`, with a Markov head or without.
    """

    def __init__(self, policy) -> None:
        self.policy = policy
        self.p_logits = cache(hugging_face(policy))
        self._hidden = cache(self._mask_rows)

    @torch.no_grad()
    def _mask_rows(self, context, length):
        """Hidden states of the block of `length` mask rows that follows `context`."""
        layout, _ = diffusion([list(context)], [[(len(context), length)]], self.policy.mask_token_id)
        return self.policy(layout)[layout.block_T != CLEAN]

    @torch.no_grad()
    def q_logits(self, context, length, prefix):
        """Of the token after `prefix`, from the block of `length` mask rows that follows `context`."""
        slot = len(prefix) - len(context)
        return self.policy.draft_head(self._hidden(context, length)[slot : slot + 1], torch.tensor(prefix[-1:]))[0]

    def exact(self, params, schedule, draft_temperature=1.0):
        """{outcome: probability}; outcomes are tuples of at most LENGTH tokens."""
        drawn = replace(params, temperature=params.temperature * draft_temperature)
        schedule, found = schedule.within(BLOCK), Counter()
        length = schedule.drafts if schedule.kind == "two_pass" else schedule.block

        @cache
        def rows(made, context):
            """(target, q) of the token after `made`; q is None where the token has no draft."""
            p = adjusted(params, PROMPT, made, self.p_logits((*PROMPT, *made))).double()
            if context is None:
                return cut(params, p).exp().tolist(), None
            q = adjusted(params, PROMPT, made, self.q_logits(context, length, (*PROMPT, *made))).double()
            q[self.policy.mask_token_id] = -torch.inf
            target = params.mix_weight * p + (1 - params.mix_weight) * q if params.sampler == "mixed" else p
            return cut(params, target).exp().tolist(), cut(drawn, q).exp().tolist()

        def step(made, context, count, mass):
            """One decode step after `made` that verifies `count` drafts of the block after `context`."""
            if schedule.kind == "two_pass" and params.sampler != "ar":
                context, count = (*PROMPT, *made), schedule.drafts
            verify(made, made, context, count, mass)

        def verify(begin, made, context, count, mass):
            if len(made) == LENGTH or (made and made[-1] in params.stop_token_ids):
                found[made] += mass
                return
            accepted = len(made) - len(begin)
            target, q = rows(made, context if accepted < count else None)
            for token, wanted in enumerate(target):
                stays = 0.0 if q is None else min(wanted, q[token])
                if stays > 0:
                    verify(begin, (*made, token), context, count, mass * stays)
                if wanted > stays:
                    end_step(begin, (*made, token), accepted, mass * (wanted - stays))

        def end_step(begin, made, accepted, mass):
            if schedule.kind != "fused" or params.sampler == "ar":
                return step(made, None, 0, mass)
            level = max(level for level in schedule.levels if level <= accepted)
            context = (*PROMPT, *made[: len(begin) + level])
            step(made, context, min(length - (len(made) - len(begin) - level), schedule.drafts), mass)

        step((), None, 0, 1.0)
        return found

    def sampled(self, params, schedule, count, *, planner=None, batch=2048, drafted=0.1, draft_temperature=None):
        """{outcome: number} of at least `count` samples. One more token is generated, so that the last one may be drafted.
        At least the share `drafted` of the tokens must come from drafts."""
        sizes = dict(block_size=BLOCK, max_batch=batch, pages=5000, page_size=8, draft_temperature=draft_temperature)
        engine = Engine(self.policy, EngineConfig(schedule, **sizes))
        engine.planner = planner
        params, outcomes, drafts = replace(params, max_tokens=LENGTH + 1, ignore_eos=True), Counter(), 0
        group = min(4096, 8 * batch)
        for i in range(-(-count // group)):
            engine.add(RolloutRequest(f"{i}", PROMPT, params, seed=i, samples=group))
            while engine.has_work:
                for done in engine.step():
                    outcomes[tuple(done.tokens[:LENGTH])] += 1
                    drafts += int(done.from_draft[:LENGTH].sum())
        tokens = sum(len(outcome) * times for outcome, times in outcomes.items())
        assert drafts >= drafted * tokens, f"only {drafts} of {tokens} tokens were drafted"
        return outcomes


def p_value(outcomes, expected):
    """Of Pearson's test. Outcomes that are expected fewer than 10 times are pooled; an impossible outcome gives 0."""
    total = sum(outcomes.values())
    if not set(outcomes) <= set(expected):
        return 0.0
    want = np.array(list(expected.values())) * total
    got = np.array([outcomes[outcome] for outcome in expected])
    rare = want < 10
    want, got = np.append(want[~rare], want[rare].sum()), np.append(got[~rare], got[rare].sum())
    want, got = want[want > 0], got[want > 0]
    statistic = ((got - want) ** 2 / want).sum()
    return torch.special.gammaincc(torch.tensor((len(want) - 1) / 2), torch.tensor(statistic / 2)).item()
