"""A service without an address starts a Ray of its own, whatever other Ray runs on the machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.exceptions import RaySystemError

from blockroll.errors import ClusterError
from blockroll.rollout.cluster.ray_start import start_ray

PROGRAM = """
import ray
from blockroll.rollout.cluster.ray_start import start_ray
assert start_ray(None, 2)
print(ray.cluster_resources()["CPU"])
"""
LATE = """
import psutil
from ray._private import services
from blockroll.errors import ClusterError
from blockroll.rollout.cluster.ray_start import start_ray

def late(*_):
    assert {"gcs_server", "raylet"} <= {child.name() for child in psutil.Process().children()}
    raise Exception("The current node timed out during startup. This could happen because")

services.get_node = late
try:
    start_ray(None, 2)
except ClusterError as error:
    print(error)
print(psutil.Process().children(recursive=True))
"""


@pytest.mark.parametrize("error", [Exception("The current node\ntimed out during startup."), RaySystemError("a socket")])
def test_a_ray_that_does_not_start_is_one_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise error

    # Another file of this process may have a Ray of its own, which goes on.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", fail)
    said = r"ray: none could be started here \(.*(node timed out|a socket).*\); try again"
    with pytest.raises(ClusterError, match=said) as found:
        start_ray(None, 2)
    assert "\n" not in str(found.value)


@pytest.mark.slow
def test_a_ray_that_does_not_start_in_time_leaves_no_process() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    said, left = done.stdout.splitlines()
    assert said.startswith("ray: none could be started here (The current node timed out") and left == "[]"


@pytest.mark.slow
def test_a_cluster_of_someone_else_is_not_joined() -> None:
    """Ray finds one by RAY_ADDRESS, or by the file that `ray start` leaves."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2.0"]


def test_a_ray_that_another_thread_has_started_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `start_ray`, which is called once at a time, or by `ray.init` itself."""
    started, ended = list[float](), list[str]()

    def init(**_: object) -> None:
        if started:
            raise RuntimeError("Maybe you called ray.init twice by accident?")
        time.sleep(0.1)
        started.append(time.monotonic())

    monkeypatch.setattr(ray, "is_initialized", lambda: bool(started))
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("ray"))
    monkeypatch.setattr(ray, "init", init)
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(lambda _: start_ray(None, 2), range(2))) == [False, True]
    looked = iter([False, True])
    monkeypatch.setattr(ray, "is_initialized", lambda: next(looked))
    assert not start_ray(None, 2) and not ended
