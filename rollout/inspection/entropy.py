"""The entropy of p at each token, recomputed by one causal pass of a policy.

Entropies are not recorded while tokens are made. A policy that was trained since, or another temperature, gives other
log-probabilities than those recorded, and its entropies would be those of another distribution. So a sample has entropies only
where the recomputed log-probabilities are the recorded ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...model.packing import packs
from ...model.policy import Policy
from ...model.scoring import checked_sequences, score_with_entropy
from ..progress import Meter
from .samples import InspectedSample

TOLERANCE = 0.02
"""Largest difference of a log-probability, in nats: a hundred times what float32 gives, and what bfloat16 mostly gives."""
_TOKENS_PER_PASS = 4096


def with_entropy(policy: Policy, samples: Sequence[InspectedSample], temperature: float) -> list[InspectedSample]:
    """The samples; those whose log-probabilities the policy reproduces, with entropies.

    Raises:
        RequestError: a sample has a token outside the policy's vocabulary, or is longer than its maximum.
    """
    found = list(samples)
    able = [i for i, sample in enumerate(samples) if len(sample.prompt) and len(sample.tokens) and sample.logprobs is not None]
    checked_sequences(policy, [(samples[i].prompt.tolist(), samples[i].tokens.tolist()) for i in able])
    with Meter("entropy", len(able)) as meter:
        for some in packs(able, lambda i: len(samples[i].prompt) + len(samples[i].tokens), _TOKENS_PER_PASS):
            pairs = [(samples[i].prompt.tolist(), samples[i].tokens.tolist()) for i in some]
            for i, logprobs, entropy in zip(some, *score_with_entropy(policy, pairs, temperature), strict=True):
                recorded = samples[i].logprobs
                assert recorded is not None
                made = np.isfinite(recorded)  # of the policy, not of the environment
                if made.any() and np.abs(logprobs - recorded)[made].max() <= TOLERANCE:
                    found[i] = replace(samples[i], entropy=np.where(made, entropy, np.float32(np.nan)))
                meter.advance(len(samples[i].tokens), 0)
    return found
