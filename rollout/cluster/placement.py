"""Why Ray has not brought up the process of an engine."""

from __future__ import annotations

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
from ray.autoscaler.v2.sdk import get_cluster_resource_state

from .spec import EngineSpec


def unplaced(spec: EngineSpec) -> tuple[int, str]:
    """How many engines Ray has no place for at present, and what it lacks, in one line."""
    demand = spec.demand()
    state = get_cluster_resource_state(GcsClient(address=ray.get_runtime_context().gcs_address))
    count = sum(pending.count for pending in state.pending_resource_requests
                if dict(pending.request.resources_bundle) == demand)  # fmt: skip
    if not count:
        return 0, ""
    total, free = ray.cluster_resources(), ray.available_resources()
    lacks = [f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name} are free and it needs {amount:g}"
             for name, amount in demand.items() if free.get(name, 0.0) + 1e-9 < amount]  # fmt: skip
    needs = ", ".join(f"{amount:g} {name}" for name, amount in demand.items())
    return count, f"Ray has no place for it: {', '.join(lacks) or f'no single node has {needs} free'}"


def never_fits(spec: EngineSpec) -> bool:
    """Whether the cluster as it is could not hold a single engine."""
    total = ray.cluster_resources()
    return any(total.get(name, 0.0) < amount for name, amount in spec.demand().items())
