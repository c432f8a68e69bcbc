"""Packs of documents, dealt to any number of processes.

Invariants:
- What pack n of a stage holds is a function of the configuration and n, however many processes share the packs.
- The packs of a step come from as many lanes, pack n from lane n % lanes. A lane reads pools of its own, so a process makes
  the documents of its own packs alone.
- The stream goes on from `places`, which are small, without making what came before. It holds one pool of each of its lanes.
- A document is whole, and in one pack.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from ....errors import DataError
from ...packing import packs
from ..config import Data, Stage
from .documents import Document, fitted
from .sources import open_sources, seed_of

_EMPTY_POOLS = 1000
"""Pools without a document after which a stream is given up."""


class PackStream(Iterator[tuple[int, list[Document]]]):
    """(number, documents) of a process's packs, in order of number; ends where a lane's documents end.

    Args:
        data: of the run; a stage's own comes first.
        rank, ranks: this process takes packs rank, rank + ranks, ...
        mask_token: the token of mask rows, which no document may hold; None where nobody trains on them.
        places: as `places` was of the streams of any number of processes, added up; all zeros for the beginning.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: PreTrainedTokenizerFast | None,
        stage: Stage,
        rank: int = 0,
        ranks: int = 1,
        places: Sequence[int] | None = None,
        mask_token: int | None = None,
    ) -> None:
        self._data, self._stage, self._mask_token = stage.data or data, stage, mask_token
        self._sources = open_sources(self._data, tokenizer, stage.name)
        lanes = stage.packs_per_step
        if lanes % ranks:
            raise ValueError(f"{lanes} packs of a step cannot be shared by {ranks} processes")
        places = places or [0] * (3 * lanes)
        # Of each lane: packs taken; the pool the next one is in; its number in the pool.
        self._places = {lane: list(places[3 * lane : 3 * lane + 3]) for lane in range(rank, lanes, ranks)}
        self._ready = {lane: self._pool(lane, place[1]) for lane, place in self._places.items()}
        self._turn = 0
        self._lanes = lanes

    @property
    def places(self) -> list[int]:
        """Where to go on: three numbers for every lane, zeros for those of other processes."""
        return [n for lane in range(self._lanes) for n in self._places.get(lane, (0, 0, 0))]

    def __next__(self) -> tuple[int, list[Document]]:
        lane = list(self._places)[self._turn % len(self._places)]
        place = self._places[lane]
        empty = 0
        while (ready := self._ready[lane]) is not None and place[2] >= len(ready):
            empty += not ready
            if empty == _EMPTY_POOLS:
                raise DataError("data", f"{empty * self._data.pool} records of stage {self._stage.name!r} gave no document",
                                "let it take longer documents, or other finish_reasons")  # fmt: skip
            place[1:] = place[1] + 1, 0
            self._ready[lane] = self._pool(lane, place[1])
        if ready is None:
            raise StopIteration
        number = place[0] * self._lanes + lane
        pack = ready[place[2]]
        place[0], place[2] = place[0] + 1, place[2] + 1
        self._turn += 1
        return number, pack

    def _pool(self, lane: int, pool: int) -> list[list[Document]] | None:
        """The packs of a lane's pool, in their order; None where all sources have run out."""
        number = pool * self._stage.packs_per_step + lane
        pools = [made for made in (source.pool(number) for source in self._sources) if made is not None]
        if not pools:
            return None
        named = [one for made in pools for one in made]
        for where, document in named:
            if self._mask_token is not None and self._mask_token in document.tokens:
                raise DataError(where, f"holds token {self._mask_token}, the token of mask rows",
                                "remove the record, or choose a mask_token that no text becomes")  # fmt: skip
        documents = [part for where, document in named for part in fitted(document, self._stage, where)]
        documents.sort(key=lambda d: len(d.tokens))
        made = list(packs(documents, lambda d: len(d.tokens), self._stage.pack_tokens))
        random.Random(seed_of(self._data.seed, self._stage.name, number)).shuffle(made)
        return made
