"""The service of a GRPO run: one that its configuration describes, or one that is up already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..errors import ConfigError, InvalidInput, TransportError
from ..settings import load_yaml, parse
from ..trainer_bridge.trainers.grpo.attachment import Endpoint
from ..trainer_bridge.trainers.grpo.config import GrpoConfig
from ..trainer_bridge.trainers.grpo.run import Serve
from ..trainer_bridge.wire.key_files import load_client_keys
from ..trainer_bridge.wire.sockets import check_address
from .config import ServiceConfig
from .lifecycle import serve
from .located import located

DISK_PATIENCE_S = 5.0
"""Seconds the disk under a run's ledger may stay full before the run ends: without the ledger it cannot go on, and a person waits
for it."""


def service_of(run: GrpoConfig, address: str | None = None, keys: str | None = None) -> Serve:
    """What brings the service of a run up. Everything that the configuration says is checked here.

    Args:
        address, keys: of a service that is up, in place of what the configuration says; see `located`.

    Raises:
        InvalidInput: what is wrong, in one line.
    """
    if keys is not None and address is None and run.address is None:
        raise InvalidInput("--keys", f"{keys} without --address", "give the address of the service that has these keys")
    where = address or run.address
    if where is not None:
        where, directory = located(where, keys or run.keys)
        try:
            check_address(where, has_keys=directory is not None)
        except TransportError as error:
            raise InvalidInput("address", f"{where!r} is not an address that can be used ({error})",
                               "use tcp://HOST:PORT, and beyond loopback --keys") from error
        endpoint = Endpoint(where, None if directory is None else load_client_keys(directory), shared=True)
        return lambda ledger: nullcontext(endpoint)
    config = _described(run)
    return lambda ledger: _served(config, ledger)


def _served(config: ServiceConfig, ledger: Path) -> AbstractContextManager[Endpoint]:
    delivery = config.delivery.model_copy(update={"ledger": str(ledger)})

    @contextmanager
    def block() -> Iterator[Endpoint]:
        with serve(config.model_copy(update={"delivery": delivery})) as service:
            keys = None if service.keys is None else load_client_keys(service.keys)
            yield Endpoint(service.address, keys)

    return block()


def _described(run: GrpoConfig) -> ServiceConfig:
    """The service that a run's configuration describes; its ledger is still to be named."""
    if isinstance(run.service, str):
        return load_yaml(run.service, ServiceConfig).model_copy(update={"policy": run.policy})
    section: dict[str, Any] = dict(run.service or {})
    delivery = section.get("delivery") or {}
    for name, present in (("policy", "policy" in section), ("logging", "logging" in section),
                          ("delivery.ledger", isinstance(delivery, Mapping) and "ledger" in delivery)):  # fmt: skip
        if present:
            raise ConfigError(f"service.{name}", "is given", "leave it out: the run says it, or keeps it in its own directory")
    if isinstance(delivery, Mapping):
        section["delivery"] = {"disk_patience_seconds": DISK_PATIENCE_S, **delivery}
    try:
        return parse({"policy": run.policy, **section}, ServiceConfig, "the section service")
    except ConfigError as error:
        raise ConfigError(f"service.{error.field}", error.problem, error.remedy) from error
