"""Sources: they turn the records of files, or the indices of tasks, into documents.

Invariants:
- Pool k of a source is a function of the configuration and k. It is made without making the pools before it.
- A mixture gives each source its share of every pool, up to one record.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from ....errors import DataError
from ....seeds import named_generator
from ...tokenizer import encode_prompt
from .. import config
from ..config import Data
from .documents import Document, answer_document, chat_document, text_document
from .records import JsonLines, Parquet, Record, Records, SavedDataset, Shard, find

Named = tuple[str, Document]
"""A document and what an error calls it."""


class Pools(Protocol):
    """A source's documents."""

    def pool(self, number: int) -> list[Named] | None:
        """Pool `number`; None where the source has run out."""


def seed_of(seed: int, stage: str, number: int) -> int:
    """A seed of 48 bits for part `number` of a stage."""
    return named_generator(seed, f"{stage}/{number}").getrandbits(48)


class TaskPools:
    """Tasks of the training split, other ones in every pool."""

    def __init__(self, source: config.Tasks, data: Data, share: float, tokenizer: PreTrainedTokenizerFast, stage: str) -> None:
        self._source, self._data, self._share = source, data, share
        self._tokenizer, self._stage = tokenizer, stage

    def pool(self, number: int) -> list[Named]:
        start, end = _range(self._share * self._data.pool, number)
        seed, tokenizer = seed_of(self._data.seed, self._stage, number), self._tokenizer
        made, chance = [], random.Random(seed)
        for task in self._source.make(end - start, seed):
            prompt = encode_prompt(tokenizer, task.prompt)
            worked = chance.random() >= self._source.unworked
            completion = tokenizer.encode(task.completion if worked else task.unworked, add_special_tokens=False)
            made.append((task.id, Document((*prompt, *completion, tokenizer.eos_token_id), len(prompt))))
        return made


FileSource = config.JsonLines | config.Parquet | config.HuggingFace


class RecordPools:
    """Records of files, in the order of `Records`."""

    def __init__(
        self,
        source: FileSource | config.Rollouts,
        data: Data,
        share: float,
        tokenizer: PreTrainedTokenizerFast | None,
        name: str,
    ) -> None:
        self._source, self._size, self._tokenizer = source, share * data.pool, tokenizer
        self._records = Records(_shards(source), data.shuffle, source.epochs, f"{data.seed}/{name}")

    def pool(self, number: int) -> list[Named] | None:
        start, end = _range(self._size, number)
        total = self._records.total
        if total is not None and start >= total:
            return None
        return [named for where, record in self._records.read(start, end) for named in self._documents(where, record)]

    def _documents(self, where: str, record: Record) -> Iterator[Named]:
        source = self._source
        if isinstance(source, config.Rollouts):
            if not source.finish_reasons or _field(record, "finish_reason", str, where) in source.finish_reasons:
                yield where, _rollout(record, where, self._tokenizer)
            return
        assert self._tokenizer is not None
        value = _fields(source, record, where)
        if source.format == "text":
            yield where, text_document(self._tokenizer, value["text"])
        elif source.format == "completion":
            yield where, answer_document(self._tokenizer, value["prompt"], value["completion"])
        else:
            yield where, chat_document(self._tokenizer, value["messages"], where)


def texts(data: Data, count: int) -> Iterator[str]:
    """About `count` texts of the data, each source its share, to learn a tokenizer from.

    Raises:
        DataError: a file cannot be read, or a source holds tokens, no text.
    """
    whole = sum(source.weight for source in data.sources)
    for i, source in enumerate(data.sources):
        some = round(count * source.weight / whole)
        if isinstance(source, config.Tasks):
            for start in range(0, some, data.pool):
                tasks = source.make(min(data.pool, some - start), seed_of(data.seed, "tokenizer", start))
                yield from (task.prompt + task.completion for task in tasks)
        elif isinstance(source, config.Rollouts):
            raise DataError(f"data.sources[{i}]", "rollouts hold tokens, and a policy trained from nothing has no tokenizer",
                            "name a parent, or give the rollouts to a stage of their own")  # fmt: skip
        else:
            # One epoch at most: what comes twice teaches nothing.
            for where, record in Records(_shards(source), data.shuffle, 1, f"{data.seed}/tokenizer").read(0, some):
                value = _fields(source, record, where)
                yield "\n".join(m["content"] for m in value["messages"]) if "messages" in value else "".join(value.values())


