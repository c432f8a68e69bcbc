"""One decode step, as the schedule has it: rows, forward, verification, and the drafts of the next step.

Invariants:
- The vocabulary head sees verify rows, then only the mask rows of the proposal that was selected.
- A step may run any schedule, whatever ran before it. Drafts that wait are verified from the first one on, as many as the
  schedule takes, or dropped; which it is never depends on their values.
- A sample's lengths and tokens are the caller's: nothing is committed here.
- The host waits for the device once, to hear the verdict. Drafts stay on the device: the host knows how many there are, not
  which.

Legend: S sequences of the step, D of them decoding, T rows, M most drafts, R = M + 1, V vocabulary, B mask rows, N rows whose
tokens are drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from ..kernels.transfer import download, upload
from ..model.layout import DecodeRows
from ..model.policy import Policy, Routing
from .cache import PagedCache
from .forwards import Forwards, padded
from .sampling.drafts import Drafts, SamplerRows, Verdict
from .sampling.sampler import draft, verify
from .schedule import Schedule
from .sequence import Sample
from .types import StepTrace

Step = Sequence[tuple[Sample, int]]
"""Samples of a step, each with the number of prompt rows it prefills (0: it decodes)."""


@dataclass
class _Drafted:
    """Drafts that take rows of a pack: those of row `of_N[i]` of `token_DM` stand in sequence `where[i]`, `count_N[i]` of
    them, from its clean row `first` on."""

    token_DM: torch.Tensor
    of: Sequence[int]
    where: Sequence[int]
    count: Sequence[int]
    first: int

    def places(self, first_S: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Pack rows, and entries of the flat token_DM that go there."""
        most = self.token_DM.shape[1]
        slot = np.arange(most)
        real = slot < np.array(self.count)[:, None]
        row = (first_S[list(self.where)] + self.first)[:, None] + slot
        entry = np.array(self.of)[:, None] * most + slot
        return torch.from_numpy(row[real]), torch.from_numpy(entry[real])


@dataclass
class _Pass:
    """One forward: final hidden states, first row and clean rows of each sequence, p's logits where they were asked for, and
    what was sent along."""

    hidden_TD: torch.Tensor
    first_S: np.ndarray
    clean_S: np.ndarray
    logits_DRV: torch.Tensor
    also: list[torch.Tensor]


