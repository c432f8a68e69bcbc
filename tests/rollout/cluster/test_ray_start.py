"""A service without an address starts a Ray of its own, whatever other Ray runs on the machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ray
from blockroll.rollout.cluster.ray_start import start_ray
assert start_ray(None, 2)
print(ray.cluster_resources()["CPU"])
"""


@pytest.mark.slow
def test_a_cluster_of_someone_else_is_not_joined() -> None:
    """Ray finds one by RAY_ADDRESS, or by the file that `ray start` leaves."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2.0"]
