"""Adjustment of logits before the temperature: `min_tokens`, `logit_bias`, `logits_processors` and the penalties, in vLLM's order
(`rollout/params.py`).

Invariants:
- The logits of a row depend on that row and on the tokens before it alone: the committed ones, then the drafts up to the row.
- An Adjustment knows the committed tokens of its samples. Each verification adds the tokens that it commits, so the next drafts
  are adjusted by the tokens they follow, before the host knows these.
- q is adjusted along the drafted tokens as p is, so that no forbidden token is drafted.
- Only `logits_processors` make the host wait for tokens.

Legend: S = sequences, M = drafts, R = M + 1 verify rows, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, cast

import torch

from ...errors import RequestError
from ...kernels.transfer import upload
from ..params import SamplingParams
from .processing import widen


class Prefix(NamedTuple):
    """The tokens of a sample before those that are drawn next.

    Attributes:
        tokens: prompt and generated tokens. prompt: how many of them are the prompt's.
        stops: tokens that end the sample.
    """

    tokens: Sequence[int]
    prompt: int
    stops: Collection[int]


class Before(NamedTuple):
    """Summary of the tokens before a row.

    Attributes:
        left_S: int64, tokens still to come before a sample may end.
        count_SV: int32, how often each token was generated; None where no sample has penalties.
        tokens: prompt and generated tokens of each sample that has processors, by its index. A sample whose rows have ended is
            not in it.
    """

    left_S: torch.Tensor
    count_SV: torch.Tensor | None
    tokens: dict[int, list[int]]


class Adjustment:
    """Adjusts the logits of the samples of one group. Tensors over the vocabulary are made when its size is known.

    Args:
        params, prefixes: one each per sample.
    """

    def __init__(self, params: Sequence[SamplingParams], prefixes: Sequence[Prefix], device: torch.device) -> None:
        self._params, self._prefixes, self._device = tuple(params), tuple(prefixes), device
        left = [max(p.min_tokens - (len(x.tokens) - x.prompt), 0) for p, x in zip(params, prefixes, strict=True)]
        tokens = {s: list(prefixes[s].tokens) for s, p in enumerate(params) if p.logits_processors}
        self._forbids, self._penalises = any(left), any(p.penalises for p in params)
        self._vocabulary = 0
        self._bias_SV = self._ends_SV = self._prompt_SV = None  # type: torch.Tensor | None
        names = "repetition_penalty", "presence_penalty", "frequency_penalty"
        columns = [torch.tensor([[getattr(p, name)] for p in params], dtype=torch.float64) for name in names]
        left_S, columns = upload((torch.tensor(left, dtype=torch.int64), columns), device)
        self._committed = Before(left_S, None, tokens)
        self._repetition_S1, self._presence_S1, self._frequency_S1 = columns

    def start(self, vocabulary: int, there_S: torch.Tensor | None = None) -> Before:
        """The state before the next token. `there_S` (bool): the samples that have a row for it; None: all."""
        if self._vocabulary != vocabulary:
            self._make(vocabulary)
        before = self._committed
        if there_S is None or not before.tokens:
            return before
        there = there_S.tolist()
        return before._replace(tokens={s: tokens for s, tokens in before.tokens.items() if there[s]})

    def after(self, before: Before, token_S: torch.Tensor) -> Before:
        """The state after one more token per sample; -1: this sample has no more rows."""
        there_S, count_SV, tokens = token_S >= 0, before.count_SV, before.tokens
        if count_SV is not None:
            count_SV = count_SV.scatter_add(1, token_S.clamp(min=0)[:, None], there_S.to(torch.int32)[:, None])
        if tokens:
            known = token_S.tolist()
            tokens = {s: [*earlier, known[s]] for s, earlier in tokens.items() if known[s] >= 0}
        return Before(before.left_S - there_S.long(), count_SV, tokens)

    def adjusted(self, before: Before, logits_SV: torch.Tensor) -> torch.Tensor:
        """The logits of the next token, in float32 or wider: a new tensor. Rows of samples that have ended may hold anything."""
        x_SV = widen(logits_SV).clone()
        if self._ends_SV is not None:
            x_SV.masked_fill_(self._ends_SV & (before.left_S > 0)[:, None], -torch.inf)
        if self._bias_SV is not None:
            x_SV += self._bias_SV.to(x_SV.dtype)
        for s, tokens in before.tokens.items():
            for processor in self._params[s].logits_processors:
                x_SV[s] = _checked(processor(list(tokens), x_SV[s].clone()), x_SV[s])
        if before.count_SV is not None and self._prompt_SV is not None:
            there_SV, repetition_S1 = before.count_SV > 0, self._repetition_S1.to(x_SV.dtype)
            repeated_SV = torch.where(x_SV > 0, x_SV / repetition_S1, x_SV * repetition_S1)
            x_SV = torch.where(there_SV | self._prompt_SV, repeated_SV, x_SV)
            x_SV -= self._frequency_S1.to(x_SV.dtype) * before.count_SV + self._presence_S1.to(x_SV.dtype) * there_SV
        return x_SV

    def along(self, logits_SRV: torch.Tensor, token_SM: torch.Tensor) -> torch.Tensor:
        """The adjusted logits of rows 0 .. M, of which row k follows the committed tokens and tokens 0 .. k - 1 (-1: none)."""
        before, rows = self.start(logits_SRV.shape[-1]), []
        for k in range(logits_SRV.shape[1]):
            rows.append(self.adjusted(before, logits_SRV[:, k]))
            if k < token_SM.shape[1]:
                before = self.after(before, token_SM[:, k])
        return torch.stack(rows, 1)

    def commit(self, token_SR: torch.Tensor) -> None:
        """Count the tokens that a verification commits; -1 past them."""
        before = self._committed
        for token_S in token_SR.unbind(1):
            before = self.after(before._replace(tokens={}), token_S)
        tokens = self._committed.tokens
        if tokens:
            known = token_SR.tolist()
            tokens = {s: earlier + [token for token in known[s] if token >= 0] for s, earlier in tokens.items()}
        self._committed = before._replace(tokens=tokens)

    def _make(self, vocabulary: int) -> None:
        """The tensors over the vocabulary."""
        self._vocabulary, shape = vocabulary, (len(self._params), vocabulary)
        bias_SV = ends_SV = count_SV = prompt_SV = None
        if any(p.logit_bias for p in self._params):
            bias_SV = torch.zeros(shape, dtype=torch.float64)
            for s, p in enumerate(self._params):
                for token, value in cast(tuple[tuple[int, float], ...], p.logit_bias):
                    bias_SV[s, token] = value
        if self._forbids:
            ends_SV = torch.zeros(shape, dtype=torch.bool)
            for s, prefix in enumerate(self._prefixes):
                ends_SV[s, [token for token in prefix.stops if 0 <= token < vocabulary]] = True
        if self._penalises:
            count_SV, prompt_SV = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.bool)
            for s, (tokens, prompt, _) in enumerate(self._prefixes):
                made = torch.tensor(tokens[prompt:], dtype=torch.int64)
                count_SV[s] = torch.bincount(made, minlength=vocabulary).to(torch.int32)
                prompt_SV[s, list(tokens[:prompt])] = True
        host = bias_SV, ends_SV, count_SV, prompt_SV
        self._bias_SV, self._ends_SV, count_SV, self._prompt_SV = upload(host, self._device)
        self._committed = self._committed._replace(count_SV=count_SV)


def _checked(found: object, like_V: torch.Tensor) -> torch.Tensor:
    """The logits that a processor returned; RequestError if no token can be drawn from them."""
    remedy = "return a tensor of the logits' shape with at least one finite number, none of them NaN or +inf"
    if not isinstance(found, torch.Tensor) or found.shape != like_V.shape:
        given = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise RequestError("logits_processors", f"a function returned {given} for logits of shape {tuple(like_V.shape)}", remedy)
    top = found.max().item()
    if not -float("inf") < top < float("inf"):
        raise RequestError("logits_processors", f"a function returned {top} as the largest logit", remedy)
    return found.to(like_V)
