"""Runs `own_clients.py` in an environment where trainers are installed; a test is skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

PYTHON = "BLOCKROLL_TRAINERS_PYTHON"
"""Environment variable: the Python of that environment. Its pins exclude those of this one."""


def own_client(trainer: str, url: str) -> Any:
    """What the trainer's own code made of a live service."""
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"{PYTHON} names no Python in which {trainer} is installed")
    script = Path(__file__).with_name("own_clients.py")
    done = subprocess.run([python, str(script), trainer, url], capture_output=True, text=True, timeout=300, cwd=script.parent)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")))
