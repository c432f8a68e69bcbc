"""Data of the samplers: a batch's seeds and parameters, drafts that wait for verification, and the verdict on them.

Invariants:
- Rows of one batch may differ in sampler and parameters. Rows that are computed alike form a group, and a row takes the
  same path whatever its neighbours are.
- Drafts are held per sequence: they can be selected, cut short and joined when the batch changes between two steps.

Legend: S = sequences, M = most drafts of one of them, R = M + 1 verify rows, V = vocabulary, G = rows of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...kernels.transfer import upload
from ..params import SamplingParams
from .adjustment import Adjustment, Prefix


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are computed alike.

    Attributes:
        sampler: the rows' sampler.
        greedy: temperature 0. cut: some cut-off is active (never both).
        index_G: which rows; None when the group is the whole batch.
        adjustment: what changes the rows' logits before the temperature; None where nothing does.
    """

    sampler: str
    greedy: bool
    cut: bool
    index_G: torch.Tensor | None
    adjustment: Adjustment | None = None


@dataclass(frozen=True, slots=True)
class SamplerRows:
    """Seeds and sampling parameters of a batch, one entry per sequence; make one whenever the batch changes.

    Attributes:
        seed_S: int64, of `seeds.sample_seed`. temperature_S, top_p_S, min_p_S, mix_weight_S: float64. top_k_S: int64.
        draft_temperature_S: float64, at which drafts are drawn: temperature_S times `draft_temperature`.
        groups: a partition of the batch.
        top: most alternatives that one of the rows records (`SamplingParams.alternatives`).
        listed_SK: int64, the tokens that rows record whatever their probability (`SamplingParams.logprob_token_ids`), -1 in
            padding; None where no row does.
    """

    seed_S: torch.Tensor
    temperature_S: torch.Tensor
    top_k_S: torch.Tensor
    top_p_S: torch.Tensor
    min_p_S: torch.Tensor
    mix_weight_S: torch.Tensor
    draft_temperature_S: torch.Tensor
    groups: tuple[Group, ...]
    draft_temperature: float = 1.0
    top: int = 0
    listed_SK: torch.Tensor | None = None

    @classmethod
    def make(
        cls, params: Sequence[SamplingParams], seeds: Sequence[int], device: torch.device | str = "cpu",
        prefixes: Sequence[Prefix] = (), draft_temperature: float = 1.0,
    ) -> SamplerRows:  # fmt: skip
        """Args: params, seeds and prefixes, one each per sequence; seeds are those of `seeds.sample_seed`. Prefixes may be left
        out where no parameters adjust logits. draft_temperature: as in `EngineConfig`."""
        assert len(params) == len(seeds) > 0
        device = torch.device(device)
        members: dict[tuple[str, bool, bool, bool], list[int]] = {}
        for s, p in enumerate(params):
            greedy = p.temperature == 0
            cut = not greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
            members.setdefault((p.sampler, greedy, cut, p.adjusts), []).append(s)

        def adjustment(index: list[int]) -> Adjustment:
            return Adjustment([params[s] for s in index], [prefixes[s] for s in index], device)

        whole = len(members) == 1
        groups = tuple(
            Group(sampler, greedy, cut, None if whole else torch.tensor(index), adjustment(index) if adjusts else None)
            for (sampler, greedy, cut, adjusts), index in members.items()
        )

        numbers = [(p.temperature, p.top_p, p.min_p, p.mix_weight, p.temperature * draft_temperature) for p in params]
        temperature_S, top_p_S, min_p_S, mix_weight_S, drawn_S = map(torch.from_numpy, np.array(numbers, np.float64).T.copy())
        seed_S, top_k_S = map(torch.from_numpy, np.array([seeds, [p.top_k for p in params]], np.int64))
        top, listed_SK = max([p.alternatives for p in params]), None
        if top and any(p.logprob_token_ids for p in params):
            listed = [[*p.logprob_token_ids] + [-1] * (top - len(p.logprob_token_ids)) for p in params]
            listed_SK = torch.tensor(listed, dtype=torch.int64)
        rows = cls(
            seed_S, temperature_S, top_k_S, top_p_S, min_p_S, mix_weight_S, drawn_S, groups, draft_temperature, top, listed_SK
        )  # fmt: skip
        return upload(rows, device)

    def with_seeds(self, seed_S: torch.Tensor) -> SamplerRows:
        """The same parameters with other seeds, on the same device; for rows without adjustments."""
        return SamplerRows(
            seed_S, self.temperature_S, self.top_k_S, self.top_p_S, self.min_p_S, self.mix_weight_S, self.draft_temperature_S,
            self.groups, self.draft_temperature, self.top, self.listed_SK,
        )  # fmt: skip

    def of(self, group: Group) -> SamplerRows:
        """The rows of one group alone."""
        index_G = group.index_G
        if index_G is None:
            return self
        return SamplerRows(
            seed_S=self.seed_S[index_G],
            temperature_S=self.temperature_S[index_G],
            top_k_S=self.top_k_S[index_G],
            top_p_S=self.top_p_S[index_G],
            min_p_S=self.min_p_S[index_G],
            mix_weight_S=self.mix_weight_S[index_G],
            draft_temperature_S=self.draft_temperature_S[index_G],
            groups=(group,),
            draft_temperature=self.draft_temperature,
        )


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafts waiting for verification.

    Attributes:
        token_SM: int64, -1 in padding. count_S: int64.
        logq_SMV: the distribution each draft was drawn from; None when no row of the batch has drafts that need it.
            Padding and rows whose sampler does not need it may hold anything.
        q_logits_SMV: q's own logits, the mask token at -inf; as logq_SMV, for `mixed`.
        q_lse_SM: float64, their log-sum-exp over `draft_temperature_S`, where kernels drew the drafts: they keep it and
            q_logits_SMV in place of logq_SMV.
    """

    token_SM: torch.Tensor
    count_S: torch.Tensor
    logq_SMV: torch.Tensor | None = None
    q_logits_SMV: torch.Tensor | None = None
    q_lse_SM: torch.Tensor | None = None

    @classmethod
    def none(cls, sequences: int, device: torch.device | str = "cpu") -> Drafts:
        """No drafts for any of S sequences (M = 0)."""
        token_SM = torch.empty((sequences, 0), dtype=torch.int64, device=device)
        return cls(token_SM, torch.zeros(sequences, dtype=torch.int64, device=device))

    def select(self, index_N: torch.Tensor) -> Drafts:
        """The drafts of the sequences `index_N` (int64[N]), in that order."""
        return Drafts(
            self.token_SM[index_N],
            self.count_S[index_N],
            None if self.logq_SMV is None else self.logq_SMV[index_N],
            None if self.q_logits_SMV is None else self.q_logits_SMV[index_N],
            None if self.q_lse_SM is None else self.q_lse_SM[index_N],
        )

    def row(self, index: int, m: int) -> Drafts:
        """A copy of the first `m` drafts of one sequence: nothing of the others is kept alive."""

        def copied(part: torch.Tensor) -> torch.Tensor:
            return part[index : index + 1, :m].clone()

        return Drafts(
            copied(self.token_SM),
            self.count_S[index : index + 1].clone(),
            None if self.logq_SMV is None else copied(self.logq_SMV),
            None if self.q_logits_SMV is None else copied(self.q_logits_SMV),
            None if self.q_lse_SM is None else copied(self.q_lse_SM),
        )

    def limit(self, most_S: torch.Tensor, most: int | None = None) -> Drafts:
        """At most `most_S` (int64[S]) drafts of each sequence: the first ones.

        Args: most, M after it, which no count left exceeds; None for the largest of them, which is read from the device.
        """
        count_S = torch.minimum(self.count_S, most_S)
        slot_M = torch.arange(self.token_SM.shape[1], device=self.token_SM.device)
        token_SM = self.token_SM.masked_fill(slot_M >= count_S[:, None], -1)
        return replace(self, token_SM=token_SM, count_S=count_S).narrow(int(count_S.max()) if most is None else most)

    def narrow(self, m: int) -> Drafts:
        """The same drafts with M = m, which no count exceeds."""
        if m == self.token_SM.shape[1]:
            return self
        return Drafts(
            self.token_SM[:, :m],
            self.count_S,
            None if self.logq_SMV is None else self.logq_SMV[:, :m],
            None if self.q_logits_SMV is None else self.q_logits_SMV[:, :m],
            None if self.q_lse_SM is None else self.q_lse_SM[:, :m],
        )

    @staticmethod
    def join(parts: Sequence[Drafts]) -> Drafts:
        """The drafts of several batches as one, in order, padded to the longest."""
        return Drafts(
            _stack([part.token_SM for part in parts], -1),
            torch.cat([part.count_S for part in parts]),
            _stack_distributions([(part.token_SM, part.logq_SMV) for part in parts]),
            _stack_distributions([(part.token_SM, part.q_logits_SMV) for part in parts]),
            _stack_distributions([(part.token_SM, part.q_lse_SM) for part in parts]),
        )


def _stack(parts: Sequence[torch.Tensor], pad: float) -> torch.Tensor:
    """Along S; M is padded to the longest with `pad`."""
    m = max(part.shape[1] for part in parts)
    if all(part.shape[1] == m for part in parts):
        return torch.cat(list(parts))
    out = parts[0].new_full((sum(len(part) for part in parts), m, *parts[0].shape[2:]), pad)
    start = 0
    for part in parts:
        out[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return out


def _stack_distributions(parts: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor | None:
    """[S, M, ...]; -inf where a part has none. In the widest of their dtypes."""
    known = next((x for _, x in parts if x is not None), None)
    if known is None:
        return None
    filled = [known.new_full((*token_SM.shape, *known.shape[2:]), -torch.inf) if x is None else x for token_SM, x in parts]
    if any(x.dtype != known.dtype for x in filled):
        filled = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in filled]
    return _stack(filled, -torch.inf)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one step commits. Row k of sequence s is the token at position anchor + 1 + k; rows past accepted_S are
    padding (-1, and 0 in the logarithms).

    Attributes:
        accepted_S: int64, a in 0 .. count; a + 1 tokens are committed.
        token_SR: int64, the accepted drafts and then one sampled token.
        logprob_SR: log p at the sampling temperature over the full vocabulary (temperature 0: at 1), for every sampler.
        behavior_logprob_SR: under the distribution sampled from: p with its cut-offs, or m with them for `mixed`.
        support_logmass_SR: log of the mass inside the cut-offs, of p (of m for `mixed`); 0 where nothing is cut. At
            temperature 0 the support is the one token. Where logits are adjusted, of the adjusted p.
        top_token_SRK, top_logprob_SRK: int64, float32; the most probable tokens of each row, most probable first, by the
            convention of `logprob_SR`. None where no row records any.
    """

    accepted_S: torch.Tensor
    token_SR: torch.Tensor
    logprob_SR: torch.Tensor
    behavior_logprob_SR: torch.Tensor
    support_logmass_SR: torch.Tensor
    top_token_SRK: torch.Tensor | None = None
    top_logprob_SRK: torch.Tensor | None = None

    @classmethod
    def padding(cls, sequences: int, width: int, like: Verdict) -> Verdict:
        """A verdict of S sequences and R rows to `put` the groups of a batch into; dtypes and device as in `like`."""

        def wide(part: torch.Tensor, fill: float) -> torch.Tensor:
            return part.new_full((sequences, width), fill)

        return cls(
            accepted_S=like.accepted_S.new_zeros(sequences),
            token_SR=wide(like.token_SR, -1),
            logprob_SR=wide(like.logprob_SR, 0),
            behavior_logprob_SR=wide(like.behavior_logprob_SR, 0),
            support_logmass_SR=wide(like.support_logmass_SR, 0),
        )

    def put(self, index_G: torch.Tensor, part: Verdict) -> None:
        """Write the verdict of the sequences `index_G`, which may have fewer rows, in place."""
        r = part.token_SR.shape[1]
        self.accepted_S[index_G] = part.accepted_S
        self.token_SR[index_G, :r] = part.token_SR
        self.logprob_SR[index_G, :r] = part.logprob_SR
        self.behavior_logprob_SR[index_G, :r] = part.behavior_logprob_SR
        self.support_logmass_SR[index_G, :r] = part.support_logmass_SR
