"""TokenLayout: the rows of one forward pass, who sees whom among them, and who precedes whom.

Invariants:
- Every forward pass, in training and in decoding, is a flat pack of T rows described by one `TokenLayout`. There is no
  other way to call the network, so trainer, engine and scorer cannot disagree.
- One rule answers who attends to whom (`sees`); one field answers who precedes whom (`parent_T`). Convolutions and the
  delayed value follow parents, never neighbouring rows. `visibility` works both out for the backends.
- Positions fall by exactly one along parents. Rows of a sequence are contiguous; sequences are numbered 0..S-1 in order.

Legend: T rows, S sequences, B block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.dispatch import compiled_where_installed
from ..kernels.transfer import upload

CLEAN = -1
"""`block_T` of a row that is an ordinary token, not part of a mask block."""
FROM_TAIL = -1
"""`parent_T` of a row that continues from what the sequence's cache holds."""
FROM_START = -2
"""`parent_T` of the first row of a document: nothing precedes it."""


@dataclass(frozen=True)
class TokenLayout:
    """A flat pack of rows.

    Attributes:
        token_T: int64, token id of each row (the mask token for mask rows).
        position_T: int64, position in the sequence; feeds RoPE.
        sequence_T: int64, 0..S-1, non-decreasing.
        parent_T: int64, row of the preceding token, or `FROM_TAIL`, or `FROM_START`.
        limit_T: int64, last clean position the row attends to.
        block_T: int64, mask block number (unique in the pack), or `CLEAN`.
        start_S: int64, first position of each sequence that is *not* in its cache (0 without a cache).
    """

    token_T: torch.Tensor
    position_T: torch.Tensor
    sequence_T: torch.Tensor
    parent_T: torch.Tensor
    limit_T: torch.Tensor
    block_T: torch.Tensor
    start_S: torch.Tensor

    @property
    def rows(self) -> int:
        """T."""
        return self.token_T.shape[0]

    @property
    def sequences(self) -> int:
        """S."""
        return self.start_S.shape[0]

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on another device."""
        return upload(self, torch.device(device))

    def sees(self) -> torch.Tensor:
        """bool[T, T]: does row i attend to row j? The plain rule, to which tests hold every backend."""
        i, j = slice(None), None
        same = self.sequence_T[i, j] == self.sequence_T[j, i]
        clean = self.position_T[j, i] <= self.limit_T[i, j]
        block = self.block_T[j, i] == self.block_T[i, j]
        return same & torch.where((self.block_T == CLEAN)[j, i], clean, block)


def _tensors(arrays: dict[str, np.ndarray]) -> TokenLayout:
    return TokenLayout(**{name: torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for name, a in arrays.items()})


def causal(documents: Sequence[Sequence[int]]) -> TokenLayout:
    """Clean rows only, from the start of every document: AR training and scoring.

    Args:
        documents: token ids per sequence, each non-empty.
    """
    lengths = np.array([len(d) for d in documents], dtype=np.int64)
    first = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(first, lengths)
    parent = np.arange(lengths.sum()) - 1
    parent[first] = FROM_START
    return _tensors(
        dict(
            token_T=np.concatenate([np.asarray(d, dtype=np.int64) for d in documents]),
            position_T=position,
            sequence_T=np.repeat(np.arange(len(documents)), lengths),
            parent_T=parent,
            limit_T=position,
            block_T=np.full(lengths.sum(), CLEAN),
            start_S=np.zeros_like(lengths),
        )
    )


def diffusion(
    documents: Sequence[Sequence[int]], blocks: Sequence[Sequence[tuple[int, int]]], mask_token: int
) -> tuple[TokenLayout, torch.Tensor]:
    """Diffusion training: each document's clean rows, then mask blocks anywhere over a masked copy.

    Args:
        documents: token ids per sequence.
        blocks: per document the (start, length) of its mask blocks, 1 <= start <= len(document). Blocks may overlap, and
            may run past the document's end, as they do in decoding: cutting them there would tell the answer's length.
        mask_token: token id of every mask row.

    Returns:
        The layout, and target_T (int64): the token each row must predict; -100 where there is none. A clean row
        predicts its successor, a mask row the token at its own position.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in
                                          ("token_T", "position_T", "sequence_T", "parent_T", "limit_T", "block_T")}
    targets, row, block = [], 0, 0
    for s, (document, spans) in enumerate(zip(documents, blocks, strict=True)):
        clean = np.asarray(document, dtype=np.int64)
        n = len(clean)
        position = np.arange(n)
        parent = row + position - 1
        parent[0] = FROM_START
        start, length = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
        opening = np.repeat(start, length)
        masks = len(opening)
        slot = np.arange(masks) - np.repeat(np.cumsum(length) - length, length)
        masked = opening + slot
        parts["token_T"] += [clean, np.full(masks, mask_token)]
        parts["position_T"] += [position, masked]
        parts["sequence_T"].append(np.full(n + masks, s))
        parts["parent_T"] += [parent, np.where(slot == 0, row + opening - 1, row + n + np.arange(masks) - 1)]
        parts["limit_T"] += [position, opening - 1]
        parts["block_T"] += [np.full(n, CLEAN), block + np.repeat(np.arange(len(start)), length)]
        targets += [np.append(clean[1:], -100), np.where(masked < n, clean[np.minimum(masked, n - 1)], -100)]
        row, block = row + n + masks, block + len(start)
    arrays = {name: np.concatenate(chunks) for name, chunks in parts.items()}
    layout = _tensors({**arrays, "start_S": np.zeros(len(documents), dtype=np.int64)})
    return layout, torch.from_numpy(np.concatenate(targets))


