"""Requests of a pool of engines, and their samples as they come."""

from __future__ import annotations

import time
from collections.abc import Callable

from blockroll.rollout.backend import Completed
from blockroll.rollout.cluster import RayCluster
from blockroll.rollout.types import RolloutRequest, SamplingParams


def requests(prefix: str, count: int = 10, tokens: int = 24, samples: int = 2) -> list[RolloutRequest]:
    params = SamplingParams(sampler="coupled", max_tokens=tokens, ignore_eos=True)
    return [RolloutRequest(f"{prefix}{i:02d}", (1, 5 + i, 9), params, seed=i, samples=samples) for i in range(count)]


def collect(cluster: RayCluster, count: int, seconds: float = 120.0) -> list[Completed]:
    """What the pool has completed, once that is `count` samples or failures."""
    done, end = list[Completed](), time.monotonic() + seconds
    while len(done) < count:
        assert time.monotonic() < end, f"{len(done)} of {count} came"
        done += cluster.poll(0.5)
    return done


def collect_until(cluster: RayCluster, happened: Callable[[], bool], seconds: float = 60.0) -> list[Completed]:
    """What the pool has completed when this has happened."""
    done, end = list[Completed](), time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        done += cluster.poll(0.1)
    return done


def until(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for something that happens soon."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
