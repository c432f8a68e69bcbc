"""Makes `engine_backend` and the examples importable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[3] / "examples")]
