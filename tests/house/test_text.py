"""What the repository holds: no paths of one machine, no secrets of its registry, nothing too large to clone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 16 * 2**20
# Spelt in halves, so that this file does not hold them.
MACHINE_PATHS = [b"/wo" + b"rk/", b"/ro" + b"ot/", b"/tmp/" + b"bash", b"/ho" + b"me/", b"file" + b":///"]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_path_of_one_machine(tracked: list[Path]) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {word.decode()}"
        for path in tracked
        for word in MACHINE_PATHS
        if word in path.read_bytes()
    ]
    assert found == []


def test_no_file_too_large(tracked: list[Path]) -> None:
    assert [path.name for path in tracked if path.stat().st_size > LARGEST] == []


def test_constraints_pin_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines
    for line in lines:
        name, pin, version = line.partition("==")
        assert pin, f"{line}: not an exact pin"
        assert not set(name + version) & set("@/+ "), f"{line}: a host, a path or a local build tag"
