"""Log-probabilities for a trainer's loss, and the most probable tokens of a text.

Legend: B samples, N tokens of one sample, T rows, K alternatives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import RequestError
from .arguments import check_temperature, is_list, require, short
from .backends import Backend
from .layout import causal
from .scoring import checked_sequences, score
from .vocabulary import recomputed, rows_at_once

if TYPE_CHECKING:
    from .policy import Policy


def logprobs(
    policy: Policy, prompt_tokens: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], temperature: float = 1.0
) -> list[torch.Tensor]:
    """log p of each generated token at the temperature over the full vocabulary, float32[N] per sample: the convention of
    `Trajectory.logprobs`.

    With gradients on, and a parameter that requires one, the result is differentiable, and equal to the recorded numbers up to
    rounding. Otherwise it is `score`'s, and equal to the recorded numbers as `score`'s are.

    Args:
        prompt_tokens, tokens: B prompts, each with at least one token, and the tokens that follow each.
        temperature: the sampling temperature; 0 counts as 1.

    Raises:
        RequestError: another number of prompts than samples, an empty prompt, a token outside the vocabulary, or more tokens than
            the policy's maximum.
    """
    for name, given in (("prompt_tokens", prompt_tokens), ("tokens", tokens)):
        require(is_list(given), name, f"{short(given)} is no list", "give one list of token ids per sample")
    check_temperature(temperature)
    if len(prompt_tokens) != len(tokens):
        raise RequestError("tokens", f"{len(tokens)} samples for {len(prompt_tokens)} prompts", "give one prompt per sample")
    pairs = list(zip(prompt_tokens, tokens, strict=True))
    if not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in policy.parameters()):
        return [torch.from_numpy(each).to(policy.device) for each in score(policy, pairs, temperature)]
    checked = checked_sequences(policy, pairs)
    if not checked:
        return []
    texts = [[*prompt, *sample] for prompt, sample in checked]
    rows, end = list[int](), 0
    for text, (prompt, _) in zip(texts, checked, strict=True):
        rows += range(end + len(prompt) - 1, end + len(text) - 1)
        end += len(text)
    hidden_TD = policy(causal(texts).to(policy.device))
    index_N = torch.tensor(rows, dtype=torch.int64, device=policy.device)
    target_N = torch.tensor([token for _, sample in checked for token in sample], dtype=torch.int64, device=policy.device)
    at_once = rows_at_once(policy.config.vocab_size, 3, policy.device)
    compute = partial(_logprobs_of, policy, temperature or 1.0)
    parts = [recomputed(compute, hidden_TD[some], target)
             for some, target in zip(index_N.split(at_once), target_N.split(at_once), strict=True)]  # fmt: skip
    return list(torch.cat(parts).split([len(sample) for _, sample in checked]))


def _logprobs_of(policy: Policy, temperature: float, hidden_RD: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    logits_RV = policy.head(hidden_RD).float() / temperature
    return logits_RV.gather(1, target_R[:, None])[:, 0] - logits_RV.logsumexp(1)


@torch.inference_mode()
def text_logits(backend: Backend, tokens: Sequence[int], at_once: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """p's logits after each token but the last, by one causal pass of the network that decodes: pairs (logits_RV, target_R) of R
    rows, R at most `at_once`, where target_R int64 are the tokens that follow.

    Args:
        backend: what runs the network; its weights must be up to date.
        tokens: at least two.
    """
    layout, plan = backend.prepare(causal([list(tokens)]))
    hidden_TD = backend.forward(layout, plan)
    for hidden_RD, target_R in zip(hidden_TD[:-1].split(at_once), layout.token_T[1:].split(at_once), strict=True):
        yield backend.head(hidden_RD), target_R