@dataclass(frozen=True)
class DecodeRows:
    """What one sequence runs in a decode step, relative to its anchor.

    Attributes:
        clean: tokens `[anchor, d_1 .. d_m]` (pass B of `two_pass` has no anchor row: `[d_1 .. d_m]`).
        start: position of the first clean row.
        proposals: first positions of the mask blocks after the clean rows' start, as offsets from `start`: the block
            at offset o begins at position start + o, sees clean positions below it, and its first parent is the clean
            row at offset o - 1.
        block_length: mask rows per block.
    """

    clean: Sequence[int]
    start: int
    proposals: tuple[int, ...]
    block_length: int

    def behind(self, tokens: Sequence[int]) -> DecodeRows:
        """The same, with the tokens before `start` in the pack and not in the cache."""
        count = len(tokens)
        offsets = tuple(offset + count for offset in self.proposals)
        return DecodeRows([*tokens, *self.clean], self.start - count, offsets, self.block_length)


def decode(
    sequences: Sequence[DecodeRows], mask_token: int, later_start_K: Sequence[int] = (), later_count_K: Sequence[int] = ()
) -> TokenLayout:
    """One step over a cache, prefill included: per sequence its clean rows, then one mask block per proposal.

    Everything before `start` is in the cache; a sequence whose `start` is 0 opens its document here.

    Args:
        later_start_K, later_count_K: of a second pass, behind the others: position of the first clean row of each of its
            sequences, and how many there are. Their tokens are not known yet.
    """
    size = [(len(s.clean), len(s.proposals), s.block_length) for s in sequences]
    clean, starts = [token for s in sequences for token in s.clean], [s.start for s in sequences]
    size_S3 = np.array([*size, *((count, 0, 0) for count in later_count_K)], dtype=np.int64)
    start_S = np.array([*starts, *later_start_K], dtype=np.int64)
    clean_N = np.array(clean + [mask_token] * sum(later_count_K), dtype=np.int64)
    offset_P = np.array([offset for s in sequences for offset in s.proposals], dtype=np.int64)
    fields_6T = np.empty((6, len(clean_N) + sum([count * length for _, count, length in size])), dtype=np.int64)
    compiled_where_installed(_fill_decode)(size_S3, start_S, clean_N, offset_P, mask_token, *fields_6T)
    return TokenLayout(*map(torch.from_numpy, (*fields_6T, start_S)))


def _fill_decode(size_S3, start_S, clean_N, offset_P, mask_token, token_T, position_T, sequence_T, parent_T, limit_T, block_T):
    """Writes the last six arrays, given each sequence's clean rows, proposals and block length, and the tokens and the offsets of
    all of them, one after another."""
    t = n = proposal = 0
    for s in range(len(start_S)):
        first, start = t, start_S[s]
        opens = FROM_TAIL if start > 0 else FROM_START
        clean, proposals, length = size_S3[s]
        for i in range(clean):
            token_T[t], block_T[t] = clean_N[n], CLEAN
            position_T[t] = limit_T[t] = start + i
            parent_T[t] = t - 1 if i else opens
            t, n = t + 1, n + 1
        for _ in range(proposals):
            offset = offset_P[proposal]
            for slot in range(length):
                token_T[t], block_T[t] = mask_token, proposal
                position_T[t], limit_T[t] = start + offset + slot, start + offset - 1
                parent_T[t] = t - 1 if slot else first + offset - 1 if offset else opens
                t += 1
            proposal += 1
        sequence_T[first:t] = s