def open_sources(data: Data, tokenizer: PreTrainedTokenizerFast | None, stage: str) -> list[Pools]:
    """The sources of a stage.

    Raises:
        DataError: a file is missing or cannot be read, or text is to be encoded without a tokenizer.
    """
    whole = sum(source.weight for source in data.sources)
    opened: list[Pools] = []
    for i, source in enumerate(data.sources):
        share, name = source.weight / whole, f"{stage}/{i}" if i else stage
        if isinstance(source, config.Rollouts):
            opened.append(RecordPools(source, data, share, tokenizer, name))
        elif tokenizer is None:
            raise DataError(f"data.sources[{i}]", "the policy has no tokenizer to encode it with",
                            "put the tokenizer's files beside its weights, or give rollouts, which hold tokens")  # fmt: skip
        elif isinstance(source, config.Tasks):
            opened.append(TaskPools(source, data, share, tokenizer, name))
        else:
            opened.append(RecordPools(source, data, share, tokenizer, name))
    return opened


def _range(size: float, number: int) -> tuple[int, int]:
    """Records of pool `number`: `size` of them in the mean."""
    return int(number * size + 1e-6), int((number + 1) * size + 1e-6)


def _shards(source: FileSource | config.Rollouts) -> list[Shard]:
    if isinstance(source, config.Parquet):
        return [Parquet(path) for path in find(source.paths, (".parquet",))]
    if not isinstance(source, config.HuggingFace):
        return [JsonLines(path) for path in find(source.paths, (".jsonl", ".json"))]
    root = Path(source.path)
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return [SavedDataset(root, source.split)]
    files = find([source.path], (".parquet", ".jsonl", ".json"))
    return [Parquet(path) if path.suffix == ".parquet" else JsonLines(path) for path in files]


def _field(record: Record, name: str, kind: type, where: str) -> Any:
    if name not in record:
        raise DataError(where, f"has no field {name!r}, only {', '.join(map(repr, record)) or 'nothing'}",
                        "name the fields under `columns`, or choose another `format`")  # fmt: skip
    if not isinstance(record[name], kind):
        raise DataError(f"{where} field {name!r}", f"{_shown(record[name])} is no {'list' if kind is list else 'text'}",
                        "correct the record, or choose another `format`")  # fmt: skip
    return record[name]


def _fields(source: FileSource, record: Record, where: str) -> dict[str, Any]:
    """What the source's format asks of a record, by the format's own names."""
    names = {"text": ["text"], "completion": ["prompt", "completion"], "messages": ["messages"]}[source.format]
    kinds = {"messages": list}
    value = {name: _field(record, source.columns.get(name, name), kinds.get(name, str), where) for name in names}  # type: ignore[call-overload]
    if source.format == "messages":
        _conversation(value["messages"], where)
    else:
        _told(value[source.format], source.format, where)
    return value


def _told(text: str, name: str, where: str) -> None:
    if not text.strip():
        raise DataError(f"{where} field {name!r}", "an empty document", "remove the record")


def _conversation(messages: list[Any], where: str) -> None:
    for turn, message in enumerate(messages):
        at = f"{where} message {turn}"
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(at, f"{_shown(message)} has no text `role` and `content`", "write every message as both")
        if message["role"] == "assistant":
            _told(message["content"], "content", at)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(where, "an empty document: no message of the assistant", "remove the record")


def _rollout(record: Record, where: str, tokenizer: PreTrainedTokenizerFast | None) -> Document:
    prompt, tokens = (_field(record, name, list, where) for name in ("prompt_tokens", "tokens"))
    if not prompt or not tokens:
        raise DataError(f"{where} field {'tokens' if prompt else 'prompt_tokens'!r}", "an empty document", "remove the record")
    most = len(tokenizer) if tokenizer is not None else 2**31
    for name, some in (("prompt_tokens", prompt), ("tokens", tokens)):
        if not all(type(t) is int and 0 <= t < most for t in some):
            raise DataError(f"{where} field {name!r}", f"holds something that is no token id below {most}",
                            "use rollouts of a policy with the same tokenizer")  # fmt: skip
    return Document(array("i", [*prompt, *tokens]), len(prompt))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."
