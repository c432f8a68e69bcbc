"""A rollout service for as long as a `with` block lasts: Ray, engines, gateway, metrics, HTTP.

Invariants:
- What can be refused is refused before Ray starts (`preflight`).
- However the block ends, engines and the service's own Ray have ended after it. The ledger keeps what is unfinished.
- The runtime file beside the ledger is held while the service lives.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..trainer_bridge.gateway import Gateway
from ..trainer_bridge.gateway.departed_client import end_client
from . import preflight, runtime_file
from .autoscaler import following_queue
from .config import ServiceConfig
from .http import HTTP_CLIENT
from .metrics import serving_metrics
from .runtime_file import ServiceRecord

if TYPE_CHECKING:
    from ..rollout.cluster import EngineSpec, RayCluster

_log = logging.getLogger(__package__)


@dataclass(frozen=True)
class Service:
    """A service that answers.

    Attributes:
        address: what clients connect to. keys: directory of CURVE keys; None without.
        record: what the runtime file says.
    """

    config: ServiceConfig
    gateway: Gateway
    record: ServiceRecord

    @property
    def address(self) -> str:
        return self.gateway.address

    @property
    def keys(self) -> str | None:
        return self.config.delivery.keys

    def wait(self) -> None:
        """Returns when an operator has stopped the service. Raises what made the gateway fail."""
        # A join without a timeout keeps signals waiting.
        while not self.gateway.wait(1.0):
            pass


@contextmanager
def serve(config: ServiceConfig, log: str | None = None) -> Iterator[Service]:
    """Starts the service and yields it once it answers.

    Args:
        log: the file that this process writes its log to, for the runtime file.

    Raises:
        BlockrollError: in one line, why the service does not start or ended.
    """
    preflight.check_all(config)
    delivery = config.delivery
    record = ServiceRecord(os.getpid(), keys=delivery.keys, log=log, policy=config.policy)
    with runtime_file.held(config.ledger, record) as runtime, ExitStack() as stack:
        keys = preflight.server_keys(config)
        # Whoever asked by HTTP is gone, with the connection that the answer was for.
        end_client(config.ledger, HTTP_CLIENT, delivery.keep_requests)
        cluster = stack.enter_context(_cluster(config))
        gateway = stack.enter_context(
            Gateway(cluster, delivery.bind, config.ledger, keys=keys, max_in_flight=config.dispatch.max_in_flight,
                    max_ledger_bytes=delivery.max_ledger_bytes, keep_requests=delivery.keep_requests,
                    lease_seconds=delivery.lease_seconds, disk_patience=delivery.disk_patience_seconds,
                    client_grace=delivery.client_grace_seconds, max_request_samples=delivery.max_request_samples,
                    max_client_samples=delivery.max_client_samples))  # fmt: skip
        url = stack.enter_context(serving_metrics(config, gateway.address))
        stack.enter_context(following_queue(config, gateway.address))
        http = stack.enter_context(_http(config, gateway))
        runtime.update(state="ready", address=gateway.address, metrics=url, http=http)
        _log.info("the service of %s is up at %s: %d engines", config.policy, gateway.address, config.engines.at_start)
        yield Service(config, gateway, runtime.record)
    _log.info("the service is down")


def _http(config: ServiceConfig, gateway: Gateway) -> AbstractContextManager[str | None]:
    """The HTTP face, where one is configured: its base URL."""
    if config.http is None:
        return nullcontext()
    from .http.server import serving_http

    return serving_http(config, config.http, gateway)


@contextmanager
def _cluster(config: ServiceConfig) -> Iterator[RayCluster]:
    """The engines, in a Ray of their own or in the one of the configuration."""
    import ray

    engines = config.engines
    # torch is imported while Ray's processes start: each takes seconds, and Ray's are spent waiting.
    importing = threading.Thread(target=importlib.import_module, args=("..rollout.cluster.pool", __package__), daemon=True)
    importing.start()
    from ..rollout.cluster.ray_start import start_ray

    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        own = start_ray(config.ray.address, math.ceil(engines.most * engines.num_cpus))
        if not own:
            stack.pop_all()  # the Ray of whoever calls
        importing.join()
        from ..rollout.cluster import RayCluster

        options: dict[str, Any] = {}
        if config.dispatch.heartbeat_seconds is not None:
            options["heartbeat_seconds"] = config.dispatch.heartbeat_seconds
        cluster = RayCluster(engine_spec(config), engines=engines.at_start, dispatch=config.dispatch.mode,
                             answer_seconds=config.dispatch.answer_seconds, max_engines=engines.most,
                             weight_transport=config.weights.transport, owns_ray=own and config.ray.address is None, **options)
        stack.callback(cluster.close)
        yield cluster


def engine_spec(config: ServiceConfig) -> EngineSpec:
    """What each engine is started with. Imports torch. Raises ConfigError."""
    from ..rollout.cluster import EngineSpec
    from ..rollout.engine import EngineConfig

    engines = config.engines
    options: dict[str, Any] = {"schedule": config.schedule.schedule(), "repeatable": config.schedule.repeatable,
                               "enable_prefix_caching": engines.enable_prefix_caching}
    for ours, theirs in (("batch", "max_batch"), ("block_size",) * 2, ("draft_temperature",) * 2, ("pages",) * 2,
                         ("page_size",) * 2, ("prefill_rows",) * 2, ("kv_memory",) * 2, ("batch_invariant",) * 2):
        if getattr(engines, ours) not in (None, False):
            options[theirs] = getattr(engines, ours)
    try:
        return EngineSpec(config.policy, EngineConfig(**options), device=engines.device, dtype=engines.dtype,
                          num_cpus=engines.num_cpus, num_gpus=engines.num_gpus, resources=engines.resources,
                          env=engines.env, placement=engines.placement)
    except ConfigError as error:
        raise ConfigError(f"engines.{error.field}", error.problem, error.remedy) from error
