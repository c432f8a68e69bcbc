"""Sampling of captured steps: verification, choice of a proposal and the next drafts, as graphs over memory that stays in place.

A captured step is three graphs, which the host launches one after another: the forward pass (`shapes`), the verification, the
drafts. The host waits for the verification alone, and commits it while the device draws the drafts.

Invariants:
- The graphs run the functions that an eager step runs (`sampling.kernels`), on the same rows: the tokens are the same.
- What the host knows is sent in one copy before the graphs run: seeds, parameters, positions, counts.
- The drafts of a captured step lie in `DraftMemory`, where the next captured step verifies them. They are valid until that step
  draws its own. Drafts that lie elsewhere are copied there first.
- Batches of one sampler take these graphs, without adjustments, alternatives or recorded experts; `mixed` without cut-offs too.

Legend: S sequences of the graphs, those of padding last; D of them are samples; M most drafts, R = M + 1 verify rows, T rows,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ...kernels.graphs import GraphBudget, GraphPool
from ...kernels.transfer import Download, PinnedCopy
from ...model.layout import DecodeRows
from ..sampling import kernels
from ..sampling.drafts import Drafts, Group, SamplerRows, Verdict
from ..sequence import Sample
from .plan import StepPlan, select_on_device


class SamplerKind(NamedTuple):
    """What decides which functions a batch of one sampler runs."""

    sampler: str
    greedy: bool = False
    cut: bool = False

    @property
    def keeps_q(self) -> bool:
        """Whether verification reads the logits that the drafts were drawn from."""
        return not self.greedy and self.sampler in ("lossless", "mixed")


CAPTURED_KINDS = (
    SamplerKind("lossless"), SamplerKind("coupled"), SamplerKind("coupled", greedy=True), SamplerKind("mixed"),
    SamplerKind("lossless", cut=True), SamplerKind("coupled", cut=True),
)  # fmt: skip
"""The most usual first. At temperature 0 all samplers but `mixed` are alike, and `ar` is `coupled` without drafts."""


def kind_of(sampling: SamplerRows) -> SamplerKind | None:
    """The kind of a batch; None where its sampling is not captured."""
    if len(sampling.groups) != 1 or sampling.top:
        return None
    (group,) = sampling.groups
    if group.adjustment is not None or (group.sampler == "mixed" and (group.greedy or group.cut)):
        return None
    return SamplerKind("coupled" if group.greedy or group.sampler == "ar" else group.sampler, group.greedy, group.cut)


class Verifier(Protocol):
    """Decides which drafts a step accepts and which token follows them."""

    def prepare(self, plan: StepPlan) -> None:
        """Called before the passes of each step. What it sends to the device must lie in the same place every time."""

    def __call__(self, sampling: SamplerRows, p_logits_SRV: torch.Tensor, drafts: Drafts, anchor_S: torch.Tensor) -> Verdict:
        """The verdict, on the device, without waiting for it; arguments are those of `sampler.verify`. A graph runs it again
        with the numbers of later steps."""


class ModelParts(Protocol):
    """What sampling needs of a policy."""

    markov: Callable[[torch.Tensor], torch.Tensor] | None

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Backend.head`."""

    def head_into(self, hidden_RD: torch.Tensor, logits_RV: torch.Tensor) -> None:
        """See `Policy.head_into`."""


