"""What travels between the pool and an engine's process. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..backend import Completed, Progress
from ..types import RolloutRequest


@dataclass(frozen=True, slots=True)
class Part:
    """Samples of one request for one engine.

    Attributes:
        numbers: which samples.
        epoch: the lease they come back under.
        client: whose request it is.
        order: its place among the pool's requests, the oldest first.
        alone: it is tried alone, so every step is reported.
        watched: report its tokens while they are made.
    """

    request: RolloutRequest
    numbers: Sequence[int]
    epoch: int
    client: str
    order: int
    alone: bool = False
    watched: bool = False


@dataclass(slots=True)
class Report:
    """What an engine has done since its last report.

    Attributes:
        completed: samples that ended, and requests that it refuses.
        returned: samples (request id, number, lease) that it gives back, not begun; None where it was not asked to.
        fresh: samples that have not begun.
        steps: made since the last part was added, if that one is alone; else 0.
        progress: of watched samples that have not ended.
    """

    completed: list[Completed] = field(default_factory=list)
    returned: list[tuple[str, int, int]] | None = None
    fresh: int = 0
    steps: int = 0
    progress: list[Progress] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """An engine's figures at one moment.

    Attributes:
        turns: how often its loop has come round: steps, and what it did between them.
        works: whether it has work.
        decode_tokens: total of the engine since its process started.
        figures: see `EngineFigures.read`.
    """

    turns: int
    works: bool
    version: int
    decode_tokens: int
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Home:
    """Where an engine's process runs.

    Attributes:
        node: address of the node. node_id: Ray's name of it.
        gpus: what the process sees of the accelerators, as Ray set it.
    """

    pid: int
    node: str
    node_id: str
    gpus: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a process that has loaded its policy serves.

    Attributes:
        expected: name -> (dtype, shape) of every tensor of a weight version.
    """

    version: int
    device: str
    expected: Mapping[str, tuple[str, tuple[int, ...]]]
