"""Paged K/V and the CCA tail of every running sequence, and the pages that other sequences may begin with.

Invariants:
- A page belongs to one sequence, or several sequences share it and none writes to it. Only full pages are shared.
- The CCA tail of a page's last positions lies with the page, so a sequence may begin behind any full page. The tail of the other
  positions is a ring over positions. It is longer than the clean rows of a decode step, so a rejected row never overwrites a
  committed row that a later row still reads.
- Nothing is rolled back: the next step overwrites rows past a sequence's length.
- A page is kept for reuse only below its sequence's length, where every row is a committed token's clean row, and only if all of
  it was computed since the latest `reset_prefix_cache`.
- A row past its sequence's pages is not kept.

Legend: S sequences, L positions asked for, H hops, G key heads, D head size, C q/k projection channels,
W width of the delayed value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from ..kernels.cca import NOTHING, Pools
from ..kernels.transfer import upload
from ..model.layout import TokenLayout
from ..model.policy import Policy
from ..model.state import Paging
from .cache_places import CachePlaces, CacheSizes
from .prefix_cache import PrefixCache

_NO_PAGES: np.ndarray = np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class BlockTable:
    """Where one sequence lies in the cache, as vLLM's block table: its tail slot, its pages in order (int64), the number of
    positions that are valid, and the number of resets of the prefix cache before it was opened.

    `pages` is replaced, never written to. It is the beginning of `room`, which no other table has.
    """

    slot: int
    pages: np.ndarray = field(default_factory=lambda: _NO_PAGES)
    length: int = 0
    resets: int = 0
    room: np.ndarray = field(default_factory=lambda: _NO_PAGES)

    def append(self, pages: Sequence[int]) -> None:
        """Put pages behind the others."""
        held, count = len(self.pages), len(self.pages) + len(pages)
        if count > len(self.room):
            self.room = np.empty(max(2 * count, 8), dtype=np.int64)
            self.room[:held] = self.pages
        for place, page in enumerate(pages, held):
            self.room[place] = page
        self.pages = self.room[:count]


class PagedCache:
    """Pools of pages and tail slots.

    Args:
        pages, page_size: size of the K/V pool, in pages and in positions per page.
        slots: most sequences at once.
        decode_rows: most clean rows of one decode step.
    """

    def __init__(self, policy: Policy, pages: int, page_size: int, slots: int, decode_rows: int) -> None:
        config = policy.config
        self.page_size, self.hops, self.ring = page_size, policy.hops, decode_rows + policy.hops
        layers, kv = config.num_hidden_layers, (config.num_key_value_heads, config.head_dim)
        channels = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim

        def pool(*shape: int) -> torch.Tensor:
            return torch.zeros(layers, *shape, dtype=policy.dtype, device=policy.device)

        # Zeros, not empty memory: a masked key is multiplied by 0, and 0 * NaN is not 0.
        self.k, self.v = (pool(pages * page_size, *kv) for _ in range(2))
        self.sizes = CacheSizes(page_size, self.ring, min(self.hops, page_size), slots * self.ring)
        tails = slots * self.ring + pages * self.sizes.page_tail
        self.x = pool(tails, channels)
        self.delayed = pool(tails, kv[0] * kv[1] // 2)
        self.all_pools = Pools(self.k, self.v, self.x, self.delayed)
        self._pools = [Pools(*pools) for pools in zip(self.k, self.v, self.x, self.delayed, strict=True)]
        self.total_pages, self._total_slots = pages, slots
        self._users = [0] * pages
        self._prefixes, self._resets = PrefixCache(page_size), 0
        self.release_all()

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free) + self._prefixes.unused

    @property
    def cached_pages(self) -> int:
        """The free pages whose K/V is kept for reuse until other sequences need them."""
        return self._prefixes.unused

    @property
    def free_slots(self) -> int:
        """Tail slots that no sequence holds."""
        return len(self._slots)

    def pages_for(self, positions: int) -> int:
        """Pages that hold this many positions."""
        return pages_for(positions, self.page_size)

    def open(self) -> BlockTable:
        """An empty block table for a new sequence. A slot must be free."""
        return BlockTable(self._slots.pop(), _NO_PAGES, 0, self._resets, _NO_PAGES)

    def reuse(self, table: BlockTable, tokens: Sequence[int], most: int, salt: bytes = b"") -> int:
        """Let an empty table begin with the pages that are kept of these tokens; returns the positions it then holds.

        Args:
            most: positions at most. salt: pages that were kept under another one are passed over.
        """
        assert not table.length and not len(table.pages) and table.resets == self._resets
        if found := self._prefixes.find(tokens, most // self.page_size, salt):
            for page in found:
                self._prefixes.use(page)
                self._users[page] += 1
            table.append(found)
            table.length = len(found) * self.page_size
        return table.length

    def keep(self, table: BlockTable, tokens: Sequence[int], salt: bytes = b"") -> None:
        """Keep the full pages below the table's length for reuse, also when the table is released. `tokens` are the
        sequence's."""
        if table.resets == self._resets:
            self._prefixes.add(tokens, table.pages[: table.length // self.page_size].tolist(), salt)

    def reset_prefix_cache(self) -> None:
        """Keep nothing for reuse that was computed so far. Must be called when the weights change."""
        self._free += self._prefixes.clear()
        self._resets += 1

    def reserve(self, table: BlockTable, positions: int) -> bool:
        """Allocate pages for positions 0..positions-1; False, and nothing changes, when the pool has too few pages."""
        missing = self.pages_for(positions) - len(table.pages)
        if missing <= 0:
            return True
        if missing > self.free_pages:
            return False
        pages = [self._free.pop() if self._free else self._prefixes.evict() for _ in range(missing)]
        for page in pages:
            self._users[page] = 1
        table.append(pages)
        return True

    def fork(self, table: BlockTable) -> BlockTable | None:
        """A second sequence with the same past: full pages are shared, the last partial page and the tail are copied.
        None when a slot or a page is lacking."""
        full, rest = divmod(table.length, self.page_size)
        if not self._slots or (rest and not self.free_pages):
            return None
        copy, shared = BlockTable(self._slots.pop(), length=table.length, resets=table.resets), table.pages[:full].tolist()
        for page in shared:
            self._users[page] += 1
        copy.append(shared)
        if rest:
            self.reserve(copy, table.length)
            for pool in (self.k, self.v):
                source, target = (page * self.page_size for page in (table.pages[full], copy.pages[full]))
                pool[:, target : target + rest] = pool[:, source : source + rest]
            for pool in (self.x, self.delayed):
                count, first = self.sizes.page_tail, self.sizes.first_page_tail
                source, target = (first + page * count for page in (table.pages[full], copy.pages[full]))
                pool[:, target : target + count] = pool[:, source : source + count]
        for pool in (self.x, self.delayed):
            source, target = table.slot * self.ring, copy.slot * self.ring
            pool[:, target : target + self.ring] = pool[:, source : source + self.ring]
        return copy

    def release(self, table: BlockTable) -> None:
        """Free the sequence's pages and its slot. Shared pages stay with the other sequences, and kept ones can be reused."""
        users = self._users
        for page in table.pages.tolist()[::-1]:
            users[page] -= 1
            if users[page]:
                continue
            if page in self._prefixes:
                self._prefixes.put_away(page)
            else:
                self._free.append(page)
        self._slots.append(table.slot)
        table.pages, table.length, table.room = _NO_PAGES, 0, _NO_PAGES

    def release_all(self) -> None:
        """Free all pages and slots, and keep nothing for reuse."""
        self._prefixes.clear()
        self._resets += 1
        self._free: list[int] = list(range(self.total_pages))[::-1]
        self._slots: list[int] = list(range(self._total_slots))[::-1]
        self._users = [0] * self.total_pages

    def view(self, sequences: Sequence[BlockTable], layout: TokenLayout, width: int | None = None) -> CacheView:
        """The state of one forward pass over the host layout `layout`, whose sequence s is `sequences[s]`.

        Args:
            width: columns of the table of pages; None for the most pages of a sequence.
        """
        return CacheView(self, sequences, layout, width)

    def pools(self, layer: int) -> Pools:
        """One layer's cache."""
        return self._pools[layer]


def pages_for(positions: int, page_size: int) -> int:
    """Pages that hold this many positions."""
    return -(-positions // page_size)


def page_table(sequences: Sequence[BlockTable], table_SP: np.ndarray) -> np.ndarray:
    """Write the pages of each sequence into its row; returns the number of pages of each."""
    for row, table in zip(table_SP, sequences):
        row[: len(table.pages)] = table.pages
    return np.array([len(table.pages) for table in sequences])


class CacheView:
    """`model.state.SequenceState` of one layout: where its sequences' past lies and where its clean rows go.

    Host arrays are made at once. Index tensors on the device are made at the first `read` or `write`; kernels that work on the
    pages in place need none.
    """

    def __init__(self, cache: PagedCache, sequences: Sequence[BlockTable], layout: TokenLayout, width: int | None) -> None:
        self._cache, self._device = cache, cache.k.device
        self._start_S = layout.start_S
        width = width or max(1, *(len(table.pages) for table in sequences))
        self._table_SP = np.zeros((len(sequences), width), dtype=np.int64)
        pages, slots = page_table(sequences, self._table_SP), np.array([table.slot for table in sequences])
        self._places = CachePlaces.of(layout, slots, pages, self._table_SP, cache.sizes, cache.hops)
        self._read: dict[int, torch.Tensor] = {}

    @cached_property
    def longest(self) -> int:
        """Cached positions of the longest sequence."""
        return int(self._start_S.max())

    def paging(self) -> Paging:
        """Where this layout's rows lie, for kernels that work on the pages in place."""
        write, tail, before, apart = self._places
        table, entries, write_T, tail_T = (torch.from_numpy(x) for x in (self._table_SP, before, write, tail))
        return Paging(self._cache.page_size, table, entries, write_T, tail_T, apart)

    def pools(self, layer: int) -> Pools:
        """One layer's cache."""
        return self._cache.pools(layer)

    def all_pools(self) -> Pools:
        """The cache of all layers."""
        return self._cache.all_pools

    def read(self, layer: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k_SLGD, v_SLGD of so many positions from the first on; past a sequence's pages, of any page."""
        if positions not in self._read:
            size, line = self._cache.page_size, np.arange(positions)
            page = np.minimum(line // size, self._table_SP.shape[1] - 1)
            self._read[positions] = upload(torch.from_numpy((self._table_SP[:, page] * size + line % size).ravel()), self._device)
        shape = (len(self._table_SP), positions)
        k, v = (pool[layer].index_select(0, self._read[positions]) for pool in (self._cache.k, self._cache.v))
        return k.view(*shape, *k.shape[1:]), v.view(*shape, *v.shape[1:])

    def write(
        self, layer: int, k_TGD: torch.Tensor, v_TGD: torch.Tensor, x_TC: torch.Tensor, delayed_TW: torch.Tensor
    ) -> None:
        """Keep the clean rows."""
        at, cache = self._indices, self._cache
        for pools, rows, places, kept in (
            ((cache.k, cache.v), at.rows, at.write, (k_TGD, v_TGD)),
            ((cache.x, cache.delayed), at.tail_rows, at.tail_write, (x_TC, delayed_TW)),
        ):
            for pool, new in zip(pools, kept, strict=True):
                pool[layer].index_copy_(0, places, new if new.shape[0] == rows.shape[0] else new.index_select(0, rows))

    @cached_property
    def _indices(self) -> _Indices:
        write, tail, _, _ = self._places
        clean, kept = np.flatnonzero(write != NOTHING), np.flatnonzero(tail != NOTHING)
        arrays = clean, write[clean], kept, tail[kept]
        return _Indices(*upload(tuple(map(torch.from_numpy, arrays)), self._device))


class _Indices(NamedTuple):
    """The rows kept and where, on the device."""

    rows: torch.Tensor
    write: torch.Tensor
    tail_rows: torch.Tensor
    tail_write: torch.Tensor