class DraftMemory:
    """The waiting drafts of up to S sequences.

    Attributes:
        token_SM: int64, -1 where there is none. row_token_SM: the same as tokens of rows, the mask token where there is none.
        lse_SM: float64; q_SMV: float32, None before somebody `keeps_q`: as in `Drafts`.
    """

    def __init__(self, device: torch.device, sequences: int, drafts: int, vocab_size: int, mask_token: int) -> None:
        self._vocab_size = vocab_size
        self.token_SM = torch.full((sequences, drafts), -1, dtype=torch.int64, device=device)
        self.row_token_SM = torch.full_like(self.token_SM, mask_token)
        self.count_S = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.lse_SM = torch.zeros((sequences, drafts), dtype=torch.float64, device=device)
        self.q_SMV: torch.Tensor | None = None
        self._mask_token = mask_token
        self._views: dict[tuple[int, int, bool], Drafts] = {}

    def keep_q(self) -> None:
        """Make room for q."""
        if self.q_SMV is None:
            self.q_SMV = torch.zeros((*self.token_SM.shape, self._vocab_size), dtype=torch.float32, device=self.token_SM.device)

    def holds(self, drafts: Drafts) -> bool:
        """Whether these are the drafts that lie here, of the first sequences."""
        return drafts.token_SM.data_ptr() == self.token_SM.data_ptr()

    def drafts(self, sequences: int, most: int, keeps_q: bool) -> Drafts:
        """The first `most` drafts of the first sequences: views, made once. `keeps_q` only after `keep_q`."""
        found = self._views.get((sequences, most, keeps_q))
        if found is None:
            q_SMV = self.q_SMV if keeps_q else None
            found = self._views[sequences, most, keeps_q] = Drafts(
                self.token_SM[:sequences, :most], self.count_S[:sequences],
                q_logits_SMV=None if q_SMV is None else q_SMV[:sequences, :most],
                q_lse_SM=self.lse_SM[:sequences, :most] if keeps_q else None,
            )  # fmt: skip
        return found

    def put(self, drafts: Drafts) -> None:
        """Copy these drafts here, as those of the first sequences."""
        count, most = drafts.token_SM.shape
        if not most or self.holds(drafts):
            return
        self.token_SM[:count, :most].copy_(drafts.token_SM)
        self.tokens_replaced(drafts)
        if drafts.q_logits_SMV is not None and drafts.q_lse_SM is not None and self.q_SMV is not None:
            self.q_SMV[:count, :most].copy_(drafts.q_logits_SMV)
            self.lse_SM[:count, :most].copy_(drafts.q_lse_SM)


    def tokens_replaced(self, drafts: Drafts) -> None:
        """Make the tokens of rows those of these drafts, which are those of the first sequences."""
        count, most = drafts.token_SM.shape
        self.row_token_SM[:count, :most].copy_(torch.where(drafts.token_SM >= 0, drafts.token_SM, self._mask_token))


@dataclass(frozen=True)
class _Inputs:
    """What the host knows of each sequence. float64, int64; those of padding draft nothing."""

    seed_S: torch.Tensor
    anchor_S: torch.Tensor
    count_S: torch.Tensor
    remaining_S: torch.Tensor
    proposes_S: torch.Tensor
    top_k_S: torch.Tensor
    temperature_S: torch.Tensor
    top_p_S: torch.Tensor
    min_p_S: torch.Tensor
    mix_weight_S: torch.Tensor
    draft_temperature_S: torch.Tensor

    @classmethod
    def of(cls, sequences: int) -> _Inputs:
        wide = ("temperature_S", "top_p_S", "min_p_S", "mix_weight_S", "draft_temperature_S")
        return cls(*(
            torch.ones(sequences, dtype=torch.float64) if each.name in wide else torch.zeros(sequences, dtype=torch.int64)
            for each in fields(cls)
        ))  # fmt: skip


