"""Runs step plans: forward, verify, and draw the drafts of the next step.

Invariants:
- The vocabulary head sees verify rows, then only the mask rows of the proposal that was selected.
- A step may run any schedule, whatever ran before it.
- Of a sample only the recorded experts are written here. The engine commits everything else.
- The host waits for the device once per step, in `verify`. Drafts stay on the device: of an accelerator the host knows how many
  there are, not which tokens they are.

Legend: D decoding samples, T rows, M most drafts, R = M + 1 verify rows, V vocabulary, L layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...kernels.transfer import download, upload
from ...kernels.verify import PairTable
from ...model.policy import Policy
from ..cache import PagedCache
from ..sampling.drafts import Drafts, SamplerRows, Verdict
from ..sampling.sampler import draft, verify
from ..sampling.two_passes import TwoPassMemory, serves
from ..schedule import Schedule
from ..sequence import Sample, SchedulerOutput
from .ar import ArPlanBuilder
from .captured import Verifier
from .fused import FusedPlanBuilder
from .model_runner import ForwardOutput, ModelRunner
from .plan import ForwardRequest, PlanBuilder, StepPlan
from .sampler_rows import SamplerRowsCache
from .sampling_graphs import CapturedStep, SamplingGraphs
from .two_pass import TwoPassPlanBuilder
from .waiting import waiting_drafts


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The experts of one forward pass, and which of them samples record.

    Attributes:
        expert_TL: int64, the expert each layer chose for each row.
        spans: per sample that records experts: the sample, the position of its first clean row, its clean rows of the pass.
    """

    expert_TL: torch.Tensor
    spans: list[tuple[Sample, int, slice]]


