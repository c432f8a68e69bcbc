"""Numerics of the Triton kernels, one process per op.

`TRITON_INTERPRET` decides when a kernel is defined, and Triton comes in with torch, so this process cannot interpret. Each
`interpreted_<op>.py` beside this file runs in a process of its own; on a machine with an accelerator, running such a file
by hand without the variable checks the compiled kernels:

    pytest tests/kernels/interpreted_attention.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("interpreted_"))
def test_interpreted(file: Path) -> None:
    # One BLAS thread: numpy's matrix products of tile size are slower with more.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
