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
from typing import Any

import numpy as np
import torch

from ...kernels.transfer import upload
from ...model.backends import choose
from ...model.layout import DecodeRows, TokenLayout, decode
from ...model.policy import Policy, Routing
from ..cache import BlockTable, CacheView, PagedCache
from .plan import ForwardRequest
from .recurring import bucket
from .shapes import ShapeCache, captured_sizes, power_of_two


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A pass that is ready to run.

    Attributes:
        layout, plan: where the network runs. The layout of two passes that were laid out together holds the rows of both.
        first_S, clean_S: int64, on the host: the first row of each of the S sequences of the pass, and its clean rows.
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
        second: the next pass, where it was laid out with this one.
    """

    hidden_TD: torch.Tensor
    mask_D: np.ndarray
    logits_DRV: torch.Tensor
    expert_TL: torch.Tensor | None
    clean_rows: list[slice]
    extra: list[torch.Tensor]
    second: LaidOut | None = None


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

    def run(self, request: ForwardRequest, draft_DM: torch.Tensor | None, second: ForwardRequest | None = None) -> ForwardOutput:
        """One forward pass.

        Args:
            draft_DM: int64, the drafts that the request's rows hold; None where they hold none.
            second: what the next pass runs. It is laid out with this one where the backend can.
        """
        batch, records = request.batch, request.batch.records_experts
        prompt_D = np.array([batch.scheduled[s].chunk for s in batch.decoding_index], dtype=np.int64)
        recurs = not batch.prefills and self._captured and self.backend.recurs
        # On a CPU the drafts are at hand. Elsewhere they stay on the device and are put into the rows there.
        here = draft_DM.tolist() if draft_DM is not None and draft_DM.is_cpu and not self.backend.recurs else None
        laid_out: LaidOut | None = None
        after: LaidOut | None = None
        if recurs:
            full, sequences = request.full, len(batch.scheduled)
            each = len(full.clean) + len(full.proposals) * full.block_length
            first_S, clean_S = np.arange(sequences) * each, np.full(sequences, len(full.clean))
            total = bucket(sequences) * each
        else:
            laid_out, after = self._lay_out(request, here, second)
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
        return ForwardOutput(hidden_TD, mask_D, logits_DRV, expert_TL, spans, extra, after)

    def run_second(self, request: ForwardRequest, laid_out: LaidOut, draft_DM: torch.Tensor) -> ForwardOutput:
        """`run` of a pass that was laid out with the one before it. All its rows hold drafts."""
        clean_D, width, records = request.clean_D, request.width, request.batch.records_experts
        token_DR, whole = draft_DM.numpy()[request.draft_row_D, :width], laid_out.rows == len(clean_D) * width
        drafts_T = token_DR.ravel() if whole else token_DR[np.arange(width) < clean_D[:, None]]
        laid_out.layout.token_T.numpy()[-laid_out.rows :] = drafts_T
        hidden_TD, expert_TL = self._run_once(laid_out, records)
        if whole:
            logits_DRV = self.head(hidden_TD).unflatten(0, (-1, width))
        else:
            index_DR = np.minimum(laid_out.first_S[:, None] + np.arange(width), laid_out.rows - 1)
            logits_DRV = self.head(hidden_TD[torch.from_numpy(index_DR)])
        spans = _spans(laid_out.first_S, clean_D) if records else []
        extra = [torch.from_numpy(numbers) for numbers in request.extra]
        return ForwardOutput(hidden_TD, laid_out.first_S + clean_D, logits_DRV, expert_TL, spans, extra)

    def _lay_out(
        self, request: ForwardRequest, here: list[list[int]] | None, second: ForwardRequest | None
    ) -> tuple[LaidOut, LaidOut | None]:
        """A pass and, where the backend can, the second one, as one layout: most of the host's work is per layout.

        Args:
            here: the drafts that the request's rows hold, where the host knows them.
        """
        rows, tables = request.rows(here), _tables(request)
        s, both = len(rows), second is not None and self.backend.splits
        if both and second is not None:
            rows, tables = rows + second.rows(), tables + _tables(second)
        clean_S = np.array([len(own.clean) for own in rows])
        count_S = clean_S + np.array([len(own.proposals) * own.block_length for own in rows])
        first_S, total = np.cumsum(count_S) - count_S, int(count_S.sum())
        layout = decode(rows, self._policy.mask_token_id)
        view = self._cache.view(tables, layout)
        layout, plan = self.backend.prepare(layout, view)
        if not both:
            return LaidOut(layout, plan, view, first_S, clean_S, total), None
        t, (first_plan, second_plan) = int(first_S[s]), self.backend.split(plan, s)
        return (
            LaidOut(layout, first_plan, view, first_S[:s], clean_S[:s], t),
            LaidOut(layout, second_plan, view, first_S[s:] - t, clean_S[s:], total - t),
        )

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
