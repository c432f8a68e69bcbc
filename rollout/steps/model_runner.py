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
from ...model.layout import DecodeRows, decode
from ...model.policy import Policy, Routing
from ..cache import BlockTable, PagedCache
from .plan import ForwardRequest
from .recurring import bucket
from .shapes import Fill, ShapeCache, captured_sizes, power_of_two


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

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., D] to logits [..., V]."""
        return self.backend.head(hidden)

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
        tables = [sample.block_table for sample, _, _ in batch.scheduled if sample.block_table is not None]
        prompt_D = np.array([batch.scheduled[s].chunk for s in batch.decoding_index], dtype=np.int64)
        recurs = not batch.prefills and self._captured and self.backend.recurs
        # On a CPU the drafts are at hand. Elsewhere they stay on the device and are put into the rows there.
        here = draft_DM.tolist() if draft_DM is not None and draft_DM.is_cpu and not self.backend.recurs else None
        rows: list[DecodeRows] = []
        if recurs:
            full = request.full
            each = len(full.clean) + len(full.proposals) * full.block_length
            first_S, clean_S = np.arange(len(tables)) * each, np.full(len(tables), len(full.clean))
            total = bucket(len(tables)) * each
        else:
            rows = request.rows(here)
            clean_S = np.array([len(own.clean) for own in rows])
            count_S = clean_S + np.array([len(own.proposals) * own.block_length for own in rows])
            first_S, total = np.cumsum(count_S) - count_S, count_S.sum()
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

        if recurs:
            hidden_TD, expert_TL = self.shapes.run(request.full, tables, request.start_D, request.token_D, fill, records)
        else:
            hidden_TD, expert_TL = self._run_once(rows, tables, fill, records)
        logits_DRV = self.head(hidden_TD[index_DR]) if batch.decoding else hidden_TD[:0]
        # Rows of drafts that a sequence lacks count as its own: their positions run again before they are committed.
        spans = [slice(a, a + n) for a, n in zip(first_S.tolist(), clean_S.tolist(), strict=True)] if records else []
        mask_D = (first_S + clean_S)[batch.decoding_index]
        return ForwardOutput(hidden_TD, mask_D, logits_DRV, expert_TL, spans, extra)

    def _run_once(
        self, rows: list[DecodeRows], tables: list[BlockTable], fill: Fill | None, records: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_TD of every row, whatever each sequence runs, and the experts where they are recorded."""
        layout = decode(rows, self._policy.mask_token_id)
        view = self._cache.view(tables, layout)
        routing = Routing([], []) if records else None
        layout, plan = self.backend.prepare(layout, view)
        if fill is not None:
            fill(layout.token_T)
        hidden_TD = self.backend.forward(layout, plan, view, routing)
        return hidden_TD, None if routing is None else torch.stack(routing.expert_LT, dim=1)


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
