"""The engine: prompts in, trajectories out.

Invariants:
- A step is schedule -> layout -> forward -> verify -> commit. Nothing else touches a sample's tokens.
- The vocabulary head sees verify rows, then only the mask rows of the proposal that was selected.
- Tokens do not depend on the batch: random numbers are keyed by (sample seed, position), and drafts outlive preemption.

Legend: S sequences of the step, D of them decoding, T rows, M most drafts, R = M + 1, V vocabulary, B block size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import RequestError
from ..model.layout import DecodeRows, decode
from ..model.policy import Policy, Routing
from .cache import PagedCache
from .drafts import Drafts, SamplerRows, Verdict
from .sampler import draft, verify
from .schedule import Schedule
from .scheduler import Scheduler
from .sequence import Sample
from .types import RolloutRequest, StepTrace, Trajectory


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and schedule of an engine.

    Attributes:
        schedule: what a decode step runs.
        block_size: mask rows per block, 2..64; None for the policy's own.
        max_batch: most samples decoded at once.
        pages, page_size: K/V pool; None sizes it for `max_batch` samples of 512 positions (or the model's maximum).
        prefill_rows: most prompt rows of one step.
    """

    schedule: Schedule = Schedule()
    block_size: int | None = None
    max_batch: int = 32
    pages: int | None = None
    page_size: int = 32
    prefill_rows: int = 512

    def __post_init__(self) -> None:
        if self.block_size is not None and not 2 <= self.block_size <= 64:
            raise RequestError("block_size", f"{self.block_size} is outside 2..64", "use the policy's own, or 4 to 32")
        for name in ("max_batch", "page_size", "prefill_rows"):
            if getattr(self, name) < 1:
                raise RequestError(name, f"{getattr(self, name)} is less than 1", "use a positive number")


@dataclass
class _Pass:
    """One forward: final hidden states, and the pack's first row of each sequence."""

    hidden_TD: torch.Tensor
    first_S: np.ndarray


