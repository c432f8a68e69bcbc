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
    "Conversation": "trainer_bridge.client",
    "Engine": "rollout.engine",
    "EngineConfig": "rollout.engine",
    "RolloutOutput": "rollout.outputs",
    "RolloutClient": "trainer_bridge.client",
    "RolloutRequest": "rollout.types",
    "SampleOutput": "rollout.outputs",
    "SamplingParams": "rollout.types",
    "Schedule": "rollout.schedule",
    "SearchConfig": "rollout.search.config",
    "Trajectory": "rollout.types",
    "connect": "trainer_bridge.client",
    "converse": "trainer_bridge.client",
    "converse_async": "trainer_bridge.client",
    "load_policy": "model.checkpoint",
    "save_policy": "model.checkpoint",
    "search": "rollout.search.of_prompts",
}

__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:  # `as` tells type checkers that the names are to be imported from here
    from .model.checkpoint import load_policy as load_policy
    from .model.checkpoint import save_policy as save_policy
    from .rollout.engine import Engine as Engine
    from .rollout.engine import EngineConfig as EngineConfig
    from .rollout.outputs import RolloutOutput as RolloutOutput
    from .rollout.outputs import SampleOutput as SampleOutput
    from .rollout.schedule import Schedule as Schedule
    from .rollout.search.config import SearchConfig as SearchConfig
    from .rollout.search.of_prompts import search as search
    from .rollout.types import RolloutRequest as RolloutRequest
    from .rollout.types import SamplingParams as SamplingParams
    from .rollout.types import Trajectory as Trajectory
    from .trainer_bridge.client import Conversation as Conversation
    from .trainer_bridge.client import RolloutClient as RolloutClient
    from .trainer_bridge.client import connect as connect
    from .trainer_bridge.client import converse as converse
    from .trainer_bridge.client import converse_async as converse_async
    from .trainer_bridge.client.async_client import AsyncRolloutClient as AsyncRolloutClient


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'blockroll' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
