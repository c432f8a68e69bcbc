"""Clean rows under the library paths and instruction sets of other processors, each in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "OPENBLAS_CORETYPE": "Haswell",
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+popcnt",
}  # fmt: skip
OLDEST_PATHS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""Products of torch whose order depends on the number of rows on every processor that runs oneMKL."""


def bits(settings: dict[str, str]) -> dict:
    """What `clean_rows.py` says under these settings."""
    command, environment = [sys.executable, str(TESTS / "clean_rows.py")], {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numba makes no code for these processors here")
def test_a_processor_with_avx2_alone():
    found = bits(AVX2)
    assert "8 lanes, fused" in found["forced"]
    assert found["differing"] == [[], [], []]


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the setting is oneMKL's")
def test_the_oldest_paths_of_the_libraries_and_a_product_that_goes_to_them():
    found = bits(OLDEST_PATHS)
    assert found["library"], "this setting shows a product whose order depends on the number of rows"
    assert found["differing"] == [[], [], []]
    assert found["planted"], "projections of 1 to 3 rows through the library are seen"
