"""The four samplers: which drafts are drawn, which are accepted, and which token follows them.

Invariants:
- Every number drawn for a position is keyed by (seed of the sample, position, purpose, token id) and by nothing else:
  not by batch, row, step or retry.
- p is never altered: the mask token is an ordinary token to it. q gives the mask token probability zero.
- Draft k (k = 1 .. count) stands for position anchor + k, and verify row k - 1 holds p for that position. `draft` and
  `verify` count from the same anchor, so drafts and rows cannot be misaligned here.

| sampler | committed tokens |
|---|---|
| `ar` | x = argmax(log p + g); no drafts |
| `coupled` | the same x with the same g; drafts argmax(log q + g), accepted while they are the tokens of `ar` |
| `lossless` | drafts from q; accepted with min(1, p/q), else the residual: distributed as p |
| `mixed` | as `lossless`, with m = softmax of the mixed logits in place of p; m = p in rows without a draft |

Rows that the kernels of the device serve take them (`kernels.serves`). All other rows are computed here in torch. At
temperature 0 every sampler accepts while the draft is the most probable token of its target.

Legend: S = sequences, M = most drafts of one of them, R = M + 1 verify rows, V = vocabulary, G = rows of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...kernels.philox import Purpose, gumbel, uniform
from ...kernels.verify import count_matching, draw, gumbel_argmax, logprobs, mix_logits, reject
from . import kernels
from .adjustment import Adjustment
from .drafts import Drafts, Group, SamplerRows, Verdict
from .processing import Processed, processed, widen
from .top import with_top

__all__ = ["Drafts", "SamplerRows", "Verdict", "draft", "verify"]

Markov = Callable[[torch.Tensor], torch.Tensor]
"""int64[...] tokens -> what they add to the logits of the rows after them, [..., V]."""


def draft(
    rows: SamplerRows,
    q_logits_SMV: torch.Tensor,
    anchor_S: torch.Tensor,
    mask_token: int,
    count_S: torch.Tensor | None = None,
    markov: Markov | None = None,
    previous_S: torch.Tensor | None = None,
    p_first_SRV: torch.Tensor | None = None,
) -> Drafts:
    """Draw drafts from q.

    Args:
        q_logits_SMV: raw logits of the mask rows; row k - 1 predicts position anchor + k. Padding may hold anything. Given
            away: the drafts may keep this very tensor, the mask token's logit replaced.
        anchor_S: int64, position of the last committed token.
        mask_token: its id; never drafted.
        count_S: int64, how many rows of each sequence are real; None: all M. `ar` rows get no drafts in any case.
        markov: what a token adds to the logits of the row after it (`MarkovHead`). Each draft is then drawn given the
            one before it, and q, wherever it is kept or compared, is that conditional distribution.
        previous_S: int64, the token at the anchor, for `markov`.
        p_first_SRV: raw logits of verify rows; the first has p for the position after the anchor, where it is known by now. It is
            then q of the first draft, which is p's own token: it is accepted, unless p would have drawn the mask token. Not for
            `mixed`, whose target is made of p and the block's q.
    """
    s, m, _ = q_logits_SMV.shape
    if count_S is None:
        count_S = torch.full((s,), m, dtype=torch.int64, device=q_logits_SMV.device)
    if len(rows.groups) == 1:
        return _draft_group(rows, q_logits_SMV, anchor_S, mask_token, count_S, markov, previous_S, p_first_SRV)
    device = q_logits_SMV.device
    count_S, token_SM = count_S.clone(), torch.full((s, m), -1, dtype=torch.int64, device=device)
    large: dict[str, torch.Tensor] = {}
    for group in rows.groups:
        i = group.index_G
        before, p_first = (None if each is None else each[i] for each in (previous_S, p_first_SRV))
        part = _draft_group(rows.of(group), q_logits_SMV[i], anchor_S[i], mask_token, count_S[i], markov, before, p_first)
        count_S[i], token_SM[i] = part.count_S, part.token_SM
        for name in ("logq_SMV", "q_logits_SMV", "q_lse_SM"):
            known = getattr(part, name)
            if known is not None:
                if name not in large:
                    large[name] = widen(known).new_full((s, m, *known.shape[2:]), -torch.inf)
                large[name][i] = known.to(large[name].dtype)
    return Drafts(token_SM, count_S, **large)


def _draft_group(
    rows: SamplerRows,
    q_logits_SMV: torch.Tensor,
    anchor_S: torch.Tensor,
    mask_token: int,
    count_S: torch.Tensor,
    markov: Markov | None,
    previous_S: torch.Tensor | None,
    p_first_SRV: torch.Tensor | None,
) -> Drafts:
    (group,) = rows.groups
    s, m, vocab_size = q_logits_SMV.shape
    if group.sampler == "ar" or m == 0:
        return Drafts(torch.full((s, m), -1, dtype=torch.int64, device=q_logits_SMV.device), torch.zeros_like(count_S))
    if group.sampler == "mixed":
        p_first_SRV = None
    if kernels.serves(group, q_logits_SMV):
        return kernels.draft(rows, q_logits_SMV, anchor_S, mask_token, count_S, markov, previous_S, p_first_SRV)
    markov_from = 0
    if p_first_SRV is not None:
        # Over the draft temperature, at which drafts are drawn, this is p at the request's own temperature. Logits that are
        # adjusted are scaled behind the adjustment (`_Chain`).
        scale = rows.draft_temperature if group.adjustment is None else 1.0
        torch.mul(p_first_SRV[:, 0], scale, out=q_logits_SMV.select(1, 0))
        markov_from = 1
    q_logits_SMV = widen(q_logits_SMV).clone()
    q_logits_SMV[..., mask_token] = -torch.inf
    slot_M = torch.arange(m, device=q_logits_SMV.device)
    seed_S1, position_SM = rows.seed_S[:, None], anchor_S[:, None] + 1 + slot_M
    noise = None
    if not group.greedy:
        noise = gumbel(seed_S1, position_SM, vocab_size, Purpose.NOISE, q_logits_SMV.dtype) \
            if group.sampler == "coupled" else uniform(seed_S1, position_SM, Purpose.DRAFT)
    if markov is None and group.adjustment is None:
        token_SM, logq_SMV = _choose(rows, group, q_logits_SMV, noise)
    else:
        chain = _Chain(markov, markov_from, previous_S, group.adjustment, count_S, mask_token)
        token_SM, logq_SMV = chain.draw(rows, group, q_logits_SMV, noise)
    token_SM = torch.where(slot_M < count_S[:, None], token_SM, -1)
    return Drafts(token_SM, count_S, logq_SMV, q_logits_SMV if group.sampler == "mixed" else None)


@dataclass(frozen=True)
class _Chain:
    """Drafts drawn slot by slot, each given those before it.

    Attributes:
        markov: what it gives for the token before is added to the logits of a slot, from slot `markov_from` on. Slots before it
            hold p's own logits.
        previous_S: the token before the first slot.
        adjustment: adjusts the logits of each slot by the drafts before it.
    """

    markov: Markov | None
    markov_from: int
    previous_S: torch.Tensor | None
    adjustment: Adjustment | None
    count_S: torch.Tensor
    mask_token: int

    def draw(
        self, rows: SamplerRows, group: Group, q_logits_SMV: torch.Tensor, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_choose`; `q_logits_SMV` becomes what was drawn from."""
        chosen, previous_S1 = [], None if self.previous_S is None else self.previous_S[:, None]
        adjustment, before = self.adjustment, None
        if adjustment is not None:
            before = adjustment.start(q_logits_SMV.shape[-1], self.count_S > 0)
        for k in range(q_logits_SMV.shape[1]):
            if self.markov is not None and k >= self.markov_from:
                assert previous_S1 is not None
                q_logits_SMV[:, k : k + 1] += self.markov(previous_S1)
            if adjustment is not None and before is not None:
                q_logits_SMV[:, k] = self._drawable(adjustment.adjusted(before, q_logits_SMV[:, k]), q_logits_SMV[:, k])
                if k < self.markov_from:
                    q_logits_SMV[:, k] *= rows.draft_temperature
            part = slice(k, k + 1)
            chosen.append(_choose(rows, group, q_logits_SMV[:, part], None if noise is None else noise[:, part]))
            previous_S1 = chosen[-1][0]
            if adjustment is not None and before is not None:
                before = adjustment.after(before, torch.where(k + 1 < self.count_S, previous_S1[:, 0], -1))
        kept = [logq_S1V for _, logq_S1V in chosen if logq_S1V is not None]
        return torch.cat([token_S1 for token_S1, _ in chosen], 1), torch.cat(kept, 1) if kept else None

    def _drawable(self, adjusted_SV: torch.Tensor, q_logits_SV: torch.Tensor) -> torch.Tensor:
        """Adjusted logits without the mask token; q's own where that leaves no token."""
        adjusted_SV[:, self.mask_token] = -torch.inf
        return torch.where(adjusted_SV.amax(-1, keepdim=True) > -torch.inf, adjusted_SV, q_logits_SV)


