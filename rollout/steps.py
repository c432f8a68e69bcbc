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

import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..kernels.transfer import download, upload
from ..model.layout import DecodeRows
from ..model.policy import Policy
from .cache import PagedCache
from .forwards import Asked, Drafted, Forwards, Pass
from .sampling.adjustment import Prefix
from .sampling.drafts import Drafts, SamplerRows, Verdict
from .sampling.sampler import draft, verify
from .schedule import Schedule
from .sequence import Sample, Turn
from .types import StepTrace

Step = Sequence[Turn]


class StepRunner:
    """Runs steps of one policy over one cache.

    Attributes:
        block_size: most mask rows of a block.
    """

    def __init__(self, policy: Policy, cache: PagedCache, block_size: int, captured: bool = True) -> None:
        self.policy, self.cache, self.block_size = policy, cache, block_size
        self._device = policy.device
        self.forwards = Forwards(policy, cache, captured)
        self._rows_of: list[Sample] = []
        self._rows: SamplerRows | None = None
        self._routed: list[tuple[torch.Tensor, list[tuple[Sample, int, slice]]]] = []

    def take_weights(self) -> None:
        """To be called when the policy's weights have changed."""
        self.forwards.take_weights()

    def forget_samples(self) -> None:
        """To be called when samples were given up, also half way through a step."""
        self._rows_of, self._rows, self._routed = [], None, []

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
        decoding = _decoding(step)
        drafting = schedule.kind != "ar"
        most, block, levels = (schedule.drafts or 0, schedule.block or 0, schedule.levels) if drafting else (0, 0, (0,))
        drafts, count_D = self._waiting(decoding, most)
        remaining_D = np.array([sample.remaining for sample in decoding], dtype=np.int64)
        proposes_D = np.array([_takes_drafts(sample) and drafting for sample in decoding], dtype=bool) & (remaining_D > 1)

        def run(d: int) -> DecodeRows:
            count = int(count_D[d])
            offsets = tuple(level + 1 for level in levels if level <= count) if proposes_D[d] else ()
            tokens = [decoding[d].tokens[-1], *self._unknown(count)]
            return DecodeRows(tokens, decoding[d].anchor, offsets, block if offsets else 0)

        offsets = tuple(level + 1 for level in levels) if drafting else ()
        full = DecodeRows(self._unknown(1 + most), 0, offsets, block)
        drafted = Drafted(drafts.token_SM, np.arange(len(decoding)), count_D, 1)
        anchors, first = [sample.anchor for sample in decoding], [sample.tokens[-1] for sample in decoding]
        out = self._pass(step, run, full, anchors, first, drafts.token_SM.shape[1] + 1, drafted, [anchors])
        if not decoding:
            return None
        rows, (anchor_D,) = self._sampler_rows(decoding), out.also
        verdict = self._verify(decoding, rows, out.logits_DRV, drafts, anchor_D)
        heard = self._heard_verdict(verdict)
        accepted_D, level_L = heard.accepted_S.numpy(), np.array(levels)
        reached_D = np.searchsorted(level_L, accepted_D, side="right") - 1
        # Slot 0 stands for the token after `level` accepted drafts; the token that was sampled now stands `accepted - level`
        # places further, and the next drafts begin after it.
        skip_D = accepted_D - level_L[reached_D] + 1
        goes_D = proposes_D & (remaining_D > accepted_D + 2)
        fresh_D = np.where(goes_D, np.clip(block - skip_D, 0, most), 0)
        slot_D = np.where(goes_D, out.first_D + out.clean_D + reached_D * block + skip_D, 0)
        fresh = None
        if fresh_D.any():
            sampled_D = verdict.token_SR.gather(1, verdict.accepted_S[:, None])[:, 0]
            fresh = self._draft(rows, out, slot_D, fresh_D, anchor_D + verdict.accepted_S + 1, sampled_D)
        # From here on the device has work to do while the host keeps its books.
        numbers = zip(count_D.tolist(), accepted_D.tolist(), fresh_D.tolist(), level_L[reached_D].tolist(), strict=True)
        for d, (sample, (count, accepted, waiting, level)) in enumerate(zip(decoding, numbers, strict=True)):
            _trace(sample, count, accepted, forwards=1)
            sample.draft_start, sample.draft_length = sample.anchor + level + 1, block
            sample.drafts, sample.draft_index, sample.draft_count = fresh, d, waiting
        return heard

    def _two_pass(self, schedule: Schedule, step: Step) -> Verdict | None:
        """Pass A: anchor and masks, giving p after the anchor and drafts that know it, the first of them p's own. Pass B: the
        drafts."""
        most = schedule.drafts or 0
        decoding = _decoding(step)
        count_D = np.array([min(max(sample.remaining - 1, 0), most) * _takes_drafts(sample) for sample in decoding], np.int64)

        def run(d: int) -> DecodeRows:
            # A block is never cut short: how long it is would tell the draft where the sample ends.
            offsets, length = ((1,), most) if count_D[d] else ((), 0)
            return DecodeRows(decoding[d].tokens[-1:], decoding[d].anchor, offsets, length)

        anchors, first = [sample.anchor for sample in decoding], [sample.tokens[-1] for sample in decoding]
        full = DecodeRows(self._unknown(1), 0, (1,), most)
        out = self._pass(step, run, full, anchors, first, 1, None, [anchors, first])
        if not decoding:
            return None
        rows, (anchor_D, anchored_D) = self._sampler_rows(decoding), out.also
        p_logits_DRV = out.logits_DRV
        if not count_D.any():
            drafts = Drafts.none(len(decoding), self._device)
        else:
            drafts = self._draft(rows, out, out.first_D + 1, count_D, anchor_D, anchored_D, p_logits_DRV[:, 0])
            second = np.flatnonzero(count_D)

            def verified(n: int) -> DecodeRows:
                return DecodeRows(self._unknown(int(count_D[second[n]])), anchors[second[n]] + 1, (), 0)

            after = self._pass(
                [Turn(decoding[d], 0, True) for d in second], verified, DecodeRows(self._unknown(most), 0, (), 0),
                [anchors[d] + 1 for d in second], None, drafts.token_SM.shape[1],
                Drafted(drafts.token_SM, second, count_D[second], 0), [second.tolist()],
            )  # fmt: skip
            rest_DMV = after.logits_DRV
            if len(second) < len(decoding):
                rest_DMV = rest_DMV.new_zeros(len(decoding), *rest_DMV.shape[1:]).index_copy_(0, after.also[0], rest_DMV)
            p_logits_DRV = torch.cat([p_logits_DRV, rest_DMV], dim=1)
        heard = self._heard_verdict(self._verify(decoding, rows, p_logits_DRV, drafts, anchor_D))
        for sample, count, accepted in zip(decoding, count_D.tolist(), heard.accepted_S.tolist(), strict=True):
            sample.draft_start, sample.draft_length = sample.anchor + 1, most if count else 0
            _trace(sample, count, accepted, forwards=2 if count else 1)
            sample.drafts, sample.draft_count = None, 0
        return heard

    def _verify(
        self, decoding: Sequence[Sample], rows: SamplerRows, p_logits_DRV: torch.Tensor, drafts: Drafts, anchor_D: torch.Tensor
    ) -> Verdict:
        """What becomes of these samples' drafts: benches force it (`bench/gpu`)."""
        return verify(rows, p_logits_DRV, drafts, anchor_D)

    def _waiting(self, decoding: Sequence[Sample], most: int) -> tuple[Drafts, np.ndarray]:
        """The first `most` drafts of each sample, in order, and how many; runs of one batch are selected together."""
        counts = [min(s.draft_count, max(s.remaining - 1, 0), most) if s.drafts else 0 for s in decoding]
        count_D = np.array(counts, dtype=np.int64)
        if not any(counts):
            return Drafts.none(len(decoding), self._device), count_D
        parts: list[tuple[Drafts | None, list[int]]] = []
        for sample in decoding:
            if parts and parts[-1][0] is sample.drafts:
                parts[-1][1].append(sample.draft_index)
            else:
                parts.append((sample.drafts, [sample.draft_index]))
        (batch, mine), unchanged = parts[0], counts == [sample.draft_count for sample in decoding]
        if unchanged and batch is not None and len(parts) == 1 and mine == list(range(len(batch.count_S))):
            return batch.narrow(max(counts)), count_D  # the last step's, as they are: mostly so
        most_D, *index = upload([torch.from_numpy(count_D), *(torch.tensor(mine) for _, mine in parts)], self._device)
        chosen = []
        for (batch, mine), index_N in zip(parts, index, strict=True):
            if batch is None:
                chosen.append(Drafts.none(len(mine), self._device))
            else:
                chosen.append(batch if mine == list(range(len(batch.count_S))) else batch.select(index_N))
        drafts = chosen[0] if len(chosen) == 1 else Drafts.join(chosen)
        return drafts.limit(most_D, max(counts)), count_D

    def _pass(
        self, step: Step, run: Callable[[int], DecodeRows], full: DecodeRows, start_D: list[int], first_D: list[int] | None,
        width: int, drafted: Drafted | None, also: list[list[int]],
    ) -> Pass:  # fmt: skip
        """One pass over a step; `run` says what its d-th decoding sample runs behind its prompt, the rest is as in `Asked`."""
        where = [s for s, turn in enumerate(step) if turn.decodes]
        lead_D = [step[s].chunk for s in where]
        routed = any(turn.sample.experts is not None for turn in step)
        held = [turn.sample.held for turn in step if turn.sample.held is not None]
        order = {s: d for d, s in enumerate(where)}

        def rows(s: int) -> DecodeRows:
            sample, chunk, decodes = step[s]
            if not chunk:
                return run(order[s])
            start = _start(sample)
            prompt = sample.tokens[start : start + chunk]
            return run(order[s]).behind(prompt) if decodes else DecodeRows(prompt, start, (), 0)

        out = self.forwards.run(Asked(held, where, rows, lead_D, full, start_D, first_D, width, drafted, routed, also))
        if out.expert_TL is not None:
            starts = {s: start - lead for s, start, lead in zip(where, start_D, lead_D, strict=True)}
            spans = [
                (turn.sample, starts.get(s, _start(turn.sample)), out.clean_rows[s])
                for s, turn in enumerate(step)
                if turn.sample.experts is not None
            ]
            self._routed.append((out.expert_TL, spans))
        return out

    def _draft(
        self, rows: SamplerRows, out: Pass, slot_D: np.ndarray, count_D: np.ndarray, anchor_D: torch.Tensor,
        previous_D: torch.Tensor, p_first_DV: torch.Tensor | None = None,
    ) -> Drafts:  # fmt: skip
        """Draw drafts, `count_D` of them and at least one, from the mask rows that begin at `slot_D`, after the tokens
        `previous_D` at `anchor_D`; the first from `p_first_DV`, if that is known."""
        index = np.minimum(slot_D[:, None] + np.arange(count_D.max()), len(out.hidden_TD) - 1)
        index_DM, counts_D = upload((torch.from_numpy(index), torch.from_numpy(count_D)), self._device)
        logits_DMV = self.forwards.head(out.hidden_TD[index_DM])
        mask, markov = self.policy.mask_token_id, self.forwards.markov
        return draft(rows, logits_DMV, anchor_D, mask, counts_D, markov, previous_D, p_first_DV)

    def _unknown(self, count: int) -> list[int]:
        """Tokens of rows that are to be filled on the device."""
        return [self.policy.mask_token_id] * count

    def _heard_verdict(self, verdict: Verdict) -> Verdict:
        """The verdict on the host."""
        known = [name for name in Verdict.__slots__ if getattr(verdict, name) is not None]
        return Verdict(**dict(zip(known, self._heard([getattr(verdict, name) for name in known]), strict=True)))

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
        same = len(decoding) == len(self._rows_of) and all(map(operator.is_, decoding, self._rows_of))
        if self._rows is None or not same:
            params = [s.request.params for s in decoding]
            prefixes = [Prefix(s.tokens, len(s.request.prompt_tokens), s.stops) for s in decoding]
            self._rows = SamplerRows.make(params, [s.seed for s in decoding], self._device, prefixes)
            self._rows_of = decoding
        return self._rows


def _decoding(step: Step) -> list[Sample]:
    """The samples of a step that decode."""
    return [turn.sample for turn in step if turn.decodes]


def _takes_drafts(sample: Sample) -> bool:
    return sample.request.params.sampler != "ar"


def _start(sample: Sample) -> int:
    assert sample.held is not None
    return sample.held.length


def _trace(sample: Sample, drafted: int, accepted: int, forwards: int) -> None:
    """Note the step; `sample.draft_start` is still that of the block the verified drafts came from."""
    start, length = (sample.draft_start, sample.draft_length) if drafted else (-1, 0)
    sample.trace.append(StepTrace(sample.anchor, drafted, accepted, start, length, forwards))
    sample.forwards += forwards
