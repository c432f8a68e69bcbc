"""The most probable tokens beside each committed one, by the convention of `logprob`: the sampling temperature (0: 1), the full
vocabulary, nothing adjusted or cut.

Legend: S = sequences, R = verify rows, K = alternatives, N = rows, V = vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .drafts import Verdict
from .processing import scale


def top_logprobs(logits_NV: torch.Tensor, temperature_N: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The K = min(k, V) most probable tokens of each row and their log-probabilities: (token_NK int64, logprob_NK float32), most
    probable first. On a CPU the lower token id comes first among equals."""
    logp_NV = torch.log_softmax(scale(logits_NV, temperature_N).double(), -1)
    # A stable sort of the vocabulary, for ties; on an accelerator, where vocabularies are large, topk.
    if logp_NV.device.type == "cpu":
        value_NV, token_NV = logp_NV.sort(dim=-1, descending=True, stable=True)
    else:
        value_NV, token_NV = logp_NV.topk(min(k, logp_NV.shape[-1]), dim=-1)
    return token_NV[..., :k], value_NV[..., :k].float()


def with_top(
    verdict: Verdict, logits_SRV: torch.Tensor, temperature_S: torch.Tensor, k: int, listed_SK: torch.Tensor | None = None
) -> Verdict:
    """The verdict with the k most probable tokens of each row, or with the listed ones (int64, -1 in padding) where a row has
    any. A committed token has the very number it has in `logprob_SR`."""
    temperature_SR = temperature_S[:, None].expand(logits_SRV.shape[:2])
    token_SRK, logprob_SRK = top_logprobs(logits_SRV, temperature_SR, k)
    if listed_SK is not None:
        logp_SRV = torch.log_softmax(scale(logits_SRV, temperature_SR).double(), -1)
        # A list is no longer than the vocabulary, so it fits into the columns there are.
        listed_SRK = listed_SK[:, None, : token_SRK.shape[-1]].expand_as(token_SRK)
        listed_logp_SRK = logp_SRV.gather(-1, listed_SRK.clamp(min=0)).float()
        logprob_SRK = torch.where(listed_SRK >= 0, listed_logp_SRK, logprob_SRK)
        token_SRK = torch.where(listed_SRK >= 0, listed_SRK, token_SRK)
    same_SRK = token_SRK == verdict.token_SR[..., None]
    logprob_SRK = torch.where(same_SRK, verdict.logprob_SR[..., None].float(), logprob_SRK)
    return replace(verdict, top_token_SRK=token_SRK, top_logprob_SRK=logprob_SRK)
