"""What one configuration needs of this machine."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import BlockrollError
from ...trainer_bridge.wire.key_files import CONTROL, DATA, SERVER, load_server_keys
from .. import policy_files, preflight, runtime_file
from ..config import ServiceConfig
from . import machine, packages
from .finding import Finding


def check(config: ServiceConfig) -> Iterator[Finding]:
    """One finding per check. A service that runs holds its ledger and its port, so these are not checked then."""
    yield _tried("policy", f"{config.policy} is here", preflight.check_policy, config)
    yield _tried("device", f"{config.engines.device} is here", preflight.check_device, config)
    yield _tried("pool", _pool_text(config), preflight.check_memory, config)
    up = runtime_file.read(config.ledger)
    if up is None:
        yield _tried("port", f"{config.delivery.bind} can be bound", preflight.check_bind, config)
        yield _metrics_port(config)
        if config.ledger.exists():
            yield _tried("ledger", f"{config.ledger} is whole and belongs to this policy", preflight.check_ledger, config)
    else:
        yield Finding("service", f"is up, process {up.pid}: its port and ledger are not checked")
    yield from keys(config)
    weights = _weights(config)
    yield machine.disk(config.ledger, machine.DISK_GB * 1e9 + 2 * weights)
    yield machine.clock(config.ledger)
    if config.ray.address is None:
        yield machine.shared_memory(needed=max(machine.SHARED_GB * 1e9, 1.2 * weights))
    else:
        yield ray_cluster(config.ray.address)


def keys(config: ServiceConfig) -> Iterator[Finding]:
    """Whether the keys are whole, and readable by their owner alone."""
    if config.delivery.keys is None:
        yield Finding("keys", f"not needed: only this machine reaches {config.delivery.bind}")
        return
    folder = Path(config.delivery.keys)
    if not folder.exists():
        yield Finding("keys", f"{folder} is made at the first start")
        return
    for name in (SERVER, DATA, CONTROL):
        path = folder / name
        if path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            yield Finding("keys", f"others may read {path}", "fail", f"chmod 600 {path}, and make new keys if someone did")
            return
    yield _tried("keys", f"{folder} holds the keys, for their owner alone", lambda _: load_server_keys(folder), config)


def ray_cluster(address: str) -> Finding:
    """Whether a Ray cluster answers and has the versions that are here."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return Finding("ray cluster", f"{address}: found by Ray itself when the service starts")
    try:
        socket.create_connection((host, int(port)), timeout=5.0).close()
        versions = packages.cluster_versions(address)
    except (OSError, RuntimeError) as error:
        return Finding("ray cluster", f"{address} does not answer ({' '.join(str(error).split())[:120]})", "fail",
                       "start it with `ray start --head`, or correct ray.address")  # fmt: skip
    return packages.ray(versions)


def _metrics_port(config: ServiceConfig) -> Finding:
    options = config.metrics
    if options.port is None:
        return Finding("metrics", "no port is configured")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            return Finding("metrics", f"{options.host}:{options.port} cannot be bound ({error.strerror})", "fail",
                           "choose a free port for metrics.port, or 0")  # fmt: skip
    return Finding("metrics", f"{options.host}:{options.port} can be bound")


def _tried(name: str, good: str, run: Callable[[ServiceConfig], object], config: ServiceConfig) -> Finding:
    try:
        run(config)
    except BlockrollError as error:
        problem, _, fix = str(error).rpartition("; ")
        return Finding(name, problem or fix, "fail", fix if problem else "")
    return Finding(name, good)


def _pool_text(config: ServiceConfig) -> str:
    engines = config.engines
    if engines.num_gpus > 0 or config.ray.address is not None:
        return "sized by each engine on its own device"
    try:
        size = policy_files.pool_bytes(policy_files.find(config.policy), engines.dtype or "float32", engines.pages,
                                       engines.page_size, engines.batch)  # fmt: skip
    except BlockrollError:
        return "unknown"
    return f"{engines.at_start} pools of {size / 1e9:.2f} GB fit into memory"


def _weights(config: ServiceConfig) -> int:
    try:
        return policy_files.weight_bytes(policy_files.find(config.policy))
    except BlockrollError:
        return 0
