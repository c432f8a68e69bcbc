"""Files are whole or absent, also on a full disk and without permission."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockroll.errors import DataError, StorageError
from blockroll.files import (
    append_jsonl,
    storage_error,
    whole_directory,
    whole_file,
    write_atomic,
    write_json,
)
from blockroll.inputs import read_jsonl


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode == 0
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_write_json_replaces_whole_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 0.1})
    assert json.loads(path.read_text()) == {"a": 0.1}
    assert os.listdir(path.parent) == ["summary.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_not_a_number_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_jsonl(tmp_path / "a.jsonl", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def test_failure_inside_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, b"old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    with whole_file(tmp_path / "report.png") as temporary:
        assert temporary.suffix == ".png"
        temporary.write_bytes(b"x")


def test_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    path = small_disk / "a.txt"
    write_atomic(path, b"old")
    with pytest.raises(StorageError, match="the disk is full; free some space"):
        write_atomic(path, b"x" * 100_000)
    assert path.read_text() == "old"
    assert os.listdir(small_disk) == ["a.txt"]


def test_full_disk_cuts_a_half_line_off(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    with pytest.raises(StorageError, match=r"metrics.jsonl: the disk is full"):
        append_jsonl(path, {"step": 2, "text": "x" * 100_000})
    append_jsonl(path, {"step": 3})
    assert [record["step"] for _, record in read_jsonl(path)] == [1, 3]


def test_missing_permission_and_wrong_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x", b"")
    with pytest.raises(StorageError, match="is a directory"):
        write_atomic(tmp_path, b"")
    if os.geteuid() != 0:  # root may write anywhere
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError, match="no permission"):
            write_atomic(tmp_path / "x", b"")


def test_other_writers_reports_of_a_full_disk_are_understood() -> None:
    assert "the disk is full" in str(storage_error(RuntimeError("I/O error: No space left on device (os error 28)")))
    assert "no permission" in str(storage_error(PermissionError(errno.EACCES, "Permission denied", "p"), "p"))
    assert storage_error(OSError(errno.ECONNRESET, "reset")) is None
    assert storage_error(KeyError("x"), "p") is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [(b"{", "not valid JSON"), (b"[1]", "a JSON array, not an object"), (b"\xff", "not valid JSON")],
)
def test_read_jsonl_names_the_line(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=f"in.jsonl line 3: {problem}"):
        list(read_jsonl(path))


def test_read_jsonl_counts_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\n{"a": 1}\n')
    assert list(read_jsonl(path)) == [(2, {"a": 1})]
    with pytest.raises(DataError, match="cannot be read"):
        list(read_jsonl(tmp_path / "none"))


def test_directory_is_replaced_in_one_step_and_keeps_what_is_not_owned(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "policy"
    with whole_directory(path) as staging:
        (staging / "weights").write_text("1")
        (staging / "index").write_text("1")
    (path / "notes").write_text("mine")
    inode, seen = path.stat().st_ino, []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (seen.append(names), rename(*names)))
    with whole_directory(path, lambda name: name in ("weights", "index")) as staging:
        (staging / "weights").write_text("2")
        assert sorted(p.name for p in path.iterdir()) == ["index", "notes", "weights"]
    assert {p.name: p.read_text() for p in path.iterdir()} == {"weights": "2", "notes": "mine"}
    assert path.stat().st_ino != inode
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    if sys.platform == "linux":
        assert not seen  # one system call, so there is no moment without the directory


def test_files_of_a_directory_are_as_readable_as_others(tmp_path: Path) -> None:
    """Also those whose writer made them private; what was there before keeps its permissions."""
    path = tmp_path / "policy"
    (path / "notes").mkdir(parents=True)
    (path / "secret").write_text("mine")
    (path / "secret").chmod(0o600)
    mask = os.umask(0o027)
    try:
        with whole_directory(path, lambda name: name == "weights") as staging:
            (staging / "weights").touch(mode=0o600)
            (staging / "parts").mkdir(mode=0o700)
            (staging / "parts" / "one").touch(mode=0o600)
    finally:
        os.umask(mask)
    modes = {str(p.relative_to(path)): stat.S_IMODE(p.stat().st_mode) for p in path.rglob("*")}
    assert modes == {"weights": 0o640, "parts": 0o750, "parts/one": 0o640, "secret": 0o600,
                     "notes": stat.S_IMODE((path / "notes").stat().st_mode)}  # fmt: skip


def test_interrupted_directory_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "policy"
    with whole_directory(path) as staging:
        (staging / "weights").write_text("1")
    with pytest.raises(RuntimeError, match="in the middle"), whole_directory(path) as staging:
        (staging / "weights").write_text("2")
        raise RuntimeError("in the middle")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match="disk is full"), whole_directory(path) as staging:
        (staging / "weights").write_text("3")
    assert (path / "weights").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="it is a file"), whole_directory(tmp_path / "file"):
        pass
