"""The rows of one's own tasks, read from files and checked.

Invariants:
- All rows are checked when they are read: an error names the file, the row and the field.
- A task's id is made of its prompt, so it does not depend on the row's place.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, RequestError
from ..arguments import short, token_ids
from ..conversion.data.records import JsonLines, Parquet, Record, SavedDataset, Shard, find
from ..policy import Policy
from ..tokenizer import encode_chat, encode_prompt
from .own_config import TaskSource

MAX_ROWS = 1_000_000
"""Rows of a source. They are held in memory, with their prompts as token ids: some gigabytes at this number."""


@dataclass(frozen=True)
class OwnTask:
    """One row.

    Attributes:
        place: the file and the row, for errors.
        prompt: as the row has it: text, token ids or messages. tokens: its token ids.
        completion: the reference answer, where the source names a field with one.
    """

    id: str
    family: str
    place: str
    prompt: Any
    tokens: tuple[int, ...]
    completion: str | None
    row: Record = field(repr=False, compare=False)


class RowReader:
    """Reads rows into tasks."""

    def __init__(self, source: TaskSource, policy: Policy, where: str) -> None:
        self._source, self._policy, self._where = source, policy, where
        self._count = 0
        self._seen: Counter[tuple[int, ...]] = Counter()

    def tasks(self, paths: Sequence[str], split: str | None) -> list[OwnTask]:
        """The tasks of some files, at least one."""
        found = [self._task(place, row) for place, row in self._rows(paths, split)]
        if not found:
            raise DataError(paths[0], "holds no rows", "give a file with some")
        return found

    def _rows(self, paths: Sequence[str], split: str | None) -> Iterator[tuple[str, Record]]:
        for shard in _shards(paths, split):
            for span in shard.spans(1024):
                for place, raw in shard.read(span):
                    self._count += 1
                    if self._count > MAX_ROWS:
                        raise DataError(place, f"is row {self._count:,} of the source", f"give at most {MAX_ROWS:,} rows")
                    yield place, shard.parse(raw, place)

    def _task(self, place: str, row: Record) -> OwnTask:
        source = self._source
        prompt = self._field(row, source.prompt, place)
        tokens = self._tokens(prompt, f"{place} field {source.prompt!r}")
        family, completion = "own", None
        if source.family is not None:
            family = self._text(row, source.family, place)
        if source.completion is not None:
            completion = self._text(row, source.completion, place)
        self._seen[tokens] += 1
        number = f"-{self._seen[tokens]}" if self._seen[tokens] > 1 else ""
        digest = hashlib.blake2b(repr(tokens).encode(), digest_size=8).hexdigest()
        return OwnTask(f"own:{digest}{number}", family, place, prompt, tokens, completion, row)

    def _field(self, row: Record, name: str, place: str) -> Any:
        if row.get(name) is None:
            raise DataError(place, f"has no field {name!r}, only {', '.join(map(repr, row)) or 'nothing'}",
                            f"add it, or name the right field in {self._where}")  # fmt: skip
        return row[name]

    def _text(self, row: Record, name: str, place: str) -> str:
        value = self._field(row, name, place)
        if not isinstance(value, str) or not value:
            raise DataError(f"{place} field {name!r}", f"{short(value)} is no text", "give text")
        return value

    def _tokens(self, prompt: Any, where: str) -> tuple[int, ...]:
        policy = self._policy
        longest, vocabulary = policy.config.max_position_embeddings, policy.config.vocab_size
        remedy = "give text, token ids or a list of chat messages"
        try:
            if isinstance(prompt, str):
                if policy.tokenizer is None:
                    raise DataError(where, "is text, and this policy's directory has no tokenizer", "give token ids")
                tokens = tuple(encode_prompt(policy.tokenizer, prompt)) if prompt else ()
            elif isinstance(prompt, list) and prompt and all(isinstance(message, Mapping) for message in prompt):
                tokens = encode_chat(policy.tokenizer, prompt, where)
            elif isinstance(prompt, list):
                tokens = token_ids(prompt, where)
            else:
                raise DataError(where, f"{short(prompt)} is no prompt", remedy)
        except RequestError as error:
            raise DataError(error.field, error.problem, error.remedy) from error
        if not tokens:
            raise DataError(where, "is empty", remedy)
        if max(tokens) >= vocabulary:
            raise DataError(where, f"token id {max(tokens)} is not in the policy's vocabulary",
                            f"use ids from 0 to {vocabulary - 1}")
        if len(tokens) >= longest:
            raise DataError(where, f"{len(tokens)} tokens, and this policy's maximum is {longest}, one to follow included",
                            f"shorten it to {longest - 1}")  # fmt: skip
        return tokens


def _shards(paths: Sequence[str], split: str | None) -> Iterator[Shard]:
    """The files of some paths; a directory of a saved data set is one."""
    for path in paths:
        root = Path(path)
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            yield SavedDataset(root, split)
            continue
        if split is not None:
            raise ConfigError("split", f"{split!r} beside {path}, which is no data set that `datasets.save_to_disk` wrote",
                              "leave it out, or name the files of the split")  # fmt: skip
        for file in find([path], (".parquet", ".jsonl", ".json")):
            yield Parquet(file) if file.suffix == ".parquet" else JsonLines(file)
