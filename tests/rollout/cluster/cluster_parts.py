"""Requests of a pool of engines, and their samples as they come."""

from __future__ import annotations

import time

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
