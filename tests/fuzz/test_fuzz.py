"""Runs every target of `targets.py` for BLOCKROLL_FUZZ_SECONDS (60): no traceback, nothing over 1 GB, no input over 10 s.

Needs atheris (`pip install atheris`), in the interpreter that BLOCKROLL_FUZZ_PYTHON names where it is not this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from targets import TARGETS

PYTHON = os.environ.get("BLOCKROLL_FUZZ_PYTHON", sys.executable)
SECONDS = int(os.environ.get("BLOCKROLL_FUZZ_SECONDS", "60"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
@pytest.mark.parametrize("target", TARGETS)
def test_no_input_is_a_fault(target: str, tmp_path: Path) -> None:
    if subprocess.run([PYTHON, "-c", "import atheris"], capture_output=True).returncode:
        pytest.skip("atheris is not installed")
    program = Path(__file__).with_name("fuzz.py")
    command = [PYTHON, str(program), target, str(SECONDS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    runs = [line for line in done.stderr.splitlines() if "DONE" in line or line.startswith("Done ")]
    print(*runs, sep="\n")
