"""Connects to a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import ray

from ...errors import ClusterError

_STARTING = threading.Lock()
"""Held while a thread starts Ray: what is left of a start that fails is told by what was there before."""
_END_S = 5.0
"""Seconds that killed processes are given to be gone."""


def start_ray(address: str | None, cpus: int) -> bool:
    """Connects to the Ray at `address`; None starts one here that counts so many CPUs. False, and nothing is done, in a
    process that is connected. Ray's own logger prints errors only. Raises ClusterError, and leaves no process of Ray then."""
    with _STARTING:
        return not ray.is_initialized() and _started(address, cpus)


def _started(address: str | None, cpus: int) -> bool:
    # Ray starts its workers at niceness 15: any other process of the machine would come before the engines.
    os.environ.setdefault("RAY_worker_niceness", "0")
    before, children = signal.getsignal(signal.SIGTERM), set(psutil.Process().children())
    try:
        host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal():
            # Ray itself tries for minutes.
            socket.create_connection((host, int(port)), timeout=10.0).close()
        # Given nothing, Ray joins whichever cluster was started on this machine last.
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False,
                 logging_level=logging.ERROR, num_cpus=None if address else max(cpus, 2))  # fmt: skip
    except BaseException as error:
        if isinstance(error, RuntimeError) and ray.is_initialized():
            return False  # a thread that does not call `start_ray` was first
        ray.shutdown()
        if address is None:
            _end_new(children)
        if not isinstance(error, Exception):  # a signal
            raise
        # Exception itself is what Ray raises where its processes do not come up in time.
        where, remedy = (f"the one at {address} cannot be reached", "check the address and that it runs") if address else \
            ("none could be started here", "try again once the machine is less busy, or see its logs in /tmp/ray")
        raise ClusterError(f"ray: {where} ({' '.join(str(error).split())[:300]}); {remedy}") from error
    finally:
        # Ray's own handler ends the process at once, without what is still to be put in order.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    return True


def _end_new(before: set[psutil.Process]) -> None:
    """Kills the processes of Ray among the children of this process that are not in `before`, and their children. Ray forgets
    those of a start that fails."""
    started, place = list[psutil.Process](), str(Path(ray.__file__).parent) + os.sep
    for child in set(psutil.Process().children()) - before:
        with suppress(psutil.Error):  # it has ended
            if any(word.startswith(place) for word in child.cmdline()):
                started += [child, *child.children(recursive=True)]
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, _END_S)
