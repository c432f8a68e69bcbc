"""One decode step, as the schedule has it: rows, forward, verification, and the drafts of the next step.

Invariants:
- The vocabulary head sees verify rows, then only the mask rows of the proposal that was selected.
- A step may run any schedule, whatever ran before it. Drafts that wait are verified from the first one on, as many as the
  schedule takes, or dropped; which it is never depends on their values.
- A sample's lengths and tokens are the caller's: nothing is committed here.

Legend: S sequences of the step, D of them decoding, T rows, M most drafts, R = M + 1, V vocabulary, B mask rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..model.layout import DecodeRows, decode
from ..model.packed import PackedForward
from ..model.policy import Policy, Routing
from .cache import PagedCache
from .sampling.drafts import Drafts, SamplerRows, Verdict
from .sampling.sampler import draft, verify
from .schedule import Schedule
from .sequence import Sample
from .types import StepTrace

Step = Sequence[tuple[Sample, int]]
"""Samples of a step, each with the number of prompt rows it prefills (0: it decodes)."""


@dataclass
class _Pass:
    """One forward: final hidden states, and the pack's first row of each sequence."""

    hidden_TD: torch.Tensor
    first_S: np.ndarray


class StepRunner:
    """Runs steps of one policy over one cache.

    Attributes:
        block_size: most mask rows of a block.
    """

    def __init__(self, policy: Policy, cache: PagedCache, block_size: int) -> None:
        self.policy, self.cache, self.block_size = policy, cache, block_size
        self._rows_of: list[Sample] = []
        self._rows: SamplerRows | None = None
        self.take_weights()

    def take_weights(self) -> None:
        """To be called when the policy's weights have changed."""
        self._network = PackedForward(self.policy) if PackedForward.serves(self.policy) else self.policy

    def run(self, schedule: Schedule, step: Step) -> Verdict | None:
        """The verdict on the decoding samples, in the step's order; None when there are none.

        Args:
            schedule: with sizes (`Schedule.within`).
        """
        if schedule.kind == "two_pass":
            return self._two_pass(schedule, step)
        return self._fused(schedule, step)

    def _fused(self, schedule: Schedule, step: Step) -> Verdict | None:
        """Verify the last step's drafts and propose for the next step in one forward; `ar` does neither."""
        decoding = [sample for sample, chunk in step if not chunk]
        most, block = (0, 0) if schedule.kind == "ar" else (schedule.drafts or 0, schedule.block or 0)
        drafts = self._waiting(decoding, most)
        drafted, counts = drafts.token_SM.tolist(), drafts.count_S.tolist()
        plans: list[DecodeRows] = []
        where: list[int] = []
        for s, (sample, chunk) in enumerate(step):
            if chunk:
                plans.append(DecodeRows(_prompt_rows(sample, chunk), _start(sample), (), 0))
                continue
            d = len(where)
            where.append(s)
            levels = [level + 1 for level in _proposals(schedule, sample) if level <= counts[d]]
            tokens = [sample.tokens[-1], *drafted[d][: counts[d]]]
            plans.append(DecodeRows(tokens, _start(sample), tuple(levels), block if levels else 0))
        out = self._forward(step, plans)
        if not decoding:
            return None
        first_D = out.first_S[where]
        rows = self._sampler_rows(decoding)
        anchor_D = torch.tensor([s.anchor for s in decoding])
        verdict = verify(rows, self._logits(out, first_D, drafts.token_SM.shape[1] + 1), drafts, anchor_D)
        count_D, slot_D = [], []
        for d, (sample, a) in enumerate(zip(decoding, verdict.accepted_S.tolist(), strict=True)):
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
            slot_D.append(int(first_D[d]) + len(plan.clean) + i * block + skip)
            sample.draft_start, sample.draft_length = plan.start + plan.proposals[i], block
        sampled_D = verdict.token_SR.gather(1, verdict.accepted_S[:, None])[:, 0]
        fresh = self._draft(rows, out, np.array(slot_D), count_D, anchor_D + verdict.accepted_S + 1, sampled_D)
        for d, sample in enumerate(decoding):
            sample.drafts, sample.draft_index, sample.draft_count = fresh, d, count_D[d]
        return verdict

    def _two_pass(self, schedule: Schedule, step: Step) -> Verdict | None:
        """Pass A: anchor and masks, giving p after the anchor and drafts that know it. Pass B: the drafts."""
        plans, decoding, counts, where = [], [], [], []
        for s, (sample, chunk) in enumerate(step):
            if chunk:
                plans.append(DecodeRows(_prompt_rows(sample, chunk), _start(sample), (), 0))
                continue
            wide = 0 if sample.request.params.sampler == "ar" else min(schedule.drafts or 0, sample.remaining - 1)
            plans.append(DecodeRows(sample.tokens[-1:], _start(sample), (1,) if wide > 0 else (), max(wide, 0)))
            decoding.append(sample)
            counts.append(max(wide, 0))
            where.append(s)
        out = self._forward(step, plans)
        if not decoding:
            return None
        first_D = out.first_S[where]
        rows = self._sampler_rows(decoding)
        anchor_D = torch.tensor([s.anchor for s in decoding])
        anchored_D = torch.tensor([s.tokens[-1] for s in decoding])
        drafts = self._draft(rows, out, first_D + 1, counts, anchor_D, anchored_D) or Drafts.none(len(decoding))
        p_logits = [self._logits(out, first_D, 1)]
        second = [d for d, count in enumerate(counts) if count]
        if second:
            drafted = drafts.token_SM.tolist()
            plans_b = [DecodeRows(drafted[d][: counts[d]], decoding[d].anchor + 1, (), 0) for d in second]
            after = self._forward([(decoding[d], 0) for d in second], plans_b)
            logits = self._logits(after, after.first_S, drafts.token_SM.shape[1])
            if len(second) < len(decoding):
                rest = logits.new_zeros(len(decoding), *logits.shape[1:])
                rest[second] = logits
                logits = rest
            p_logits.append(logits)
        verdict = verify(rows, torch.cat(p_logits, dim=1), drafts, anchor_D)
        for d, (sample, a) in enumerate(zip(decoding, verdict.accepted_S.tolist(), strict=True)):
            sample.draft_start, sample.draft_length = sample.anchor + 1, counts[d]
            _trace(sample, counts[d], a, forwards=2 if counts[d] else 1)
            sample.drafts, sample.draft_count = None, 0
        return verdict

    def _waiting(self, decoding: Sequence[Sample], most: int) -> Drafts:
        """The first `most` drafts of each sample, in order; runs of one batch are selected together."""
        if not most or all(sample.drafts is None for sample in decoding):
            return Drafts.none(len(decoding), self.policy.device)
        parts: list[tuple[Drafts | None, list[int]]] = []
        for sample in decoding:
            if parts and parts[-1][0] is sample.drafts:
                parts[-1][1].append(sample.draft_index)
            else:
                parts.append((sample.drafts, [sample.draft_index]))
        chosen = [
            Drafts.none(len(index), self.policy.device) if batch is None else batch.select(torch.tensor(index))
            for batch, index in parts
        ]
        drafts = chosen[0] if len(chosen) == 1 else Drafts.join(chosen)
        return drafts.limit(torch.tensor([min(max(s.remaining - 1, 0), most) for s in decoding]))

    def _forward(self, step: Step, plans: list[DecodeRows]) -> _Pass:
        layout = decode(plans, self.policy.mask_token_id).to(self.policy.device)
        wanted = [s for s, (sample, _) in enumerate(step) if sample.experts is not None]
        routing = Routing([], []) if wanted else None
        held = [sample.held for sample, _ in step if sample.held is not None]
        hidden_TD = self._network(layout, self.cache.view(held, layout), routing)
        counts = np.array([len(p.clean) + len(p.proposals) * p.block_length for p in plans])
        first_S = np.cumsum(counts) - counts
        if routing is not None:
            expert_TL = torch.stack(routing.expert_LT, dim=1).cpu().numpy()
            for s in wanted:
                rows = expert_TL[first_S[s] : first_S[s] + len(plans[s].clean)]
                step[s][0].record_experts(plans[s].start, rows)
        return _Pass(hidden_TD, first_S)

    def _logits(self, out: _Pass, first_D: np.ndarray, width: int) -> torch.Tensor:
        """logits_DRV of `width` rows from each first row; rows past a sequence's own hold anything."""
        index = torch.from_numpy(first_D[:, None] + np.arange(width)).clamp_max(out.hidden_TD.shape[0] - 1)
        return self.policy.head(out.hidden_TD[index.to(out.hidden_TD.device)])

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
        logits, counts_D = self._logits(out, slot_D, width), torch.tensor(count_D)
        return draft(rows, logits, anchor_D, self.policy.mask_token_id, counts_D, self.policy.markov, previous_D)

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


def _prompt_rows(sample: Sample, chunk: int) -> list[int]:
    start = _start(sample)
    return sample.tokens[start : start + chunk]


def _proposals(schedule: Schedule, sample: Sample) -> tuple[int, ...]:
    if schedule.kind == "ar" or sample.request.params.sampler == "ar" or sample.remaining < 2:
        return ()
    return schedule.levels


def _trace(sample: Sample, drafted: int, accepted: int, forwards: int) -> None:
    """Note the step; `sample.draft_start` is still that of the block the verified drafts came from."""
    start, length = (sample.draft_start, sample.draft_length) if drafted else (-1, 0)
    sample.trace.append(StepTrace(sample.anchor, drafted, accepted, start, length, forwards))
    sample.forwards += forwards