class StepRunner:
    """Runs steps of one policy over one cache.

    Attributes:
        block_size: most mask rows of a block.
    """

    def __init__(self, policy: Policy, cache: PagedCache, block_size: int, captured: bool | None = None) -> None:
        self.policy, self.cache, self.block_size = policy, cache, block_size
        self.forwards = Forwards(policy, cache, captured)
        self._rows_of: list[Sample] = []
        self._rows: SamplerRows | None = None
        self._routed: list[tuple[torch.Tensor, list[tuple[Sample, int, slice]]]] = []

    def take_weights(self) -> None:
        """To be called when the policy's weights have changed."""
        self.forwards.take_weights()

    def run(self, schedule: Schedule, step: Step) -> Verdict | None:
        """The verdict on the decoding samples, in the step's order, on the host; None when there are none.

        Args:
            schedule: with sizes (`Schedule.within`).
        """
        verdict = self._two_pass(schedule, step) if schedule.kind == "two_pass" else self._fused(schedule, step)
        if verdict is None and self._routed:
            self._heard([])
        return verdict

    def _fused(self, schedule: Schedule, step: Step) -> Verdict | None:
        """Verify the last step's drafts and propose for the next step in one forward; `ar` does neither."""
        decoding = [sample for sample, chunk in step if not chunk]
        most, block = (0, 0) if schedule.kind == "ar" else (schedule.drafts or 0, schedule.block or 0)
        drafts, counts = self._waiting(decoding, most)
        plans: list[DecodeRows] = []
        where: list[int] = []
        for s, (sample, chunk) in enumerate(step):
            if chunk:
                plans.append(_prompt(sample, chunk))
                continue
            count = counts[len(where)]
            where.append(s)
            levels = [level + 1 for level in _proposals(schedule, sample) if level <= count]
            tokens = [sample.tokens[-1], *self._unknown(count)]
            plans.append(DecodeRows(tokens, _start(sample), tuple(levels), block if levels else 0))
        offsets = () if schedule.kind == "ar" else tuple(level + 1 for level in schedule.levels)
        full = DecodeRows(self._unknown(1 + most), 0, offsets, block)
        drafted = _Drafted(drafts.token_SM, range(len(where)), where, counts, 1)
        anchors = [sample.anchor for sample in decoding]
        out = self._forward(step, plans, full, where, drafts.token_SM.shape[1] + 1, drafted, [anchors])
        if not decoding:
            return None
        rows, (anchor_D,) = self._sampler_rows(decoding), out.also
        verdict = self._verify(decoding, rows, out.logits_DRV, drafts, anchor_D)
        heard = self._heard_verdict(verdict)
        count_D, slot_D = [], []
        for d, (sample, a) in enumerate(zip(decoding, heard.accepted_S.tolist(), strict=True)):
            plan = plans[where[d]]
            _trace(sample, counts[d], a, forwards=1)
            usable = [i for i, offset in enumerate(plan.proposals) if offset - 1 <= a]
            if not usable or sample.remaining <= a + 2:
                count_D.append(0)
                slot_D.append(0)
                continue
            i = usable[-1]
            # Slot 0 stands for the token after `level` accepted drafts; the token that was sampled now stands `a - level`
            # places further, and the next drafts begin after it.
            skip = a - (plan.proposals[i] - 1) + 1
            count_D.append(max(min(block - skip, most), 0))
            slot_D.append(out.first_S[where[d]] + out.clean_S[where[d]] + i * block + skip)
            sample.draft_start, sample.draft_length = plan.start + plan.proposals[i], block
        sampled_D = verdict.token_SR.gather(1, verdict.accepted_S[:, None])[:, 0]
        fresh = self._draft(rows, out, np.array(slot_D), count_D, anchor_D + verdict.accepted_S + 1, sampled_D)
        for d, sample in enumerate(decoding):
            sample.drafts, sample.draft_index, sample.draft_count = fresh, d, count_D[d]
        return heard

    def _two_pass(self, schedule: Schedule, step: Step) -> Verdict | None:
        """Pass A: anchor and masks, giving p after the anchor and drafts that know it. Pass B: the drafts."""
        most = schedule.drafts or 0
        plans: list[DecodeRows] = []
        decoding, counts, where = [], [], []
        for s, (sample, chunk) in enumerate(step):
            if chunk:
                plans.append(_prompt(sample, chunk))
                continue
            count = 0 if sample.request.params.sampler == "ar" else max(min(most, sample.remaining - 1), 0)
            # A block is never cut short: how long it is would tell the draft where the sample ends.
            plans.append(DecodeRows(sample.tokens[-1:], _start(sample), (1,) if count else (), most if count else 0))
            decoding.append(sample)
            counts.append(count)
            where.append(s)
        anchors = [[sample.anchor for sample in decoding], [sample.tokens[-1] for sample in decoding]]
        out = self._forward(step, plans, DecodeRows(self._unknown(1), 0, (1,), most), where, 1, None, anchors)
        if not decoding:
            return None
        rows, (anchor_D, anchored_D) = self._sampler_rows(decoding), out.also
        first_D = out.first_S[where]
        drafts = self._draft(rows, out, first_D + 1, counts, anchor_D, anchored_D)
        p_logits_DRV = out.logits_DRV
        if drafts is None:
            drafts = Drafts.none(len(decoding), self.policy.device)
        else:
            second = [d for d, count in enumerate(counts) if count]
            count_N, where_N = [counts[d] for d in second], range(len(second))
            plans = [DecodeRows(self._unknown(counts[d]), decoding[d].anchor + 1, (), 0) for d in second]
            drafted = _Drafted(drafts.token_SM, second, where_N, count_N, 0)
            after = self._forward(
                [(decoding[d], 0) for d in second], plans, DecodeRows(self._unknown(most), 0, (), 0), where_N,
                drafts.token_SM.shape[1], drafted, [second],
            )  # fmt: skip
            rest_DMV = after.logits_DRV
            if len(second) < len(decoding):
                rest_DMV = rest_DMV.new_zeros(len(decoding), *rest_DMV.shape[1:]).index_copy_(0, after.also[0], rest_DMV)
            p_logits_DRV = torch.cat([p_logits_DRV, rest_DMV], dim=1)
        heard = self._heard_verdict(self._verify(decoding, rows, p_logits_DRV, drafts, anchor_D))
        for d, (sample, a) in enumerate(zip(decoding, heard.accepted_S.tolist(), strict=True)):
            sample.draft_start, sample.draft_length = sample.anchor + 1, most if counts[d] else 0
            _trace(sample, counts[d], a, forwards=2 if counts[d] else 1)
            sample.drafts, sample.draft_count = None, 0
        return heard

    def _verify(
        self, decoding: Sequence[Sample], rows: SamplerRows, p_logits_DRV: torch.Tensor, drafts: Drafts, anchor_D: torch.Tensor
    ) -> Verdict:
        """What becomes of these samples' drafts: benches force it (`bench/gpu`)."""
        return verify(rows, p_logits_DRV, drafts, anchor_D)

    def _waiting(self, decoding: Sequence[Sample], most: int) -> tuple[Drafts, list[int]]:
        """The first `most` drafts of each sample, in order, and how many; runs of one batch are selected together."""
        device = self.policy.device
        counts = [min(s.draft_count, max(s.remaining - 1, 0), most) if s.drafts else 0 for s in decoding]
        if not any(counts):
            return Drafts.none(len(decoding), device), counts
        parts: list[tuple[Drafts | None, list[int]]] = []
        for sample in decoding:
            if parts and parts[-1][0] is sample.drafts:
                parts[-1][1].append(sample.draft_index)
            else:
                parts.append((sample.drafts, [sample.draft_index]))
        count_D, *index = upload([torch.tensor(counts), *(torch.tensor(mine) for _, mine in parts)], device)
        chosen = []
        for (batch, mine), index_N in zip(parts, index, strict=True):
            if batch is None:
                chosen.append(Drafts.none(len(mine), device))
            else:  # The batch of the last step, mostly: nothing of it is copied then.
                chosen.append(batch if mine == list(range(len(batch.count_S))) else batch.select(index_N))
        drafts = chosen[0] if len(chosen) == 1 else Drafts.join(chosen)
        return drafts.limit(count_D, max(counts)), counts

    def _forward(
        self,
        step: Step,
        plans: list[DecodeRows],
        full: DecodeRows,
        where: Sequence[int],
        width: int,
        drafted: _Drafted | None,
        also: list[list[int]],
    ) -> _Pass:
        """One forward, and logits_DRV of the first `width` rows of the sequences `where`; rows past a sequence's own hold
        anything.

        Args:
            full: the rows of a sequence with nothing left out, for padding.
            drafted: rows whose tokens only the device knows.
            also: numbers to send along.
        """
        wanted = [s for s, (sample, _) in enumerate(step) if sample.experts is not None]
        held = [sample.held for sample, _ in step if sample.held is not None]
        recurs = self.forwards.captured and not wanted and not any(chunk for _, chunk in step)
        if recurs:
            plans, held = padded(plans, held, full)
        clean_S = np.array([len(p.clean) for p in plans])
        count_S = clean_S + np.array([len(p.proposals) * p.block_length for p in plans])
        first_S = np.cumsum(count_S) - count_S
        index = np.minimum(first_S[list(where)][:, None] + np.arange(width), count_S.sum() - 1)
        fills = drafted is not None and any(drafted.count)
        places = list(drafted.places(first_S)) if drafted is not None and fills else []
        index_DR, places, also_D = upload(
            (torch.from_numpy(index), places, [torch.tensor(numbers) for numbers in also]), self.policy.device
        )
        fill = None
        if drafted is not None and fills:
            row_N, token_N = places[0], drafted.token_DM.flatten().index_select(0, places[1])

            def fill(token_T: torch.Tensor) -> None:
                token_T.index_copy_(0, row_N, token_N)

        routing = Routing([], []) if wanted else None
        hidden_TD = self.forwards.run(plans, held, fill, routing, recurs)
        if routing is not None:
            spans = [(step[s][0], plans[s].start, slice(first_S[s], first_S[s] + clean_S[s])) for s in wanted]
            self._routed.append((torch.stack(routing.expert_LT, dim=1), spans))
        logits_DRV = self.forwards.head(hidden_TD[index_DR]) if len(where) else hidden_TD[:0]
        return _Pass(hidden_TD, first_S, clean_S, logits_DRV, also_D)

    def _draft(
        self,
        rows: SamplerRows,
        out: _Pass,
        slot_D: np.ndarray,
        count_D: list[int],
        anchor_D: torch.Tensor,
        previous_D: torch.Tensor,
    ) -> Drafts | None:
        """Draw drafts from the mask rows that begin at `slot_D`, after the tokens `previous_D` at `anchor_D`."""
        width = max(count_D, default=0)
        if not width:
            return None
        index = np.minimum(slot_D[:, None] + np.arange(width), len(out.hidden_TD) - 1)
        index_DM, counts_D = upload((torch.from_numpy(index), torch.tensor(count_D)), self.policy.device)
        logits_DMV = self.forwards.head(out.hidden_TD[index_DM])
        return draft(rows, logits_DMV, anchor_D, self.policy.mask_token_id, counts_D, self.forwards.markov, previous_D)

    def _unknown(self, count: int) -> list[int]:
        """Tokens of rows that are to be filled on the device."""
        return [self.policy.mask_token_id] * count

    def _heard_verdict(self, verdict: Verdict) -> Verdict:
        """The verdict on the host."""
        return Verdict(*self._heard([getattr(verdict, field.name) for field in fields(verdict)]))

    def _heard(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors on the host; with them comes which experts were chosen, where a sample keeps that."""
        routed, self._routed = self._routed, []
        heard = download([*tensors, *(expert_TL for expert_TL, _ in routed)])
        for (_, spans), expert_TL in zip(routed, heard[len(tensors) :], strict=True):
            for sample, position, span in spans:
                sample.record_experts(position, expert_TL[span].numpy())
        return heard[: len(tensors)]

    def _sampler_rows(self, decoding: list[Sample]) -> SamplerRows:
        # The samples themselves are kept and compared: another sample may come to live at a finished one's address.
        same = len(decoding) == len(self._rows_of) and all(map(lambda a, b: a is b, decoding, self._rows_of))
        if self._rows is None or not same:
            params = [s.request.params for s in decoding]
            self._rows = SamplerRows.make(params, [s.seed for s in decoding], self.policy.device)
            self._rows_of = decoding
        return self._rows


def _start(sample: Sample) -> int:
    assert sample.held is not None
    return sample.held.length


def _prompt(sample: Sample, chunk: int) -> DecodeRows:
    start = _start(sample)
    return DecodeRows(sample.tokens[start : start + chunk], start, (), 0)


def _proposals(schedule: Schedule, sample: Sample) -> tuple[int, ...]:
    if schedule.kind == "ar" or sample.request.params.sampler == "ar" or sample.remaining < 2:
        return ()
    return schedule.levels


def _trace(sample: Sample, drafted: int, accepted: int, forwards: int) -> None:
    """Note the step; `sample.draft_start` is still that of the block the verified drafts came from."""
    start, length = (sample.draft_start, sample.draft_length) if drafted else (-1, 0)
    sample.trace.append(StepTrace(sample.anchor, drafted, accepted, start, length, forwards))
    sample.forwards += forwards
