"""Weights that are broadcast by torch.distributed into tensors of the engines.

The pool sends each tensor to the first engine, from host memory to host memory. The first engine broadcasts the tensors to the
other engines: between GPUs by NCCL (RCCL), else by gloo.

Invariants:
- The groups are made for one transfer and are no default group, so one that the trainer's process has is left alone.
- When a process of a transfer dies, the pool cuts it. The other engines then raise TransferBroken, and may be asked again.
- An engine that starts later reads the version that serves from Ray's object store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist

from .weight_transport import Arrays, Form, RayTransport, Ticket, TransferBroken

_log = logging.getLogger(__package__)


class BroadcastTicket:
    """One engine's part in a transfer.

    Args:
        host, port: of the store at which the processes meet. rank: this engine's among so many `engines`.
        forms: dtype and shape of each tensor, in the order of sending. timeout: seconds of the whole transfer.
    """

    def __init__(self, host: str, port: int, rank: int, engines: int, forms: Mapping[str, Form], timeout: float) -> None:
        self._at, self._rank, self._engines, self._forms, self._timeout = (host, port), rank, engines, dict(forms), timeout

    def read(self) -> Mapping[str, torch.Tensor]:
        """The tensors, in this process's own memory: on its GPU if it has one. Raises TransferBroken."""
        on_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        try:
            store = _store(*self._at, self._timeout)
            source = _gloo(store, "source", 1, 2, self._timeout) if self._rank == 0 else None
            peers = None
            if self._engines > 1:
                peers = (_nccl if on_gpu else _gloo)(store, "peers", self._rank, self._engines, self._timeout)
            found, passed_on = {}, []
            for name, (dtype, shape) in self._forms.items():
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                if source is not None:
                    source.broadcast([_bytes(tensor)], _from_first()).wait()
                found[name] = tensor = tensor.cuda() if on_gpu else tensor
                if peers is not None:
                    passed_on.append(peers.broadcast([_bytes(tensor)], _from_first()))
            for sent in passed_on:
                sent.wait()
            if on_gpu:
                torch.cuda.synchronize()
            for group in (source, peers):
                if group is not None:
                    group.barrier().wait()  # who leaves first would take away what is still on its way
        except RuntimeError as error:  # the errors of torch.distributed are such
            raise TransferBroken(f"the broadcast broke: {' '.join(str(error).split())[:200]}") from None
        return found


class BroadcastTransport:
    """See `WeightTransport`. `timeout`: seconds a transfer may take."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._kept: dict[str, np.ndarray] | None = None
        self._later: RayTransport | None = None
        self._staged: dict[str, np.ndarray] = {}
        self._changed: list[str] = []
        self._master: Any = None

    @property
    def serves(self) -> bool:
        """See `WeightTransport`."""
        return self._kept is not None

    @property
    def serving(self) -> Ticket | None:
        """See `WeightTransport`. The version is put into Ray's object store when it is first asked for."""
        if self._kept is None:
            return None
        if self._later is None:
            self._later = RayTransport()
            self._later.stage(self._kept, self._kept.keys())
            self._later.settle(True)
        return self._later.serving

    def room(self, forms: Mapping[str, Form]) -> Arrays | None:
        """Any memory serves."""
        return None

    def stage(self, arrays: Arrays, changed: Collection[str]) -> None:
        """See `WeightTransport`."""
        self._staged = {name: array if name in changed else (self._kept or {})[name] for name, array in arrays.items()}
        self._changed = [name for name in arrays if name in changed]

    def tickets(self, count: int) -> Sequence[Ticket]:
        """See `WeightTransport`. A thread sends."""
        self.cut()
        host, timeout = ray.util.get_node_ip_address(), timedelta(seconds=self._timeout)
        self._master = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        tensors = {name: self._staged[name] for name in self._changed}
        forms = {name: (array.dtype.name, array.shape) for name, array in tensors.items()}
        threading.Thread(target=_send, args=(host, self._master.port, list(tensors.values()), self._timeout), daemon=True,
                         name="blockroll-broadcast").start()
        return [BroadcastTicket(host, self._master.port, rank, count, forms, self._timeout) for rank in range(count)]

    def cut(self) -> None:
        """See `WeightTransport`. The store ends, so nobody waits there for a process that died."""
        self._master = None

    def settle(self, taken: bool) -> None:
        """See `WeightTransport`."""
        self._master = None
        if taken:
            self._kept, self._later = self._staged, None
        self._staged = {}


def _send(host: str, port: int, arrays: Sequence[np.ndarray], timeout: float) -> None:
    """The pool's part in a transfer. The engines say when it breaks."""
    try:
        group = _gloo(_store(host, port, timeout), "source", 0, 2, timeout)
        for array in arrays:
            group.broadcast([torch.from_numpy(array.reshape(-1).view(np.uint8))], _from_first()).wait()
        group.barrier().wait()
    except RuntimeError as error:
        _log.info("a broadcast of weights broke: %s", error)


def _store(host: str, port: int, timeout: float) -> Any:
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)


def _gloo(store: Any, name: str, rank: int, size: int, timeout: float) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout)
    # Ray's address of the node is one that the other nodes reach.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=ray.util.get_node_ip_address())]
    return dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, size, options)


def _nccl(store: Any, name: str, rank: int, size: int, timeout: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout)
    return dist.ProcessGroupNCCL(dist.PrefixStore(name, store), rank, size, options)


def _from_first() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
