"""blockroll: rollouts for reinforcement learning of language models, decoded block by block, exactly.

The public face. Names are resolved on first use, so that a trainer's process can import the client without torch or Ray
and an engine can be imported without Ray or pyzmq.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncRolloutClient": "trainer_bridge.client.async_client",
    "Engine": "rollout.engine",
    "EngineConfig": "rollout.engine",
    "RolloutOutput": "rollout.outputs",
    "RolloutClient": "trainer_bridge.client",
    "RolloutRequest": "rollout.types",
    "SampleOutput": "rollout.outputs",
    "SamplingParams": "rollout.types",
    "Schedule": "rollout.schedule",
    "Trajectory": "rollout.types",
    "connect": "trainer_bridge.client",
    "load_policy": "model.checkpoint",
    "save_policy": "model.checkpoint",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from .model.checkpoint import load_policy, save_policy
    from .rollout.engine import Engine, EngineConfig
    from .rollout.outputs import RolloutOutput, SampleOutput
    from .rollout.schedule import Schedule
    from .rollout.types import RolloutRequest, SamplingParams, Trajectory
    from .trainer_bridge.client import RolloutClient, connect
    from .trainer_bridge.client.async_client import AsyncRolloutClient


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'blockroll' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
