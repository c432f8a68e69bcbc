"""A pool of two real engines for all files of this folder: starting one takes seconds.

The folder is a package (`__init__.py`), so that the pool ends with its last test; ONE_PROCESS in tests/conftest.py gives one
process all of its files. A test finds the pool at whatever version the one before it left, and waits until both engines serve.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from blockroll.rollout.cluster import EngineSpec, RayCluster
from blockroll.rollout.engine import EngineConfig


@pytest.fixture(scope="package")
def pool(policy_dir: str) -> Iterator[RayCluster]:
    """A pool whose engines have the policy of `policy_dir` at first."""
    cluster = RayCluster(EngineSpec(policy_dir, EngineConfig(max_batch=8)), engines=2)
    yield cluster
    cluster.close()
