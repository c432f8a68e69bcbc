"""How the tensors of a weight version come from the pool into its engines.

Invariants:
- A transport only carries. What a version must be, and that all engines take it or none does, is decided elsewhere
  (`weight_commit`), the same for each.
- A ticket is what an engine is sent in place of tensors. It can be pickled, and reads the tensors in the engine's process.
- Nothing is left behind when processes are killed.

| name | carries | where |
|---|---|---|
| `ray` | Ray's object store, which engines of a node share and read without a copy | everywhere |
| `shared_memory` | memory of the pool's process, which engines map | one host |
| `torch_distributed` | broadcast into tensors of the engines: gloo, or NCCL and RCCL between GPUs | everywhere |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import ray
from ray.exceptions import RayError

from ...errors import ClusterError
from .ray_errors import one_line

Transport = Literal["ray", "shared_memory", "torch_distributed"]
TRANSPORTS: tuple[Transport, ...] = ("ray", "shared_memory", "torch_distributed")
Arrays = Mapping[str, np.ndarray]
Form = tuple[str, tuple[int, ...]]
"""dtype and shape of a tensor; the dtypes are NumPy's, and `bfloat16`, which is carried as the uint16 array of its bits."""


class TransferBroken(Exception):
    """Another process of the transfer died. The engine may be asked to read again. Never leaves the cluster."""


class Ticket(Protocol):
    """Tensors of a version, for one engine."""

    def read(self) -> Mapping[str, Any]:
        """Arrays or tensors by name. They may be read-only, and they may lie in memory that other engines read too."""


class WeightTransport(Protocol):
    """The pool's end. It keeps the tensors of the version that serves, for engines that start later. One thread at a time,
    except for `room`."""

    @property
    def serves(self) -> bool:
        """Whether it has the tensors that serve; it has not where those are of the policy's directory."""

    @property
    def serving(self) -> Ticket | None:
        """Every tensor of the version that serves, for any engine; None for those of the policy's directory."""

    def room(self, forms: Mapping[str, Form]) -> Arrays | None:
        """Arrays to receive a version into, so that `stage` need not copy it; None where that saves nothing. Any thread."""

    def stage(self, arrays: Arrays, changed: Collection[str]) -> None:
        """Takes a version. `changed`: the names whose tensors are not those that serve. Raises ClusterError."""

    def tickets(self, count: int) -> Sequence[Ticket]:
        """A ticket to what has changed for each of so many engines, which read at the same time."""

    def cut(self) -> None:
        """Ends transfers under way: engines that still read raise TransferBroken."""

    def settle(self, taken: bool) -> None:
        """The staged version serves from here on, or it is dropped."""


class RayTicket:
    """References to arrays in Ray's object store."""

    def __init__(self, references: Mapping[str, Any]) -> None:
        self._references = dict(references)

    def read(self) -> Arrays:
        """The arrays, which lie in the store."""
        return dict(zip(self._references, ray.get(list(self._references.values())), strict=True))


class SharedTransport(ABC):
    """A `WeightTransport` whose engines all read the same copy of a tensor, each on its own."""

    def __init__(self) -> None:
        self._serving: dict[str, Any] | None = None
        self._staged: dict[str, Any] = {}
        self._changed: Collection[str] = ()

    @abstractmethod
    def ticket(self, held: Mapping[str, Any]) -> Ticket:
        """To what `stage` has kept of these tensors."""

    @property
    def serves(self) -> bool:
        """See `WeightTransport`."""
        return self._serving is not None

    @property
    def serving(self) -> Ticket | None:
        """See `WeightTransport`."""
        return None if self._serving is None else self.ticket(self._serving)

    def tickets(self, count: int) -> Sequence[Ticket]:
        """See `WeightTransport`."""
        return [self.ticket({name: self._staged[name] for name in self._changed})] * count

    def cut(self) -> None:  # noqa: B027
        """Nothing is under way: engines read on their own."""

    def settle(self, taken: bool) -> None:
        """See `WeightTransport`."""
        if taken:
            self._serving = self._staged
        self._staged = {}


class RayTransport(SharedTransport):
    """Through Ray's object store: an object per tensor, so that one which did not change is not put again."""

    def ticket(self, held: Mapping[str, Any]) -> RayTicket:
        """To objects in the store."""
        return RayTicket(held)

    def room(self, forms: Mapping[str, Form]) -> Arrays | None:
        """Ray's store takes copies only."""
        return None

    def stage(self, arrays: Arrays, changed: Collection[str]) -> None:
        """See `WeightTransport`."""
        kept = self._serving or {}
        try:
            self._staged = {name: ray.put(array) if name in changed else kept[name] for name, array in arrays.items()}
        except RayError as full:
            raise ClusterError(f"weights: the version finds no room in Ray's object store ({one_line(full)}); "
                               "the old one serves") from full
        self._changed = changed
