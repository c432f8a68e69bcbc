"""What can be refused before anything of a service is started. Imports neither torch nor Ray.

Each check raises an error of one line. `doctor` runs the same checks one by one.
"""

from __future__ import annotations

import os
from pathlib import Path

import zmq

from ..errors import ConfigError, InvalidInput, StorageError, TransportError
from ..files import make_directory
from ..rollout.host_memory import host_memory
from ..trainer_bridge.gateway import ledger_policy
from ..trainer_bridge.wire.key_files import load_server_keys, make_keys
from ..trainer_bridge.wire.keys import ServerKeys
from . import policy_files
from .config import ServiceConfig
from .runtime_file import already_up, read


def check_policy(config: ServiceConfig) -> Path:
    """The policy's directory. Raises CheckpointError."""
    return policy_files.find(config.policy)


def check_device(config: ServiceConfig) -> None:
    """Raises ConfigError for GPUs that this machine does not have. The nodes of a Ray cluster are asked by Ray."""
    wanted = config.engines.num_gpus > 0 or config.engines.device.startswith("cuda")
    if wanted and config.ray.address is None and not gpu_nodes():
        raise ConfigError("engines.device", f"{config.engines.device} with num_gpus {config.engines.num_gpus:g}, and this "
                          "machine has no GPU (/dev/kfd and /dev/nvidia* are absent)",
                          "use device: cpu and num_gpus: 0, or a machine with one")  # fmt: skip


def gpu_nodes() -> list[str]:
    """The device files of GPUs: AMD's, then NVIDIA's."""
    amd = ["/dev/kfd"] if os.path.exists("/dev/kfd") else []
    return amd + sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))


def check_memory(config: ServiceConfig) -> None:
    """Raises ConfigError for K/V pools that do not fit into this machine's memory. The pool of a GPU is checked by the engine."""
    engines = config.engines
    if engines.num_gpus > 0 or config.ray.address is not None:
        return
    directory = check_policy(config)
    pool = policy_files.pool_bytes(directory, engines.dtype or "float32", engines.pages, engines.page_size, engines.batch)
    needed = engines.at_start * (pool + policy_files.weight_bytes(directory))
    if needed > (free := host_memory()[0]):
        raise ConfigError("engines.pages", f"{engines.at_start} engines need {needed / 1e9:,.1f} GB for K/V pools and weights, "
                          f"and {free / 1e9:,.1f} GB are free", "give fewer pages, a smaller batch or fewer engines")  # fmt: skip


def check_not_up(config: ServiceConfig) -> None:
    """Raises StorageError when the service of this ledger runs."""
    if read(config.ledger) is not None:
        raise StorageError(already_up(config.ledger))


def check_ledger(config: ServiceConfig) -> None:
    """Opens the ledger, and marks an empty one as this policy's. Raises StorageError for a ledger that belongs to another policy,
    is held by another process or is broken."""
    directory = check_policy(config)
    make_directory(config.ledger.parent)
    ledger_policy.claim(config.ledger, config.policy, policy_files.identity(directory))


def check_bind(config: ServiceConfig) -> None:
    """Raises TransportError for a gateway address that cannot be bound now. Nothing stays bound."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    try:
        socket.bind(config.delivery.bind)
    except zmq.ZMQError as error:
        raise TransportError(f"delivery.bind: {config.delivery.bind} cannot be bound ({error.strerror}); choose a free port of "
                             "this machine") from error
    finally:
        socket.close(0)
        context.term()


def check_http(config: ServiceConfig) -> None:
    """Raises InvalidInput for HTTP that cannot be served: an address that cannot be bound now, or a key that cannot be read.
    Nothing stays bound."""
    if config.http is not None:
        from .http.keys import HttpKeys
        from .http.listener import bind

        HttpKeys.of(config.http)
        bind(config.http).close()


def server_keys(config: ServiceConfig) -> ServerKeys | None:
    """The gateway's keys, made at the first start; None without. Raises InvalidInput or StorageError."""
    if config.delivery.keys is None:
        return None
    try:
        return load_server_keys(make_keys(config.delivery.keys))
    except InvalidInput as error:
        raise ConfigError("delivery.keys", error.problem, error.remedy) from error


def check_all(config: ServiceConfig) -> None:
    """Every check, cheap ones first."""
    check_not_up(config)
    check_policy(config)
    check_device(config)
    check_memory(config)
    check_bind(config)
    check_http(config)
    check_ledger(config)
