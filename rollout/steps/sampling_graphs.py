"""Which steps are captured whole: graphs of sampling, by shape of a forward pass that has a graph and by kind of sampler.

Invariants: as of the graphs of forward passes (`shapes`), whose budget these share. A step without these graphs samples eagerly,
and gives the same.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from ...kernels.graphs import without_garbage_collection
from ...model.layout import DecodeRows
from ...model.policy import Policy
from ..sampling.drafts import Drafts, SamplerRows
from .captured import CAPTURED_KINDS, CapturedSampling, DraftMemory, SamplerKind, Verifier, kind_of
from .model_runner import ModelRunner
from .plan import StepPlan
from .shapes import Shape, key_of

_log = logging.getLogger(__name__)


class CapturedStep(NamedTuple):
    """A step that was launched to its end. `sampling` has its verdict; `drafts` are where the next drafts will lie."""

    sampling: CapturedSampling
    drafts: Drafts | None


class SamplingGraphs:
    """The graphs of one policy, over the shapes of its `ModelRunner`."""

    def __init__(self, policy: Policy, model: ModelRunner, draft_temperature: float) -> None:
        self._policy, self._model, self._draft_temperature = policy, model, draft_temperature
        self._memory: DraftMemory | None = None
        self._known: dict[Hashable, CapturedSampling] = {}

    def capture(self, passes: Sequence[DecodeRows], verifier: Verifier) -> None:
        """Capture the sampling of steps of one pass, the most important passes first, as far as the budget has room.

        Args:
            passes: decode rows of a sequence that leaves nothing out, anchor first.
        """
        shapes, budget = self._model.shapes, self._model.shapes.budget
        if not shapes.captured_sizes:
            return
        drafts = max(len(rows.clean) - 1 for rows in passes)
        most = max(size[0] for size in shapes.captured_sizes)
        if drafts and (self._memory is None or self._memory.token_SM.shape < (most, drafts)):
            policy, self._known = self._policy, {}
            self._memory = DraftMemory(policy.device, most, drafts, policy.config.vocab_size, policy.mask_token_id)
        before, wanted = len(self._known), 0
        with without_garbage_collection():
            for kind, rows in itertools.product(CAPTURED_KINDS, passes):
                for shape in shapes.with_graphs(rows):
                    wanted += self._key(shape, rows, kind) not in self._known
                    if budget.has_room:
                        self._capture(shape, rows, kind, verifier)
        _log.info("captured the sampling of %d of %d shapes and samplers: graphs take %d MB of at most %d MB",
                  len(self._known) - before, wanted, budget.bytes >> 20, budget.most_bytes >> 20)  # fmt: skip

    def _key(self, shape: Shape, rows: DecodeRows, kind: SamplerKind) -> Hashable:
        assert shape.hidden_TH is not None
        return shape.sequences, key_of(rows), kind, shape.hidden_TH.data_ptr()

    def _capture(self, shape: Shape, rows: DecodeRows, kind: SamplerKind, verifier: Verifier) -> None:
        key, memory = self._key(shape, rows, kind), self._memory if len(rows.clean) > 1 else None
        if key in self._known:
            return
        assert shape.hidden_TH is not None
        if memory is not None and kind.keeps_q:
            memory.keep_q()
        sampling = CapturedSampling(
            self._model, verifier, memory, rows, shape.sequences, kind, shape.hidden_TH, self._policy.mask_token_id,
            self._draft_temperature,
        )
        try:
            sampling.capture(self._model.shapes.budget, self._model.shapes.pool)
        except RuntimeError as error:  # torch's, of the capture or of memory
            _log.warning("%d sequences of %s sample without a graph: %s", shape.sequences, kind.sampler,
                         " ".join(str(error).split())[:300])  # fmt: skip
            return
        self._known[key] = sampling

    def launch(self, plan: StepPlan, sampling: SamplerRows, waiting: Drafts, verifier: Verifier) -> CapturedStep | None:
        """Launch the whole step where all of it is captured. Else None, and nothing has been launched.

        Args:
            waiting: the drafts that the step verifies, as the last step left them.
        """
        batch, request, kind = plan.batch, plan.forward, kind_of(sampling)
        if not self._known or plan.verify_forward is not None or batch.prefills or batch.records_experts or kind is None:
            return None
        tables = [sample.block_table for sample, _, _ in batch.scheduled if sample.block_table is not None]
        shape = self._model.shapes.captured(request.full, tables)
        found = None if shape is None else self._known.get(self._key(shape, request.full, kind))
        if shape is None or found is None or found.verifier is not verifier:
            return None
        memory = self._memory if plan.proposals is not None else None
        if memory is not None:
            memory.put(waiting)
        found.send(plan, batch.decoding)
        row_token_SM = None if memory is None else memory.row_token_SM
        shape.start(tables, request.start_D, request.token_D, row_token_SM)
        found.launch()
        drafts = len(request.full.clean) - 1
        return CapturedStep(
            found, None if memory is None else memory.drafts(len(batch.decoding), drafts, kind.keeps_q)
        )

    def tokens_replaced(self, drafts: Drafts) -> None:
        """Must be called when tokens of waiting drafts were replaced."""
        if self._memory is not None and self._memory.holds(drafts):
            self._memory.tokens_replaced(drafts)

    def forget_samples(self) -> None:
        """Drop every reference to samples."""
        for sampling in self._known.values():
            sampling.forget_samples()

