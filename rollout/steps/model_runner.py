"""One forward pass of the policy over the rows of a request: inputs are made on the host, sent in one copy, and run.

Invariants:
- Nothing here waits for the device.
- A captured pass computes what the eager pass computes.
- The vocabulary head sees the clean decode rows and no others.

Legend: S sequences, D of them decoding, T rows (D as the last letter of `hidden_TD`: hidden size), M most drafts, R most clean
decode rows, V vocabulary, N rows that hold drafts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...kernels.transfer import upload
from ...model.backends import DraftsBetween, choose
from ...model.layout import DecodeRows, TokenLayout, decode
from ...model.policy import Policy, Routing
from ..cache import BlockTable, CacheView, PagedCache
from ..sampling.two_passes import TwoPasses
from .plan import ForwardRequest
from .recurring import bucket
from .shapes import ShapeCache, captured_sizes, power_of_two

if TYPE_CHECKING:
    from ...kernels.verify.calls import Chain, Verification


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A pass that is ready to run.

    Attributes:
        layout, plan: where the network runs.
        first_S, clean_S: int64, on the host: the first row of each of the S sequences, and its clean rows.
        rows: T.
    """

    layout: TokenLayout
    plan: Any
    view: CacheView
    first_S: np.ndarray
    clean_S: np.ndarray
    rows: int


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What one forward pass gave, on the device.

    Attributes:
        hidden_TD: final hidden states; valid until the next pass.
        mask_D: int64, on the host: the first mask row of each decoding sequence.
        logits_DRV: p's logits of the clean decode rows. Rows past a sequence's own hold anything.
        expert_TL: the expert each layer chose for each row; None where no sample records experts.
        clean_rows: the clean rows of each of the S sequences, prompt rows included; empty where no sample records experts.
        extra: the request's `extra`.
    """

    hidden_TD: torch.Tensor
    mask_D: np.ndarray
    logits_DRV: torch.Tensor
    expert_TL: torch.Tensor | None
    clean_rows: list[slice]
    extra: list[torch.Tensor]


class ModelRunner:
    """Runs forward passes of one policy over one cache.

    Args:
        captured: where kernels run, a pass whose sequences all decode is padded to one of few shapes, and captured in a graph
            where the device can.

    Attributes:
        backend: runs the network, always under the policy's present weights.
        markov: what a token adds to the logits of the mask row after it; None where the policy has no such head.
    """

    def __init__(self, policy: Policy, cache: PagedCache, captured: bool = True) -> None:
        self._policy, self._cache, self._captured = policy, cache, captured
        self._device = policy.device
        self.backend = choose(policy)
        self.markov = self.backend.markov
        self.shapes = ShapeCache(policy, self.backend, cache)

    def head(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Backend.head`."""
        return self.backend.head(hidden, out)

    def head_into(self, hidden_RD: torch.Tensor, logits_RV: torch.Tensor) -> None:
        """See `Policy.head_into`."""
        self._policy.head_into(hidden_RD, logits_RV)

    def take_weights(self, folded: Any = None) -> None:
        """Must be called after the policy's weights have changed. Graphs read the weights where they lie. `folded`: as in
        `Backend.refresh`."""
        self.backend.refresh(folded)
        self.markov = self.backend.markov

    def capture(self, passes: Sequence[DecodeRows], batches: Sequence[int], pages: int | None = None) -> None:
        """Capture passes of so many sequences.

        Args:
            pages: of each sequence; None: sequences reach any length that the policy and the cache allow.
        """
        if self._captured and self.backend.recurs:
            most = min(self._cache.pages_for(self._policy.config.max_position_embeddings), self._cache.total_pages)
            sizes = captured_sizes(batches, most) if pages is None else [(bucket(n), power_of_two(pages)) for n in batches]
            self.shapes.capture(passes, sizes)

    def run(self, request: ForwardRequest, draft_DM: torch.Tensor | None) -> ForwardOutput:
        """One forward pass.

        Args:
            draft_DM: int64, the drafts that the request's rows hold; None where they hold none.
        """
        batch, records = request.batch, request.batch.records_experts
        prompt_D = np.array([batch.scheduled[s].chunk for s in batch.decoding_index], dtype=np.int64)
        recurs = not batch.prefills and self._captured and self.backend.recurs
        # On a CPU the drafts are at hand. Elsewhere they stay on the device and are put into the rows there.
        here = draft_DM.tolist() if draft_DM is not None and draft_DM.is_cpu and not self.backend.recurs else None
        laid_out: LaidOut | None = None
        if recurs:
            full, sequences = request.full, len(batch.scheduled)
            each = len(full.clean) + len(full.proposals) * full.block_length
            first_S, clean_S = np.arange(sequences) * each, np.full(sequences, len(full.clean))
            total = bucket(sequences) * each
        else:
            laid_out = self._lay_out(request.rows(here), _tables(request))
            first_S, clean_S, total = laid_out.first_S, laid_out.clean_S, laid_out.rows
        first_D = first_S[batch.decoding_index] + prompt_D
        index = np.minimum(first_D[:, None] + np.arange(request.width), total - 1)
        places = [] if draft_DM is None or here is not None else _draft_places(request, first_D, draft_DM.shape[1])
        index_DR, places, extra = upload(
            (torch.from_numpy(index), places, [torch.from_numpy(numbers) for numbers in request.extra]), self._device
        )
        fill = None
        if places:
            assert draft_DM is not None
            row_N, token_N = places[0], draft_DM.flatten().index_select(0, places[1])

            def fill(token_T: torch.Tensor) -> None:
                token_T.index_copy_(0, row_N, token_N)

        if laid_out is None:
            tables = _tables(request)
            hidden_TD, expert_TL = self.shapes.run(request.full, tables, request.start_D, request.token_D, fill, records)
        else:
            if fill is not None:
                fill(laid_out.layout.token_T)
            hidden_TD, expert_TL = self._run_once(laid_out, records)
        logits_DRV = self.head(hidden_TD[index_DR]) if batch.decoding else hidden_TD[:0]
        # Rows of drafts that a sequence lacks count as its own: their positions run again before they are committed.
        spans = _spans(first_S, clean_S) if records else []
        mask_D = (first_S + clean_S)[batch.decoding_index]
        return ForwardOutput(hidden_TD, mask_D, logits_DRV, expert_TL, spans, extra)

    def run_twice(
        self, request: ForwardRequest, second: ForwardRequest, made: TwoPasses, draws: Chain, verifies: Verification | None
    ) -> tuple[tuple[torch.Tensor, list[slice]], ...]:
        """Two passes as one call, with drafts drawn between them. Only where `backend.drafts_between`.

        Args:
            request: with an anchor and mask rows of each sequence that drafts. second: the drafts of these sequences.
            made: where logits are written. draws, verifies: as of `made.calls`.
        Returns:
            expert_TL and clean_rows (`ForwardOutput`) of each pass, where samples record experts.
        """
        batch = request.batch
        tables = _tables(request) + _tables(second)
        laid_out = self._lay_out(request.rows(), tables, second.start_D, second.clean_D.tolist())
        s, first_S, clean_S = len(batch.scheduled), laid_out.first_S, laid_out.clean_S
        anchor_D = (first_S[:s] + clean_S[:s])[batch.decoding_index] - 1
        between = DraftsBetween(s, anchor_D, second.draft_row_D, made.hidden_NH, made.drawn_NV, made.logits_DRV, draws, verifies)
        routing = Routing([], []) if batch.records_experts else None
        self.backend.forward_twice(laid_out.layout, laid_out.plan, laid_out.view, routing, between)
        if routing is None:
            return ()
        expert_TL, spans = torch.stack(routing.expert_LT, dim=1), _spans(first_S, clean_S)
        return (expert_TL, spans[:s]), (expert_TL, spans[s:])

    def _lay_out(
        self, rows: list[DecodeRows], tables: list[BlockTable], later_start_K: Sequence[int] = (),
        later_count_K: Sequence[int] = (),
    ) -> LaidOut:  # fmt: skip
        """A pass over these rows, or two (`decode`), whose sequences lie in these places of the cache."""
        clean = [len(own.clean) for own in rows]
        count = [count + len(own.proposals) * own.block_length for count, own in zip(clean, rows)]
        clean_S, count_S = np.array([*clean, *later_count_K]), np.array([*count, *later_count_K])
        first_S, total = np.cumsum(count_S) - count_S, int(count_S.sum())
        layout = decode(rows, self._policy.mask_token_id, later_start_K, later_count_K)
        view = self._cache.view(tables, layout)
        return LaidOut(*self.backend.prepare(layout, view), view, first_S, clean_S, total)

    def _run_once(self, laid_out: LaidOut, records: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_TD of every row, whatever each sequence runs, and the experts where they are recorded."""
        routing = Routing([], []) if records else None
        hidden_TD = self.backend.forward(laid_out.layout, laid_out.plan, laid_out.view, routing)
        return hidden_TD, None if routing is None else torch.stack(routing.expert_LT, dim=1)


def _spans(first_S: np.ndarray, clean_S: np.ndarray) -> list[slice]:
    return [slice(a, a + n) for a, n in zip(first_S.tolist(), clean_S.tolist(), strict=True)]


def _tables(request: ForwardRequest) -> list[BlockTable]:
    return [sample.block_table for sample, _, _ in request.batch.scheduled if sample.block_table is not None]


def _draft_places(request: ForwardRequest, first_D: np.ndarray, most: int) -> list[torch.Tensor]:
    """Rows of the pass that hold drafts, and the entry of the flat token_DM that goes to each; empty where none does.

    Args:
        first_D: first decode row of each decoding sequence. most: M.
    """
    count_D = request.clean_D - request.first_draft
    if not count_D.any():
        return []
    slot = np.arange(most)
    real = slot < count_D[:, None]
    row, entry = (first_D + request.first_draft)[:, None] + slot, request.draft_row_D[:, None] * most + slot
    return [torch.from_numpy(row[real]), torch.from_numpy(entry[real])]
