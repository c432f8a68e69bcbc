"""The fuzzer of checkpoint loading runs for a while and finds nothing: no exception but CheckpointError, nothing above 5 s or
1 GB.

FUZZ_SECONDS sets how long; atheris must be installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

IDLE_MB = 500
"""What the process takes before the first input."""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_no_input_breaks_the_loading_of_checkpoints(tmp_path: Path) -> None:
    seconds = int(os.environ.get("FUZZ_SECONDS", "60"))
    program = Path(__file__).with_name("fuzz_checkpoint.py")
    command = [sys.executable, str(program), str(tmp_path / "corpus"), f"-max_total_time={seconds}", "-timeout=5",
               f"-rss_limit_mb={IDLE_MB + 1024}", "-max_len=16384", f"-artifact_prefix={tmp_path}/"]  # fmt: skip
    place = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * seconds + 120, env=place)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "no interesting inputs" not in done.stderr
