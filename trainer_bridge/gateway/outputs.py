"""What the ledger holds of an engine's output: its record, or why the request has failed."""

from __future__ import annotations

import numpy as np

from ...errors import TransportError
from ...rollout.backend import Completed
from ..wire.records import FAILURE, encode_trajectory


def payload_of(item: Completed) -> tuple[int, bytes]:
    """Sample number and payload of an output; a trajectory that cannot travel, or that holds a
    log-probability that is not finite, is the failure of its request."""
    if item.trajectory is not None:
        try:
            for name in ("logprobs", "behavior_logprobs"):
                if not np.isfinite(getattr(item.trajectory, name)).all():
                    raise TransportError(f"sample {item.trajectory.sample}: {name} holds a number that is not finite")
            return item.trajectory.sample, encode_trajectory(item.trajectory)
        except TransportError as error:
            return FAILURE, str(error).encode()[:1000]
    return FAILURE, (item.error or "the cluster gave no reason").encode("utf-8", "replace")[:1000]