@dataclass(frozen=True, slots=True)
class StepForward:
    """What the forward passes of a step gave, on the device.

    Attributes:
        sampling: seeds and parameters of the decoding samples.
        anchor_D: int64, positions of the anchors.
        logits_DRV: p's logits of the verify rows.
        drafts: what is verified.
        output: the forward pass whose mask rows are the proposals; None where there are none.
        verdict: on the host, where the drafts are verified by now; valid until the next step.
    """

    sampling: SamplerRows
    anchor_D: torch.Tensor
    logits_DRV: torch.Tensor
    drafts: Drafts
    output: ForwardOutput | None = None
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gave.

    Attributes:
        verdict: what the decoding samples commit, on the host.
        drafts: drafts of the next step, on the device; None where there are none.
        draft_count_D, draft_level_D: how many drafts, and the level of the proposal they come from.
        block: mask rows of each proposal; 0 where the step has none.
    """

    verdict: Verdict
    drafts: Drafts | None
    draft_count_D: list[int]
    draft_level_D: list[int]
    block: int


class SamplerVerifier:
    """The verifier of an engine that serves: each sample's own sampler decides."""

    def prepare(self, plan: StepPlan) -> None:
        """See `Verifier`."""

    def __call__(self, sampling: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
        """See `Verifier`."""
        return verify(sampling, p_logits_SRV, drafts, anchor_S)


class StepRunner:
    """Runs steps of one policy over one cache.

    Args:
        captured: as in `ModelRunner`. draft_temperature: as in `EngineConfig`; None for the policy's own.

    Attributes:
        verifier: decides what a step accepts. A benchmark puts its own in place; steps are captured with the one that is there at
            the time, and run eagerly with another.
        wait_seconds: how long the host has waited for the device in `verify`, over all steps.
    """

    def __init__(
        self, policy: Policy, cache: PagedCache, captured: bool = True, draft_temperature: float | None = None
    ) -> None:
        self._policy, self._device, self._vocabulary = policy, policy.device, policy.config.vocab_size
        self.verifier: Verifier = SamplerVerifier()
        self._samplers = self.verifier
        self.model = ModelRunner(policy, cache, captured)
        self._draft_temperature = policy.draft_temperature if draft_temperature is None else draft_temperature
        self._graphs = SamplingGraphs(policy, self.model, self._draft_temperature)
        self._like = torch.empty(0, dtype=policy.dtype, device=policy.device)
        self._two_passes = TwoPassMemory(policy.config.hidden_size, self._vocabulary)
        self.wait_seconds = 0.0
        self._builders: dict[Schedule, PlanBuilder] = {}
        self._sampler_rows = SamplerRowsCache(policy.device, self._draft_temperature)
        self._routed: list[RoutedExperts] = []

    def take_weights(self, folded: Any = None) -> None:
        """Must be called after the policy's weights have changed. `folded`: as in `Backend.refresh`."""
        self.model.take_weights(folded)

    def forget_samples(self) -> None:
        """Drop every reference to samples. Must be called when samples were given up, also in the middle of a step."""
        self._sampler_rows.forget_samples()
        self._routed = []
        self._graphs.forget_samples()

    def plan(self, schedule: Schedule, batch: SchedulerOutput) -> StepPlan:
        """The step that runs these samples.

        Args:
            schedule: with sizes (`Schedule.within`).
        """
        return self._builder(schedule).plan(batch)

    def capture(self, schedules: Sequence[Schedule], batches: Sequence[int], pages: int | None = None) -> None:
        """Capture the steps of these schedules, with sizes, at these batches, where passes are captured.

        Args:
            pages: of each sample; None: samples reach any length that the policy and the cache allow.
        """
        builders = [self._builder(schedule) for schedule in schedules]
        self.model.capture([rows for builder in builders for rows in builder.passes], batches, pages)
        whole = [builder.passes[0] for builder in builders if len(builder.passes) == 1]
        if whole:
            self._graphs.capture(whole, self.verifier)

    def _builder(self, schedule: Schedule) -> PlanBuilder:
        builder = self._builders.get(schedule)
        if builder is None:
            builder = self._builders[schedule] = plan_builder(schedule, self._policy.mask_token_id)
        return builder

    def forward(self, plan: StepPlan) -> StepForward | CapturedStep | None:
        """Run the plan's forward passes; None where no sample decodes. `two_pass` draws its drafts between the two passes. A step
        that is captured whole is launched to its end."""
        decoding, second = plan.batch.decoding, plan.verify_forward
        drafts = waiting_drafts(decoding, plan.count_D, self._device) if second is None else None
        if decoding:
            self.verifier.prepare(plan)
            if drafts is not None:
                whole = self._graphs.launch(plan, self._sampler_rows.rows(decoding), drafts, self.verifier)
                if whole is not None:
                    return whole
        if second is not None:
            return self._forward_twice(plan, second)
        output = self._run(plan.forward, drafts)
        if not decoding:
            return None
        assert drafts is not None
        return StepForward(self._sampler_rows.rows(decoding), output.extra[0], output.logits_DRV, drafts, output)

    def _forward_twice(self, plan: StepPlan, second: ForwardRequest) -> StepForward:
        """Both passes of a step of `two_pass`."""
        request, decoding, markov = plan.forward, plan.batch.decoding, self.model.markov
        sampling, (anchors, tokens) = self._sampler_rows.rows(decoding), request.extra
        if isinstance(markov, PairTable) and self.model.backend.drafts_between and serves(sampling, self._like):
            made, keys_4D = self._two_passes.of(len(decoding), second.width), (plan.count_D, anchors, tokens, sampling.seed_S)
            for line, numbers in zip(made.keys_4D, keys_4D, strict=True):
                line[:] = numbers
            draws, verifies = made.calls(sampling, markov.pair_VV, self._policy.mask_token_id)
            if self.verifier is not self._samplers:
                verifies = None
            routed = self.model.run_twice(request, second, made, draws, verifies)
            for asked, rows in zip((request, second), routed):
                self._keep_experts(asked, *rows)
            verdict = None if verifies is None else made.verdict
            return StepForward(sampling, torch.from_numpy(anchors), made.logits_DRV, made.drafts, verdict=verdict)
        output = self._run(request, None)
        anchor_D, previous_D = output.extra
        drafts = self._draft(sampling, output, output.mask_D, plan.count_D, anchor_D, previous_D, output.logits_DRV)
        after = self._run(second, drafts)
        later_DMV = after.logits_DRV
        if len(later_DMV) < len(decoding):
            rest_DMV = later_DMV.new_zeros(len(decoding), *later_DMV.shape[1:])
            later_DMV = rest_DMV.index_copy_(0, after.extra[0], later_DMV)
        return StepForward(sampling, anchor_D, torch.cat([output.logits_DRV, later_DMV], dim=1), drafts)

    def verify(self, plan: StepPlan, forward: StepForward | CapturedStep | None) -> StepOutput | None:
        """Verify the drafts, wait for the verdict, and draw the drafts of the next step; None where no sample decodes."""
        if forward is None:
            if self._routed:
                self._download([])
            return None
        if isinstance(forward, CapturedStep):
            start = time.perf_counter()
            verdict = forward.sampling.wait(len(plan.count_D))
            self.wait_seconds += time.perf_counter() - start
            return _step_output(plan, verdict, forward.drafts)
        sampling, anchor_D = forward.sampling, forward.anchor_D
        away = forward.verdict
        if away is None:
            away = self.verifier(sampling, forward.logits_DRV, forward.drafts, anchor_D)
        verdict = self._here(away)
        if plan.proposals is None:
            return _step_output(plan, verdict, None)
        row_D, count_D, _ = plan.proposals.select(verdict.accepted_S.numpy())
        drafts, output = None, forward.output
        if count_D.any():
            assert output is not None
            sampled_D = away.token_SR.gather(1, away.accepted_S[:, None])[:, 0]
            first_D = output.mask_D + row_D
            drafts = self._draft(sampling, output, first_D, count_D, anchor_D + away.accepted_S + 1, sampled_D)
        return _step_output(plan, verdict, drafts)

    def replace_drafts(self, drafts: Drafts, token_SM: torch.Tensor) -> None:
        """Put other tokens (int64, on the host, -1 for none) in place of drafts that wait. Only for samplers that compare tokens:
        q stays."""
        drafts.token_SM.copy_(upload(token_SM, self._device))
        self._graphs.tokens_replaced(drafts)

    def _run(self, request: ForwardRequest, drafts: Drafts | None) -> ForwardOutput:
        """One forward pass."""
        output = self.model.run(request, None if drafts is None else drafts.token_SM)
        if output.expert_TL is not None:
            self._keep_experts(request, output.expert_TL, output.clean_rows)
        return output

    def _keep_experts(self, request: ForwardRequest, expert_TL: torch.Tensor, clean_rows: list[slice]) -> None:
        """The experts that samples record are kept for the next download."""
        batch = request.batch
        position = {s: start - batch.scheduled[s].chunk for s, start in zip(batch.decoding_index, request.start_D)}
        self._routed.append(RoutedExperts(expert_TL, [
            (sample, position.get(s, sample.cached), clean_rows[s])
            for s, (sample, _, _) in enumerate(batch.scheduled) if sample.experts is not None
        ]))  # fmt: skip

    def _draft(
        self, sampling: SamplerRows, output: ForwardOutput, first_D: np.ndarray, count_D: np.ndarray, anchor_D: torch.Tensor,
        previous_D: torch.Tensor, p_first_DRV: torch.Tensor | None = None,
    ) -> Drafts:  # fmt: skip
        """Draw drafts.

        Args:
            first_D: int64, mask row of each sample's first draft. count_D: int64, how many drafts; at least one sample has one.
            anchor_D: position of the token before the first draft. previous_D: that token.
            p_first_DRV: rows of which the first has p's logits for the first draft, where they are known.
        """
        # Rows past a sample's own drafts are drawn from too, and their drafts are not used.
        hidden_TH, mask, markov = output.hidden_TD, self._policy.mask_token_id, self.model.markov
        index = np.minimum(first_D[:, None] + np.arange(count_D.max()), len(hidden_TH) - 1)
        index_DM, counts_D = upload((torch.from_numpy(index), torch.from_numpy(count_D)), self._device)
        logits_DMV = self.model.head(hidden_TH[index_DM])
        return draft(sampling, logits_DMV, anchor_D, mask, counts_D, markov, previous_D, p_first_DRV)

    def _here(self, away: Verdict) -> Verdict:
        """The verdict on the host."""
        if away.token_SR.is_cpu and not self._routed:
            return away
        known = [name for name in Verdict.__slots__ if getattr(away, name) is not None]
        return Verdict(**dict(zip(known, self._download([getattr(away, name) for name in known]), strict=True)))

    def _download(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors on the host. The experts that samples record come in the same copy."""
        routed, self._routed = self._routed, []
        start = time.perf_counter()
        here = download([*tensors, *(each.expert_TL for each in routed)])
        self.wait_seconds += time.perf_counter() - start
        for each, expert_TL in zip(routed, here[len(tensors) :], strict=True):
            for sample, position, rows in each.spans:
                sample.record_experts(position, expert_TL[rows].numpy())
        return here[: len(tensors)]


def _step_output(plan: StepPlan, verdict: Verdict, drafts: Drafts | None) -> StepOutput:
    """What the step gave; `drafts` are kept if there are any."""
    if plan.proposals is None:
        nothing = [0] * len(plan.count_D)
        return StepOutput(verdict, None, nothing, nothing, 0)
    _, count_D, level_D = plan.proposals.select(verdict.accepted_S.numpy())
    kept = drafts if count_D.any() else None
    return StepOutput(verdict, kept, count_D.tolist(), level_D.tolist(), plan.proposals.block)


def plan_builder(schedule: Schedule, mask_token: int) -> PlanBuilder:
    """The class that plans steps of this kind of schedule."""
    if schedule.kind == "two_pass":
        return TwoPassPlanBuilder(schedule, mask_token)
    return ArPlanBuilder(mask_token) if schedule.kind == "ar" else FusedPlanBuilder(schedule, mask_token)
