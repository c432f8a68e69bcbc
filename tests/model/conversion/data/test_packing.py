"""Packs: the same whatever the number of processes, and found again without what came before."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from blockroll.errors import DataError
from blockroll.model.conversion.config import Data, JsonLines, Stage
from blockroll.model.conversion.data import PackStream
from blockroll.model.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab"], 260)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:03d}" + "ab" * (i % 9)}) for i in range(100)))
    return Data(sources=(JsonLines(kind="jsonl", paths=(str(path),)),), pool=12, shuffle=10)


STAGE = Stage(name="s", kind="ar", tokens=1, pack_tokens=60, packs_per_step=4)


def taken(stream: PackStream, count: int) -> dict[int, list[list[int]]]:
    return {number: [list(d.tokens) for d in documents] for number, documents in islice(stream, count)}


def test_processes_share_the_packs_of_one(tokenizer, data: Data) -> None:
    whole = taken(PackStream(data, tokenizer, STAGE), 24)
    assert list(whole) == list(range(24))
    for ranks in (2, 4):
        streams = [PackStream(data, tokenizer, STAGE, rank, ranks) for rank in range(ranks)]
        shared = {n: pack for stream in streams for n, pack in taken(stream, 24 // ranks).items()}
        assert shared == whole
        places = [sum(place) for place in zip(*(stream.places for stream in streams), strict=True)]
        # Any number of processes goes on from there.
        after = taken(PackStream(data, tokenizer, STAGE, places=places), 4)
        assert after == {n: pack for n, pack in taken(PackStream(data, tokenizer, STAGE), 28).items() if n >= 24}
    with pytest.raises(ValueError, match="cannot be shared"):
        PackStream(data, tokenizer, STAGE, 0, 3)


def test_packs_hold_whole_documents_and_every_record_once_an_epoch(tokenizer, data: Data) -> None:
    once = data.model_copy(update={"sources": (data.sources[0].model_copy(update={"epochs": 1}),)})
    packs = taken(PackStream(once, tokenizer, STAGE.model_copy(update={"packs_per_step": 1})), 1000)
    documents = [tokenizer.decode(tokens[1:4]) for pack in packs.values() for tokens in pack]
    assert sorted(documents) == [f"{i:03d}" for i in range(100)]
    assert max(sum(map(len, pack)) for pack in packs.values()) <= 60
    other = data.model_copy(update={"seed": 1})
    assert taken(PackStream(other, tokenizer, STAGE), 4) != taken(PackStream(data, tokenizer, STAGE), 4)


def test_sources_come_in_their_shares(tokenizer, data: Data, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"zz{i}"}) for i in range(30)))
    mixed = data.model_copy(update={"sources": (
        *data.sources, JsonLines(kind="jsonl", paths=(str(tmp_path / "b.jsonl"),), weight=0.5),
    )})  # fmt: skip
    packs = taken(PackStream(mixed, tokenizer, STAGE), 40)
    documents = [tokenizer.decode(tokens[1:3]) for pack in packs.values() for tokens in pack]
    assert sum(d == "zz" for d in documents) / len(documents) == pytest.approx(1 / 3, abs=0.03)


def test_a_stream_that_drops_everything_is_given_up(tokenizer, data: Data) -> None:
    short = STAGE.model_copy(update={"sequence_tokens": 3, "too_long": "drop"})
    with pytest.raises(DataError, match="gave no document; let it take longer documents"):
        next(PackStream(data, tokenizer, short))