def _choose(
    rows: SamplerRows, group: Group, q_logits_SKV: torch.Tensor, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens drawn from q, and log q where verification compares with it. (token_SK, logq_SKV)"""
    if group.greedy:
        return q_logits_SKV.argmax(-1), None
    assert noise is not None
    q = _process(rows, group, q_logits_SKV, rows.draft_temperature_S)
    if group.sampler == "coupled":
        return gumbel_argmax(q.scaled, noise), None
    return draw(q.logp.exp(), noise), q.logp


def verify(rows: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
    """Accept drafts and draw the token after them.

    Args:
        p_logits_SRV: raw logits of the verify rows [anchor, d_1 .. d_M], so R = M + 1; row k is p of position
            anchor + 1 + k. Rows past a sequence's count may hold anything. Given away: where cut-offs are active, logits outside
            the support may become -inf.
        drafts: drawn by `draft` for the same rows and the same anchors; `Drafts.none` where there are none.
        anchor_S: int64, position of the last committed token.
    """
    assert p_logits_SRV.shape[1] == drafts.token_SM.shape[1] + 1
    mine_SRV = p_logits_SRV.clone() if rows.top and len(rows.groups) == 1 and rows.groups[0].cut else p_logits_SRV
    verdict = _verify_groups(rows, mine_SRV, drafts, anchor_S)
    return with_top(verdict, p_logits_SRV, rows.temperature_S, rows.top, rows.listed_SK) if rows.top else verdict


def _verify_groups(rows: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
    if len(rows.groups) == 1:
        return _verify_group(rows, p_logits_SRV, drafts, anchor_S)
    s, r = p_logits_SRV.shape[:2]
    out: Verdict | None = None
    for group in rows.groups:
        i = group.index_G
        assert i is not None
        # If the host knows that a group has no drafts, its padding rows are dropped: each would cost the noise of a whole row.
        rejects = group.sampler in ("lossless", "mixed") and not group.greedy
        # The q in `drafts` may belong to other groups, in a form that this group does not read.
        known = (drafts.q_lse_SM if kernels.serves(group, p_logits_SRV) else drafts.logq_SMV) is not None
        width = 1 if group.sampler == "ar" or (rejects and not known) else r
        part_drafts = drafts.select(i).narrow(width - 1)
        part = _verify_group(rows.of(group), p_logits_SRV[i, :width], part_drafts, anchor_S[i])
        out = Verdict.padding(s, r, part) if out is None else out
        out.put(i, part)
    assert out is not None
    return out


def _verify_group(rows: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
    (group,) = rows.groups
    if kernels.serves(group, p_logits_SRV):
        return kernels.verify(rows, p_logits_SRV, drafts, anchor_S)
    r, vocab_size = p_logits_SRV.shape[1:]
    m = r - 1
    p_logits_SRV = widen(p_logits_SRV)
    row_R = torch.arange(r, device=p_logits_SRV.device)
    seed_S1, position_SR = rows.seed_S[:, None], anchor_S[:, None] + 1 + row_R

    adjustment = group.adjustment
    target_SRV = p_logits_SRV if adjustment is None else adjustment.along(p_logits_SRV, drafts.token_SM)
    if group.sampler == "mixed" and drafts.q_logits_SMV is not None:
        p_SMV = target_SRV[:, :m]
        mixed_SMV = mix_logits(p_SMV, drafts.q_logits_SMV, rows.mix_weight_S[:, None])
        mixes_SM = row_R[:m] < drafts.count_S[:, None]
        if adjustment is not None:  # p and q may have no token in common
            mixes_SM &= mixed_SMV.amax(-1) > -torch.inf
        target_SRV = torch.cat((torch.where(mixes_SM[..., None], mixed_SMV, p_SMV), target_SRV[:, m:]), 1)
    target = _process(rows, group, target_SRV, rows.temperature_S)

    if group.greedy or group.sampler in ("ar", "coupled"):
        if group.greedy:
            x_SR = target_SRV.argmax(-1)
        else:
            noise_SRV = gumbel(seed_S1, position_SR, vocab_size, Purpose.NOISE, p_logits_SRV.dtype)
            x_SR = gumbel_argmax(target.scaled, noise_SRV)
        accepted_S = count_matching(x_SR[:, :m], drafts.token_SM, drafts.count_S)
        token_SR = x_SR
    else:
        accepted_S, x_S = reject(target.logp, drafts.logq_SMV, drafts.token_SM, drafts.count_S, rows.seed_S, anchor_S)
        token_SR = torch.cat((drafts.token_SM, x_S[:, None]), 1).where(row_R != accepted_S[:, None], x_S[:, None])

    committed_SR = row_R <= accepted_S[:, None]
    if adjustment is not None:
        adjustment.commit(torch.where(committed_SR, token_SR, -1))
    index_SR = token_SR.clamp(min=0)
    at_token_SR = target.logp.gather(-1, index_SR[..., None])[..., 0]
    temperature_SR = rows.temperature_S[:, None].expand_as(index_SR)
    logprob_N = logprobs(p_logits_SRV.flatten(0, 1), index_SR.flatten(), temperature_SR.flatten())
    logprob_SR = logprob_N.view_as(index_SR)
    same = target.logp is target.full_logp and target_SRV is p_logits_SRV
    return Verdict(
        accepted_S=accepted_S,
        token_SR=torch.where(committed_SR, token_SR, -1),
        logprob_SR=torch.where(committed_SR, logprob_SR, 0.0),
        behavior_logprob_SR=torch.where(committed_SR, logprob_SR if same else at_token_SR, 0.0),
        support_logmass_SR=torch.where(committed_SR, target.support_logmass, 0.0),
    )


def _process(rows: SamplerRows, group: Group, logits_SRV: torch.Tensor, temperature_S: torch.Tensor) -> Processed:
    return processed(
        logits_SRV,
        temperature_S[:, None],
        rows.top_k_S[:, None],
        rows.top_p_S[:, None],
        rows.min_p_S[:, None],
        any_cut=group.cut,
        any_greedy=group.greedy,
    )
