"""Connects to a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading

import ray

from ...errors import ClusterError


def start_ray(address: str | None, cpus: int) -> bool:
    """Connects to the Ray at `address`; None starts one here that counts so many CPUs. False, and nothing is done, in a
    process that is connected. Ray's own logger prints errors only. Raises ClusterError."""
    if ray.is_initialized():
        return False
    # Ray starts its workers at niceness 15: any other process of the machine would come before the engines.
    os.environ.setdefault("RAY_worker_niceness", "0")
    before = signal.getsignal(signal.SIGTERM)
    try:
        host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal():
            # Ray itself tries for minutes.
            socket.create_connection((host, int(port)), timeout=10.0).close()
        # "local": without it Ray joins a cluster of someone else that was started on this machine.
        ray.init(address=address or "local", include_dashboard=None if address else False, log_to_driver=False,
                 logging_level=logging.ERROR, num_cpus=None if address else max(cpus, 2))  # fmt: skip
    except (OSError, RuntimeError, ValueError) as error:
        where, remedy = (f"the one at {address} cannot be reached", "check the address and that it runs") if address else \
            ("none could be started here", "see its logs in /tmp/ray")
        raise ClusterError(f"ray: {where} ({' '.join(str(error).split())[:300]}); {remedy}") from error
    finally:
        # Ray's own handler ends the process at once, without what is still to be put in order.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    return True
