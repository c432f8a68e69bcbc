"""Records of files, in an order that is known without reading them all.

Invariants:
- A source's records are numbered: record n of epoch e is found from (seed, n) alone, by seeking.
- One unit is held in memory: `shuffle` lines of a JSON-lines file, a row group of a Parquet file, `shuffle` rows of a saved data
  set. In an epoch the units come in random order, and the records of a unit in random order.
- A file that cannot be read names itself, the line or row, and what to do.
"""

from __future__ import annotations

import bisect
import glob
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from ....errors import DataError
from ....inputs import json_object, open_input, read_lines, unreadable
from ....seeds import named_generator

Record = dict[str, Any]
Unit = list[tuple[str, Any]]
"""Records not yet parsed, each after what an error calls it."""


@dataclass(frozen=True)
class Span:
    """A unit: rows start..start + rows - 1 of a shard."""

    shard: Shard
    start: int
    rows: int


class Shard:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def spans(self, size: int) -> Iterator[Span]:
        """The file's units."""
        raise NotImplementedError

    def read(self, span: Span) -> Unit:
        """The records of a unit, not yet parsed."""
        raise NotImplementedError

    def parse(self, raw: Any, where: str) -> Record:
        """A record."""
        raise NotImplementedError


class JsonLines(Shard):
    """One JSON object per line; blank lines are passed over. Where units begin is found by one pass over the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._offsets, self._lines = array("q"), array("q")

    def spans(self, size: int) -> Iterator[Span]:
        offset = rows = 0
        self._offsets, self._lines, self._size = array("q"), array("q"), size
        with _opened(self.path) as file:
            for number, line in read_lines(file, str(self.path)):
                if not line.isspace():
                    if rows % size == 0:
                        self._offsets.append(offset)
                        self._lines.append(number)
                    rows += 1
                offset += len(line)
        for start in range(0, rows, size):
            yield Span(self, start, min(size, rows - start))

    def read(self, span: Span) -> Unit:
        unit: Unit = []
        place = span.start // self._size
        number = self._lines[place] - 1
        with _opened(self.path) as file:
            file.seek(self._offsets[place])
            while len(unit) < span.rows:
                line, number = file.readline(), number + 1
                if not line:
                    raise DataError(str(self.path), "is shorter than when the run began", "leave data files as they are")
                if not line.isspace():
                    unit.append((f"{self.path} line {number}", line))
        return unit

    def parse(self, raw: bytes, where: str) -> Record:
        return json_object(raw, where)


class Parquet(Shard):
    """A Parquet file; its units are its row groups."""

    def spans(self, size: int) -> Iterator[Span]:
        with _parquet(self.path) as file:
            start = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                yield Span(self, start, rows)
                start += rows

    def read(self, span: Span) -> Unit:
        with _parquet(self.path) as file:
            starts = [0, *accumulate(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))]
            group = bisect.bisect_right(starts, span.start) - 1
            table = _whole(lambda: file.read_row_group(group), self.path)
        return [(f"{self.path} row {span.start + i}", table.slice(i, 1)) for i in range(span.rows)]

    def parse(self, raw: Any, where: str) -> Record:
        return raw.to_pylist()[0]


class SavedDataset(Shard):
    """A directory written by `datasets.save_to_disk`, memory-mapped."""

    def __init__(self, path: Path, split: str | None) -> None:
        super().__init__(path)
        datasets = _library("datasets")
        loaded = _whole(lambda: datasets.load_from_disk(str(path)), path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise DataError(str(path), f"has no split {split!r}", f"set `split` to one of {', '.join(loaded)}")
            loaded = loaded[split]
        self._rows = loaded

    def spans(self, size: int) -> Iterator[Span]:
        for start in range(0, len(self._rows), size):
            yield Span(self, start, min(size, len(self._rows) - start))

    def read(self, span: Span) -> Unit:
        return [(f"{self.path} row {i}", i) for i in range(span.start, span.start + span.rows)]

    def parse(self, raw: int, where: str) -> Record:
        return self._rows[raw]


class Records:
    """The records of some shards, epoch after epoch.

    Args:
        size: `shuffle`, records of a unit where the file does not say; 0 keeps the files' order, in units of 1024.
        epochs: how often the records come; None for ever.
        seed: of the order; anything that prints.
    """

    def __init__(self, shards: Sequence[Shard], size: int, epochs: int | None, seed: str) -> None:
        self._spans = [span for shard in shards for span in shard.spans(size or 1024)]
        self._ends = list(accumulate(span.rows for span in self._spans))
        if not self._ends:
            raise DataError(str(shards[0].path), "holds no records", "give a file with some")
        self._shuffled, self._seed = size > 0, seed
        self.total = None if epochs is None else epochs * self._ends[-1]
        self._order: tuple[int, list[int], list[int]] = (-1, [], [])
        self._held: tuple[Any, Unit] = (None, [])

    def read(self, start: int, end: int) -> Iterator[tuple[str, Record]]:
        """Records start..end - 1, counted over all epochs; fewer where they run out."""
        for number in range(start, end if self.total is None else min(end, self.total)):
            epoch, row = divmod(number, self._ends[-1])
            order, ends = self._epoch(epoch)
            place = bisect.bisect_right(ends, row)
            span = self._spans[order[place]]
            offset = row - (ends[place] - span.rows)
            where, raw = self._unit(epoch, order[place])[offset]
            yield where, span.shard.parse(raw, where)

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        """The epoch's order of units, and the number of records up to the end of each."""
        if self._order[0] != epoch:
            order = list(range(len(self._spans)))
            if self._shuffled:
                named_generator(self._seed, f"{epoch}").shuffle(order)
            self._order = epoch, order, list(accumulate(self._spans[i].rows for i in order))
        return self._order[1:]

    def _unit(self, epoch: int, number: int) -> Unit:
        if self._held[0] != (epoch, number):
            span = self._spans[number]
            unit = span.shard.read(span)
            if self._shuffled:
                named_generator(self._seed, f"{epoch}/{number}").shuffle(unit)
            self._held = (epoch, number), unit
        return self._held[1]


def find(paths: Sequence[str], endings: Sequence[str]) -> list[Path]:
    """The files that paths, patterns and directories name, each list in order of names."""
    found: list[Path] = []
    for path in paths:
        if os.path.isdir(path):
            some = sorted(p for p in Path(path).rglob("*") if p.suffix in endings)
        else:
            some = sorted(map(Path, glob.glob(path, recursive=True)))
        if not some:
            raise DataError(path, "there is no such file" if not os.path.isdir(path) else f"holds no {' or '.join(endings)} file",
                            "check the path")  # fmt: skip
        found += some
    return found


def _opened(path: Path) -> Any:
    try:
        return open_input(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _parquet(path: Path) -> Any:
    parquet = _library("pyarrow.parquet")
    return _whole(lambda: parquet.ParquetFile(path), path)


def _whole(read: Callable[[], Any], path: Path) -> Any:
    """read(), with what pyarrow says of a broken file as a DataError."""
    arrow = _library("pyarrow")
    try:
        return read()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(str(path), f"cannot be read ({' '.join(str(error).split())})",
                        "restore the shard from its source") from error  # fmt: skip


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError("data", f"{name.partition('.')[0]} is not installed, which these files need",
                        "pip install 'blockroll[data]'") from error  # fmt: skip