class CapturedSampling:
    """Verification and drafts of the steps in which each of S sequences runs `rows`.

    Args:
        hidden_TH: where the forward pass leaves its result. memory: None where the steps have no drafts. draft_temperature: as in
            `EngineConfig`.

    Attributes:
        verdict: on the device, where verification leaves it.
    """

    def __init__(
        self, model: ModelParts, verifier: Verifier, memory: DraftMemory | None, rows: DecodeRows, sequences: int,
        kind: SamplerKind, hidden_TH: torch.Tensor, mask_token: int, draft_temperature: float,
    ) -> None:  # fmt: skip
        self._model, self.verifier, self._memory, self._kind, self._mask = model, verifier, memory, kind, mask_token
        self._draft_temperature = draft_temperature
        self._hidden_TH, device = hidden_TH, hidden_TH.device
        self._drafts = len(rows.clean) - 1
        if memory is not None:  # a capture shall not record how the views are made
            memory.drafts(sequences, self._drafts, kind.keeps_q)
        each = self._drafts + 1 + len(rows.proposals) * rows.block_length
        self._block, first_S = rows.block_length, np.arange(sequences) * each
        index = first_S[:, None] + np.arange(self._drafts + 1), first_S + self._drafts + 1, np.array(rows.proposals) - 1
        there = PinnedCopy([torch.from_numpy(numbers.astype(np.int64)) for numbers in index], device).tree
        self._verify_SR, self._mask_S, self._level_L = there
        self._host = _Inputs.of(sequences)
        self._numbers = {each.name: getattr(self._host, each.name).numpy() for each in fields(_Inputs)}
        self._copy = PinnedCopy(self._host, device, [getattr(self._host, each.name) for each in fields(_Inputs)])
        self._of: list[Sample] = []
        self._download = Download(device)
        self._graphs: list[Callable[[], None]] = []
        self.verdict: Verdict | None = None

    @property
    def _sampling(self) -> SamplerRows:
        """The rows on the device."""
        there, kind = self._copy.tree, self._kind
        return SamplerRows(
            there.seed_S, there.temperature_S, there.top_k_S, there.top_p_S, there.min_p_S, there.mix_weight_S,
            there.draft_temperature_S, (Group(kind.sampler, kind.greedy, kind.cut, None),), self._draft_temperature,
        )  # fmt: skip

    def capture(self, budget: GraphBudget, pool: GraphPool) -> None:
        """Capture both graphs over padding alone. Raises: RuntimeError as `GraphPool.capture`."""
        self._copy.send()
        calls = [self._verify, self._draft] if self._drafts else [self._verify]
        self._graphs = [budget.capture(call, pool).graph.replay for call in calls]

    def send(self, plan: StepPlan, samples: Sequence[Sample]) -> None:
        """Send what the host knows of this step's samples."""
        numbers, count = self._numbers, len(samples)
        if len(self._of) != count or any(mine is not its for mine, its in zip(self._of, samples)):
            self._of = list(samples)
            params = [sample.request.params for sample in samples]
            numbers["seed_S"][:count] = [sample.seed for sample in samples]
            for name in ("temperature", "top_k", "top_p", "min_p", "mix_weight"):
                numbers[f"{name}_S"][:count] = [getattr(each, name) for each in params]
            numbers["draft_temperature_S"][:count] = [each.temperature * self._draft_temperature for each in params]
            for each in ("count_S", "remaining_S", "proposes_S"):
                numbers[each][count:] = 0
        numbers["anchor_S"][:count] = plan.forward.start_D
        numbers["count_S"][:count] = plan.count_D
        if plan.proposals is not None:
            numbers["remaining_S"][:count] = plan.proposals.remaining_D
            numbers["proposes_S"][:count] = plan.proposals.proposes_D
        self._copy.send()

    def forget_samples(self) -> None:
        """Drop every reference to samples."""
        self._of = []

    def launch(self) -> None:
        """Verify, and draw the next drafts, of what the forward pass has left."""
        verify, *draft = self._graphs
        verify()
        self._download.start()
        for each in draft:
            each()

    def wait(self, samples: int) -> Verdict:
        """The verdict of the first samples, on the host; valid until the next step."""
        assert self.verdict is not None
        known = [name for name in Verdict.__slots__ if getattr(self.verdict, name) is not None]
        return Verdict(**{name: here[:samples] for name, here in zip(known, self._download.wait(), strict=True)})

    def _verify(self) -> None:
        there, memory = self._copy.tree, self._memory
        logits_SRV = self._model.head(self._hidden_TH[self._verify_SR])
        if memory is None:
            drafts = Drafts(there.seed_S[:, None][:, :0], there.count_S)
        else:
            waiting = memory.drafts(len(there.count_S), self._drafts, self._kind.keeps_q)
            drafts = Drafts(waiting.token_SM, there.count_S, None, waiting.q_logits_SMV, waiting.q_lse_SM)
        self.verdict = self.verifier(self._sampling, logits_SRV, drafts, there.anchor_S)
        found = [getattr(self.verdict, name) for name in Verdict.__slots__]
        self._download.pack([each for each in found if each is not None])

    def _draft(self) -> None:
        there, memory, verdict = self._copy.tree, self._memory, self.verdict
        assert memory is not None and verdict is not None
        sequences, accepted_S = len(there.count_S), verdict.accepted_S
        row_S, count_S = select_on_device(
            self._level_L, self._block, self._drafts, there.proposes_S > 0, there.remaining_S, accepted_S
        )
        first_S = torch.where(count_S > 0, self._mask_S + row_S, 0)
        slot_M = torch.arange(self._drafts, device=first_S.device)
        index_SM = (first_S[:, None] + slot_M).clamp_max(len(self._hidden_TH) - 1)
        place = memory.drafts(sequences, self._drafts, self._kind.keeps_q)
        hidden_SMH, q_SMV = self._hidden_TH[index_SM], place.q_logits_SMV
        if q_SMV is not None and q_SMV.is_contiguous():
            self._model.head_into(hidden_SMH.flatten(0, 1), q_SMV.flatten(0, 1))
            logits_SMV = q_SMV
        else:
            logits_SMV = self._model.head(hidden_SMH)
        sampled_S = verdict.token_SR.gather(1, accepted_S[:, None])[:, 0]
        made = kernels.draft(
            self._sampling, logits_SMV, there.anchor_S + accepted_S + 1, self._mask, count_S, self._model.markov, sampled_S,
            p_first_SRV=None,
        )  # fmt: skip
        place.token_SM.copy_(made.token_SM)
        place.count_S.copy_(count_S)
        memory.tokens_replaced(made)
        if q_SMV is not None and made.q_logits_SMV is not None and made.q_lse_SM is not None:
            if made.q_logits_SMV.data_ptr() != q_SMV.data_ptr():
                q_SMV.copy_(made.q_logits_SMV)
            assert place.q_lse_SM is not None
            place.q_lse_SM.copy_(made.q_lse_SM)
