"""Brings a cluster to the weight version that the service served before it ended."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ...errors import ClusterError, StorageError
from ...rollout.backend import InterruptibleBackend, RolloutBackend
from .kept_versions import KeptVersions
from .ledger import Ledger

_log = logging.getLogger(__package__)
OF_THE_POLICY = b""
"""Digest, in the ledger, of a version whose weights are those of the policy's directory."""


def restore_version(cluster: RolloutBackend, ledger: Ledger, kept: KeptVersions,
                    expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[int, str]:
    """Has the cluster take the version committed last; returns that version, and why the cluster cannot serve it, or ""."""
    last = ledger.last_version()
    kept.sweep(None if last is None else last[0])
    if last is None or last[0] == cluster.version:
        return cluster.version, ""
    try:
        if last[1] == OF_THE_POLICY and isinstance(cluster, InterruptibleBackend):
            cluster.label_version(last[0])
        else:
            cluster.commit_weights(last[0], kept.load(*last, expected))
    except (StorageError, ClusterError) as error:
        _log.warning("weight version %d cannot be restored: %s", last[0], error)
        return last[0], (f"no work is handed out: weight version {last[0]} was committed last and cannot be served; push "
                         f"version {last[0]} again, or version {last[0] + 1} ({error})")
    _log.info("weight version %d is restored", last[0])
    return last[0], ""
