"""The module of the entry point `verl.plugins`: importing it makes rollout and checkpoint engine `blockroll` known to verl.

verl imports it in each process that imports verl. Where blockroll is not installed as a distribution, name it in the environment:
`VERL_USE_EXTERNAL_MODULES=blockroll.trainer_bridge.adapters.verl.plugin`.
"""

from __future__ import annotations

import logging
from typing import Any

from .settings import NAME

_log = logging.getLogger(__package__)


def _replica() -> Any:
    from .replica import ServiceReplica

    return ServiceReplica


def register() -> None:
    """Registers everything; a second call changes nothing."""
    from . import cpu_platform  # isort: skip  # first: it may be the platform that verl asks for when it imports the rest

    cpu_platform.complete()
    from verl.checkpoint_engine import CheckpointEngineRegistry
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from .checkpoint_engine import ServiceCheckpointEngine

    RolloutReplicaRegistry.register(NAME, _replica)
    base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__package__}.rollout.ServiceRollout"  # workers look here, too
    CheckpointEngineRegistry._registry.setdefault(NAME, ServiceCheckpointEngine)


try:
    register()
except Exception:
    # verl logs it at the level debug alone, and then says that it does not know the rollout.
    _log.exception("blockroll could not be registered with verl")
    raise
