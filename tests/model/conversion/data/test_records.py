"""Records of files: all of them, in an order that needs no reading ahead, and errors that name the place."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conversion_parts import packs

from blockroll.errors import DataError
from blockroll.model.conversion.config import Data, HuggingFace, JsonLines, Parquet, Stage
from blockroll.model.conversion.data import texts
from blockroll.model.conversion.data.records import JsonLines as JsonLinesShard
from blockroll.model.conversion.data.records import Parquet as ParquetShard
from blockroll.model.conversion.data.records import Records, find

TEXTS = [f"document {i}" for i in range(50)]
LINES = tuple(json.dumps({"text": text}) for text in TEXTS)


def jsonl(folder: Path, lines: Sequence[str] = LINES) -> Path:
    path = folder / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def parquet(folder: Path) -> Path:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=7)
    return path


def told(records: Records, start: int = 0, end: int = 50) -> list[str]:
    return [record["text"] for _, record in records.read(start, end)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_epoch_holds_every_record_once_and_any_stretch_is_found_alone(tmp_path: Path, kind: str) -> None:
    shard = JsonLinesShard(jsonl(tmp_path)) if kind == "jsonl" else ParquetShard(parquet(tmp_path))
    whole = told(Records([shard], 8, None, "s"), 0, 100)
    assert sorted(whole[:50]) == sorted(whole[50:]) == sorted(TEXTS)
    assert whole[:50] != whole[50:]
    # Units, too, come in random order: the first eight records of an epoch are not of the first ten in the file.
    assert max(int(text.split()[1]) for text in whole[:8]) > 10 or max(int(text.split()[1]) for text in whole[50:58]) > 10
    assert told(Records([shard], 8, None, "s"), 37, 61) == whole[37:61]
    assert told(Records([shard], 8, None, "other"), 0, 50) != whole[:50]
    assert told(Records([shard], 0, None, "s")) == TEXTS
    twice = Records([shard], 8, 2, "s")
    assert twice.total == 100 and told(twice, 90, 130) == whole[90:]


def test_a_saved_data_set_and_a_directory_of_files_are_read_alike(tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": TEXTS})).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files")
    parquet(tmp_path / "files")
    saved = Data(sources=(HuggingFace(kind="huggingface", path=str(tmp_path / "saved"), split="train"),), shuffle=0)
    files = Data(sources=(HuggingFace(kind="huggingface", path=str(tmp_path / "files")),), shuffle=0)
    assert list(texts(saved, 50)) == TEXTS
    assert sorted(texts(files, 100)) == sorted(2 * TEXTS)
    with pytest.raises(DataError, match="has no split 'test'; set `split` to one of train"):
        list(texts(Data(sources=(HuggingFace(kind="huggingface", path=str(tmp_path / "saved"), split="test"),)), 50))


def test_files_are_found_by_pattern_and_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find([str(tmp_path / "*.jsonl")], (".jsonl",))] == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in find([str(tmp_path)], (".jsonl", ".txt"))] == ["a.jsonl", "b.jsonl", "c.txt"]
    for path in ("d.jsonl", "*.parquet"):
        with pytest.raises(DataError, match="no such file"):
            find([str(tmp_path / path)], (".jsonl",))
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        find([str(tmp_path)], (".parquet",))


GOOD = json.dumps({"text": "fine"})


@pytest.mark.parametrize(("lines", "format", "problem"), [
    ([GOOD, '{"text": "cut o'], "text", "a.jsonl line 2: not valid JSON"),
    ([GOOD, "", "[1]"], "text", "a.jsonl line 3: a JSON array, not an object"),
    ([GOOD, '{"words": "x"}'], "text", "a.jsonl line 2: has no field 'text', only 'words'"),
    ([GOOD, '{"text": 3}'], "text", "a.jsonl line 2 field 'text': 3 is no text"),
    ([GOOD, '{"text": " \\n"}'], "text", "a.jsonl line 2 field 'text': an empty document; remove the record"),
    (['{"prompt": "a", "completion": ""}'], "completion", "line 1 field 'completion': an empty document"),
    (['{"messages": []}'], "messages", "line 1: an empty document: no message of the assistant"),
    (['{"messages": [{"role": "assistant", "content": ""}]}'], "messages", "line 1 message 0 field 'content': an empty document"),
    (['{"messages": [{"role": "user"}]}'], "messages", "line 1 message 0: "),
    ([], "text", "a.jsonl: holds no records"),
])  # fmt: skip
def test_what_is_wrong_with_a_record_names_its_line(tmp_path: Path, lines: list[str], format: str, problem: str) -> None:
    path = jsonl(tmp_path, lines)
    data = Data(sources=(JsonLines(kind="jsonl", paths=(str(path),), format=format),))  # type: ignore[arg-type]
    with pytest.raises(DataError) as refused:
        list(texts(data, 10))
    assert problem in str(refused.value) and "\n" not in str(refused.value)


def test_a_corrupt_parquet_shard_names_itself(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    whole = path.read_bytes()
    source = Parquet(kind="parquet", paths=(str(path),))
    for broken in (whole[:-30], whole[:4] + bytes(200) + whole[204:], b""):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read .*; restore the shard"):
            list(texts(Data(sources=(source,)), 50))


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    peaks = []
    for records in (1_000, 10_000):
        path = jsonl(tmp_path, [json.dumps({"text": "x" * 1000})] * records)
        tracemalloc.start()
        try:
            assert sum(1 for _ in Records([JsonLinesShard(path)], 128, 1, "s").read(0, records)) == records
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 10**6  # of 1 MB and 10 MB


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match=r"data\.sources\[0\]: the policy has no tokenizer"):
        next(packs(Data(), None, Stage(name="s", kind="ar", tokens=1)))
