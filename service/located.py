"""Where a service that is up answers: its address, or the configuration that it was started with."""

from __future__ import annotations

from pathlib import Path

from ..errors import ClusterError
from ..settings import load_yaml
from . import runtime_file
from .config import ServiceConfig


def located(address: str, keys: str | None) -> tuple[str, str | None]:
    """Address of the gateway and directory of its keys.

    Args:
        address: tcp://HOST:PORT or ipc://PATH, returned as it is; or the file of a service's configuration on this machine.
        keys: a directory that was named; None for the configuration's.

    Raises:
        ClusterError: no service of this configuration answers. ConfigError: the file is no configuration of a service.
    """
    if "://" in address or not address.endswith((".yaml", ".yml")):
        return address, keys
    config = load_yaml(Path(address), ServiceConfig)
    record = runtime_file.read(config.ledger)
    if record is None or record.state != "ready":
        state = "no service of it is up" if record is None else "its service is still starting"
        raise ClusterError(f"address: {address}: {state}; run `blockroll up {address} --detach` first")
    return record.address, keys or record.keys