class Engine:
    """Decodes requests with one policy, in this process.

    Attributes:
        version: weight version every new token is tagged with.
        forwards, decode_tokens: totals since the start, prefill-only passes not counted.
    """

    def __init__(self, policy: Policy, config: EngineConfig | None = None) -> None:
        self.policy, self.config = policy, config or EngineConfig()
        self.block_size = self.config.block_size or policy.block_size
        schedule = self.config.schedule
        self.most_drafts = min(schedule.drafts or self.block_size, self.block_size)
        self.levels = tuple(level for level in schedule.levels if level < self.block_size)
        size = self.config.page_size
        longest = min(512, policy.config.max_position_embeddings)
        pages = self.config.pages or self.config.max_batch * -(-longest // size)
        self.cache = PagedCache(policy, pages, size, 2 * self.config.max_batch, self.block_size + 1)
        self.scheduler = Scheduler(self.cache, self.config.max_batch, self.config.prefill_rows)
        self.version = self.forwards = self.decode_tokens = self._arrivals = 0
        self._rows_key: tuple[int, ...] = ()
        self._rows: SamplerRows | None = None

    @property
    def has_work(self) -> bool:
        """Samples are waiting or running."""
        return self.scheduler.pending > 0

    def add(self, request: RolloutRequest, without: Collection[int] = ()) -> None:
        """Queue a request's samples, but for the numbers in `without`; RequestError if this policy cannot serve it."""
        config, prompt, params = self.policy.config, request.prompt_tokens, request.params
        most = config.max_position_embeddings
        if len(prompt) >= most:
            raise RequestError(
                "prompt_tokens",
                f"request {request.id!r} has {len(prompt)} tokens and the policy's maximum is {most}",
                f"shorten the prompt to at most {most - 1} tokens",
            )
        if max(prompt) >= config.vocab_size:
            raise RequestError(
                "prompt_tokens",
                f"request {request.id!r} holds token {max(prompt)} and the vocabulary has {config.vocab_size}",
                "use the policy's own tokenizer",
            )
        limit = min(len(prompt) + params.max_tokens, most)
        if self.cache.pages_for(limit) > self.cache.total_pages:
            raise RequestError(
                "max_tokens", f"request {request.id!r} may need {limit} positions, more than the cache holds",
                "raise the engine's `pages` or lower max_tokens",
            )  # fmt: skip
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else {*self.policy.eos_token_ids})
        for number in range(request.samples):
            if number in without:
                continue
            sample = Sample(request, number, limit, list(prompt), stops, self._arrivals)
            if params.routed_experts:
                sample.experts = np.full((limit, config.num_hidden_layers), -1, dtype=np.int16)
            self.scheduler.add(sample)
        self._arrivals += 1

    def generate(
        self, requests: Sequence[RolloutRequest], on_finish: Callable[[Trajectory], None] | None = None
    ) -> list[Trajectory]:
        """Serve requests to the end. Returns their trajectories in the order of the requests, then of the samples."""
        order = {request.id: i for i, request in enumerate(requests)}
        if len(order) != len(requests):
            raise RequestError("id", "two requests of one call share an id", "give each request its own id")
        for request in requests:
            self.add(request)
        done: list[Trajectory] = []
        while self.has_work:
            for trajectory in self.step():
                done.append(trajectory)
                if on_finish is not None:
                    on_finish(trajectory)
        return sorted(done, key=lambda t: (order[t.request_id], t.sample))

    @torch.inference_mode()
    def step(self) -> list[Trajectory]:
        """One decode step of every running sample; returns the samples that ended."""
        step = self.scheduler.next(self.most_drafts + 1)
        decoding = [sample for sample, chunk in step if not chunk]
        if self.config.schedule.kind == "two_pass":
            verdict, drafted = self._two_pass(step, decoding)
        else:
            verdict, drafted = self._fused(step, decoding)
        if decoding:
            self._commit(decoding, verdict, drafted)
        return self._finish(decoding)

    def load_weights(self, tensors: Mapping[str, torch.Tensor], version: int, in_flight: str = "keep") -> None:
        """Take a weight version between two steps.

        Args:
            tensors: every tensor of the policy, by name.
            in_flight: `keep` goes on with the old K/V, `recompute` prefills running samples again under the new weights.
        """
        self.policy.load_state_dict(dict(tensors), strict=False)
        self.version = version
        self.scheduler.forget_prompts()
        if in_flight == "recompute":
            self.scheduler.recompute()

    def abort(self) -> list[Trajectory]:
        """End every unfinished sample where it is; their trajectories, oldest first, some perhaps without a token."""
        ended = self.scheduler.clear()
        for sample in ended:
            sample.finish = "abort"
        return [sample.trajectory() for sample in ended]

    def drop(self, request_id: str) -> None:
        """Give up a request; its samples never finish."""
        self.scheduler.drop(request_id)

    def _fused(self, step: list[tuple[Sample, int]], decoding: list[Sample]) -> tuple[Verdict | None, Drafts]:
        """Verify the last step's drafts and propose for the next step in one forward; `ar` proposes nothing."""
        drafts = self._drafts(decoding)
        counts = dict(zip(map(id, decoding), drafts.count_S.tolist(), strict=True))
        plans = []
        for sample, chunk in step:
            count = counts.get(id(sample), 0)
            levels = () if chunk else self._proposals(sample, count)
            tokens = self._clean_tokens(sample, chunk, drafts, decoding, count)
            plans.append(DecodeRows(tokens, self._start(sample), tuple(level + 1 for level in levels), self.block_size))
        out = self._forward(step, plans)
        if not decoding:
            return None, drafts
        where = [s for s, (_, chunk) in enumerate(step) if not chunk]
        first_D = out.first_S[where]
        rows = self._sampler_rows(decoding)
        anchor_D = torch.tensor([s.anchor for s in decoding])
        verdict = verify(rows, self._logits(out, first_D, drafts.token_SM.shape[1] + 1), drafts, anchor_D)
        accepted = verdict.accepted_S.tolist()
        count_D, slot_D = [], []
        for d, s in enumerate(where):
            sample, plan, a = decoding[d], plans[s], accepted[d]
            usable = [i for i, offset in enumerate(plan.proposals) if offset - 1 <= a]
            self._trace(sample, int(drafts.count_S[d]), a, forwards=1)
            sample.draft_count = 0
            if not usable or sample.remaining <= a + 2:
                count_D.append(0)
                slot_D.append(0)
                continue
            i = usable[-1]
            # Slot 0 stands for the token after `level` accepted drafts; the token that was sampled now stands `a - level`
            # places further, and the next drafts begin after it.
            skip = a - (plan.proposals[i] - 1) + 1
            count_D.append(max(min(self.block_size - skip, self.most_drafts), 0))
            slot_D.append(int(first_D[d]) + len(plan.clean) + i * self.block_size + skip)
            sample.draft_start, sample.draft_length = plan.start + plan.proposals[i], self.block_size
        sampled_D = verdict.token_SR.gather(1, verdict.accepted_S[:, None])[:, 0]
        anchor_D = anchor_D + verdict.accepted_S + 1
        fresh = self._draft(rows, decoding, out, np.array(slot_D), count_D, anchor_D, sampled_D)
        return verdict, fresh

    def _two_pass(self, step: list[tuple[Sample, int]], decoding: list[Sample]) -> tuple[Verdict | None, Drafts]:
        """Pass A: anchor and masks, giving p after the anchor and drafts that know it. Pass B: the drafts."""
        plans = []
        for sample, chunk in step:
            wide = 0 if chunk or sample.request.params.sampler == "ar" else min(self.most_drafts, sample.remaining - 1)
            tokens = self._clean_tokens(sample, chunk, Drafts.none(0), [], 0)
            plans.append(DecodeRows(tokens, self._start(sample), (1,) if wide > 0 else (), max(wide, 0)))
        out = self._forward(step, plans)
        if not decoding:
            return None, Drafts.none(0)
        where = [s for s, (_, chunk) in enumerate(step) if not chunk]
        first_D = out.first_S[where]
        counts = [plans[s].block_length if plans[s].proposals else 0 for s in where]
        rows = self._sampler_rows(decoding)
        anchor_D = torch.tensor([s.anchor for s in decoding])
        anchored_D = torch.tensor([s.tokens[-1] for s in decoding])
        drafts = self._draft(rows, decoding, out, first_D + 1, counts, anchor_D, anchored_D)
        p_logits = [self._logits(out, first_D, 1)]
        width = drafts.token_SM.shape[1]
        second = [d for d, count in enumerate(counts) if count]
        if second:
            drafted = drafts.token_SM.tolist()
            plans_b = [DecodeRows(drafted[d][: counts[d]], decoding[d].anchor + 1, (), 0) for d in second]
            after = self._forward([(decoding[d], 0) for d in second], plans_b)
            logits = self._logits(after, after.first_S, width)
            rest = logits.new_zeros(len(decoding), width, logits.shape[-1])
            rest[second] = logits
            p_logits.append(rest)
        verdict = verify(rows, torch.cat(p_logits, dim=1), drafts, anchor_D)
        for d, (sample, a) in enumerate(zip(decoding, verdict.accepted_S.tolist(), strict=True)):
            sample.draft_start, sample.draft_length = sample.anchor + 1, counts[d]
            self._trace(sample, counts[d], a, forwards=2 if counts[d] else 1)
        return verdict, Drafts.none(len(decoding))

    def _proposals(self, sample: Sample, drafted: int) -> tuple[int, ...]:
        if self.config.schedule.kind == "ar" or sample.request.params.sampler == "ar" or sample.remaining < 2:
            return ()
        return tuple(level for level in self.levels if level <= drafted)

    def _start(self, sample: Sample) -> int:
        assert sample.held is not None
        return sample.held.length

    def _clean_tokens(
        self, sample: Sample, chunk: int, drafts: Drafts, decoding: list[Sample], count: int
    ) -> list[int]:
        start = self._start(sample)
        if chunk:
            return sample.tokens[start : start + chunk]
        anchor = sample.tokens[-1:]
        if not count:
            return anchor
        return anchor + drafts.token_SM[next(d for d, s in enumerate(decoding) if s is sample), :count].tolist()

    def _drafts(self, decoding: list[Sample]) -> Drafts:
        """Drafts of the samples in order; runs of one batch are selected together."""
        parts: list[tuple[Drafts | None, list[int]]] = []
        for sample in decoding:
            if parts and parts[-1][0] is sample.drafts:
                parts[-1][1].append(sample.draft_index)
            else:
                parts.append((sample.drafts, [sample.draft_index]))
        if not parts:
            return Drafts.none(0)
        chosen = [
            Drafts.none(len(index), self.policy.device) if batch is None else batch.select(torch.tensor(index))
            for batch, index in parts
        ]
        drafts = chosen[0] if len(chosen) == 1 else Drafts.join(chosen)
        return drafts.limit(torch.tensor([max(s.remaining - 1, 0) for s in decoding]))

    def _forward(self, step: list[tuple[Sample, int]], plans: list[DecodeRows]) -> _Pass:
        layout = decode(plans, self.policy.mask_token_id).to(self.policy.device)
        wanted = [s for s, (sample, _) in enumerate(step) if sample.experts is not None]
        routing = Routing([], []) if wanted else None
        held = [sample.held for sample, _ in step if sample.held is not None]
        hidden_TD = self.policy(layout, self.cache.view(held, layout), routing)
        counts = np.array([len(p.clean) + len(p.proposals) * p.block_length for p in plans])
        first_S = np.cumsum(counts) - counts
        if routing is not None:
            expert_TL = torch.stack(routing.expert_LT, dim=1).cpu().numpy()
            for s in wanted:
                rows = expert_TL[first_S[s] : first_S[s] + len(plans[s].clean)]
                step[s][0].record_experts(plans[s].start, rows)
        for sample, chunk in step:
            if chunk and sample.held is not None:
                sample.held.length += chunk
                if sample.prefilled:
                    self.scheduler.prefilled(sample)
        return _Pass(hidden_TD, first_S)

    def _logits(self, out: _Pass, first_D: np.ndarray, width: int) -> torch.Tensor:
        """logits_DRV of `width` rows from each first row; rows past a sequence's own hold anything."""
        index = torch.from_numpy(first_D[:, None] + np.arange(width)).clamp_max(out.hidden_TD.shape[0] - 1)
        return self.policy.head(out.hidden_TD[index.to(out.hidden_TD.device)])

    def _draft(
        self,
        rows: SamplerRows,
        decoding: list[Sample],
        out: _Pass,
        slot_D: np.ndarray,
        count_D: list[int],
        anchor_D: torch.Tensor,
        previous_D: torch.Tensor,
    ) -> Drafts:
        """Draw drafts from the mask rows that begin at `slot_D`, after the tokens `previous_D` at `anchor_D`."""
        width = max(count_D, default=0)
        if not width:
            drafts = Drafts.none(len(decoding), self.policy.device)
        else:
            logits = self._logits(out, slot_D, width)
            policy, counts_D = self.policy, torch.tensor(count_D)
            drafts = draft(rows, logits, anchor_D, policy.mask_token_id, counts_D, policy.markov, previous_D)
        for d, sample in enumerate(decoding):
            sample.drafts, sample.draft_index, sample.draft_count = (drafts if width else None), d, count_D[d]
        return drafts

    def _sampler_rows(self, decoding: list[Sample]) -> SamplerRows:
        key = tuple(map(id, decoding))
        if key != self._rows_key or self._rows is None:
            self._rows_key = key
            params = [s.request.params for s in decoding]
            self._rows = SamplerRows.make(params, [s.seed for s in decoding], self.policy.device)
        return self._rows

    def _trace(self, sample: Sample, drafted: int, accepted: int, forwards: int) -> None:
        """Note the step; `sample.draft_start` is still that of the block the verified drafts came from."""
        start, length = (sample.draft_start, sample.draft_length) if drafted else (-1, 0)
        sample.trace.append(StepTrace(sample.anchor, drafted, accepted, start, length, forwards))
        sample.forwards += forwards

    def _commit(self, decoding: list[Sample], verdict: Verdict | None, drafted: Drafts) -> None:
        assert verdict is not None
        columns = (verdict.token_SR, verdict.logprob_SR, verdict.behavior_logprob_SR, verdict.support_logmass_SR,
                   verdict.from_draft_SR)  # fmt: skip
        for sample, a, *row in zip(decoding, verdict.accepted_S.tolist(), *(c.tolist() for c in columns), strict=True):
            assert sample.held is not None
            before = len(sample.tokens)
            sample.commit(*(values[: a + 1] for values in row), version=self.version)
            sample.held.length = sample.anchor
            self.decode_tokens += len(sample.tokens) - before
        self.forwards += 2 if self.config.schedule.kind == "two_pass" else 1

    def _finish(self, decoding: list[Sample]) -> list[Trajectory]:
        ended = [sample for sample in decoding if sample.finish is not None]
        for sample in ended:
            self.scheduler.retire(sample)
        return [sample.trajectory() for sample in ended]
