"""What an engine process is started with, and what is known of one that was started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ...errors import ConfigError
from ...model.device import NAMES, is_name
from ..engine import EngineConfig

Placement = Literal["pack", "spread"]
EngineState = Literal["waiting", "loading", "idle", "busy", "draining", "lost"]
"""waiting: Ray has no place for its process. loading: the process reads the policy, or a weight version. idle, busy:
it serves. draining: it ends its work and leaves. lost: it died, and its next process is started a little later."""


@dataclass(frozen=True)
class EngineSpec:
    """What each engine process of a cluster is started with.

    Attributes:
        policy: shipped name or directory, readable on every node.
        config: sizes and schedule of the engine.
        device: `auto` (a GPU where Ray gives the process one, else the CPU), `cpu`, `cuda` or `cuda:N`, where N counts
            the GPUs that Ray gives this process. ROCm's GPUs are called `cuda` too.
        dtype: `float32`, `bfloat16` or `float16`; None for bfloat16 on a GPU and float32 on a CPU.
        num_cpus, num_gpus, resources: what Ray reserves for one engine; resources are Ray's custom ones, by name. On a CPU an
            engine has num_cpus threads, rounded down, at least one.
        env: environment variables of the process.
        placement: `pack` fills a node before the next, `spread` uses as many nodes as there are.

    Raises:
        ConfigError: a value is out of range.
    """

    policy: str
    config: EngineConfig = field(default_factory=EngineConfig)
    device: str = "auto"
    dtype: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    placement: Placement = "pack"

    def __post_init__(self) -> None:
        if not is_name(self.device):
            raise ConfigError("device", f"unknown device {self.device!r}", f"use {NAMES}")
        if self.device.startswith("cuda") and self.num_gpus <= 0:
            raise ConfigError("num_gpus", f"{self.num_gpus:g} GPUs for an engine on {self.device!r}",
                              "give each engine a GPU, for instance num_gpus: 1")
        for name, amount in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus), *self.resources.items()):
            if not 0 <= amount < 1e6:
                raise ConfigError(name, f"{amount} is no amount", "use a number of at least 0")
        if self.placement not in ("pack", "spread"):
            raise ConfigError("placement", f"unknown placement {self.placement!r}", "use pack or spread")

    def demand(self) -> dict[str, float]:
        """What Ray must have free for one engine, by Ray's names."""
        return {name: amount for name, amount in
                (("CPU", self.num_cpus), ("GPU", self.num_gpus), *self.resources.items()) if amount > 0}


@dataclass(frozen=True)
class EngineStatus:
    """What is known of one engine.

    Attributes:
        id: number of the engine; its process may change, the number stays.
        pid, node, device: of its process; None and empty before it runs.
        version: weight version it serves.
        tokens_per_s: tokens it committed per second, lately.
        reason: why it waits, or what happened to its last process.
        figures: of its process at the last heartbeat (`EngineFigures.read`), and `step_seconds`, the mean duration of a
            forward pass between the last two heartbeats.
    """

    id: int
    pid: int | None
    node: str
    device: str
    state: EngineState
    version: int
    tokens_per_s: float
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
