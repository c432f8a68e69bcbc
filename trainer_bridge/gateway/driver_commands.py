"""What the gateway tells the thread that calls the backend (`Command`), and what that thread tells the gateway (`Event`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np

from ...errors import BlockrollError, ClusterError
from ...rollout.backend import Completed
from ...rollout.types import RolloutRequest, Trajectory


@dataclass(frozen=True)
class Work:
    """Leased requests to run, and whose each is."""

    epoch: int
    batch: Sequence[RolloutRequest]
    clients: Sequence[str]

    def without(self, request_ids: Collection[str]) -> Work:
        """The work but for these requests."""
        left = [i for i, request in enumerate(self.batch) if request.id not in request_ids]
        return Work(self.epoch, [self.batch[i] for i in left], [self.clients[i] for i in left])

    def aborted(self, request_ids: Collection[str] | None) -> list[Completed]:
        """The samples of these requests, or of all, as ended before they began."""
        return [Completed(self.epoch, request.id, Trajectory.aborted(request, number)) for request in self.batch
                if request_ids is None or request.id in request_ids for number in range(request.samples)]


@dataclass(frozen=True)
class Commit:
    """A complete weight version to commit, after `seal` has written it to disk. `arrays`: None where the version is another
    number for the weights that serve. `changed`: the names of the tensors that are not those of the version that serves; None
    where that is not known."""

    version: int
    arrays: Mapping[str, np.ndarray] | None
    in_flight: str
    seal: Callable[[], None]
    changed: Collection[str] | None = None


@dataclass(frozen=True)
class Revoke:
    """A lease that is over. Its outputs are not waited for."""

    epoch: int


@dataclass(frozen=True)
class Cancel:
    """Requests whose unfinished samples are not wanted. Their outputs are not waited for. `epochs`: by request id, the lease
    that each was in flight under; the same request leased again later is not meant."""

    epochs: Mapping[str, int | None]


@dataclass(frozen=True)
class Hold:
    """The backend's engines stop between two steps, or go on. `ended` has a result when they have, or a ClusterError."""

    held: bool
    ended: Future[None] = field(default_factory=Future)


@dataclass(frozen=True)
class Abort:
    """Requests whose unfinished samples end where they are, and come back so; None for all."""

    request_ids: Collection[str] | None


@dataclass(frozen=True)
class ResetPrefixCache:
    """K/V that is kept for other requests is forgotten. `ended` as in Hold."""

    ended: Future[None] = field(default_factory=Future)


Command = Work | Commit | Revoke | Cancel | Hold | Abort | ResetPrefixCache


def refuse_interrupts(commands: SimpleQueue[Command | None]) -> None:
    """Fails the calls that wait for a driver which takes no commands any more, and empties its queue."""
    with suppress(Empty):
        while True:
            if isinstance(command := commands.get_nowait(), Hold | ResetPrefixCache):
                command.ended.set_exception(ClusterError("the gateway stops"))


@dataclass(frozen=True)
class Outputs:
    """Samples that engines finished, and requests they cannot serve."""

    completed: list[Completed]


@dataclass(frozen=True)
class WorkRefused:
    """The backend has taken nothing of this lease."""

    epoch: int


@dataclass(frozen=True)
class CommitEnded:
    """A commit has ended. `error` is None when every engine has the version."""

    version: int
    error: BlockrollError | None


@dataclass(frozen=True)
class Crashed:
    """The backend raised something other than ClusterError: a bug, or an interrupt."""

    error: BaseException


Event = Outputs | WorkRefused | CommitEnded | Crashed
