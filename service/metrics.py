"""Prometheus metrics of a service, from the gateway's process.

Every scrape asks the gateway once, as `blockroll status` does. Counters count over the ledger's life (samples) or over the
life of an engine's process (tokens, forwards).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import BlockrollError, InvalidInput
from ..trainer_bridge.client import ServiceControl, ServiceStatus
from ..trainer_bridge.wire.key_files import load_client_keys
from .config import ServiceConfig

_COUNTERS = {
    "requested": "Samples requested", "unique": "Samples recorded once", "failed": "Samples of requests that cannot be served",
    "acknowledged": "Samples acknowledged", "duplicates": "Outputs dropped as duplicates",
    "stale": "Outputs dropped because their lease was over", "malformed": "Messages that could not be read",
}
_GAUGES = {
    "version": "Weight version that serves", "in_flight": "Samples with the engines", "missing": "Samples that are to come",
    "outstanding": "Samples that are to come, of clients whose work is not paused",
    "sessions": "Open sessions", "ledger_bytes": "Size of the ledger", "ledger_free_bytes": "Bytes of the ledger free for rows",
    "ledger_kept": "Settled requests the ledger remembers",
}
_ENGINE_TOTALS = ("restarts", "decode_tokens", "forwards", "preemptions", "samples", "accepted", "drafted")
"""Figures of the cluster and of engines that only grow. Every other one is a gauge."""


def families(status: ServiceStatus) -> Iterator[Any]:
    """The metric families of a status."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    figures = status.figures
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"blockroll_{name}", text, value=float(figures.get(name, 0)))
    for name, text in _GAUGES.items():
        yield GaugeMetricFamily(f"blockroll_{name}", text, value=float(figures.get(name, 0)))
    yield GaugeMetricFamily("blockroll_working", "0 where the gateway reports trouble", value=float(not figures.get("notice")))
    for name, value in figures.items():
        kind, _, short = name.partition(".")
        if kind == "engine" and not isinstance(value, str):
            family = CounterMetricFamily if short in _ENGINE_TOTALS else GaugeMetricFamily
            yield family(f"blockroll_cluster_{short.replace('.', '_')}", f"Figure {short} of the cluster", value=float(value))
    labels = ["engine", "node", "device"]
    version = GaugeMetricFamily("blockroll_engine_version", "Weight version of the engine", labels=labels)
    speed = GaugeMetricFamily("blockroll_engine_tokens_per_second", "Tokens committed per second, lately", labels=labels)
    state = GaugeMetricFamily("blockroll_engine_state", "1 for the state the engine is in", labels=[*labels, "state"])
    more: dict[str, Any] = {}
    for engine in status.engines:
        of = [str(engine.id), engine.node, engine.device]
        version.add_metric(of, engine.version)
        speed.add_metric(of, engine.tokens_per_s)
        state.add_metric([*of, engine.state], 1.0)
        for name, value in engine.figures:
            short, _, slot = name.partition(".")
            if short not in more:
                family = CounterMetricFamily if short in _ENGINE_TOTALS else GaugeMetricFamily
                text = f"Figure {short} of the engine" + (", by the draft's place in its step" if slot else "")
                more[short] = family(f"blockroll_engine_{short}", text, labels=[*labels, "slot"] if slot else labels)
            more[short].add_metric([*of, slot] if slot else of, value)
    yield from (version, speed, state, *more.values())


def exposition(status: ServiceStatus) -> tuple[bytes, str]:
    """A status as the text that Prometheus reads, and its content type."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(status))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Families:
    """A collector of one status."""

    def __init__(self, status: ServiceStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Any]:
        yield from families(self._status)


class StatusCollector:
    """Asks the gateway at each scrape. Any thread may collect."""

    def __init__(self, control: ServiceControl) -> None:
        self._control, self._lock = control, threading.Lock()

    def collect(self) -> Iterator[Any]:
        """The families of this moment; `blockroll_up` alone where the gateway does not answer."""
        from prometheus_client.core import GaugeMetricFamily

        try:
            with self._lock:
                status = self._control.status()
        except BlockrollError:
            yield GaugeMetricFamily("blockroll_up", "Whether the gateway answers", value=0.0)
            return
        yield GaugeMetricFamily("blockroll_up", "Whether the gateway answers", value=1.0)
        yield from families(status)


@contextmanager
def serving_metrics(config: ServiceConfig, address: str) -> Iterator[str | None]:
    """Answers scrapes while the block runs; yields the URL, None where no port is configured.

    Raises InvalidInput for a port that is taken."""
    options = config.metrics
    if options.port is None:
        yield None
        return
    from prometheus_client import CollectorRegistry, start_http_server

    keys = load_client_keys(config.delivery.keys) if config.delivery.keys else None
    with ServiceControl(address, keys=keys, timeout=5.0) as control:
        registry = CollectorRegistry(auto_describe=False)
        try:
            server, thread = start_http_server(options.port, options.host, registry)
        except OSError as error:
            raise InvalidInput("metrics.port", f"{options.host}:{options.port} cannot be bound ({error.strerror})",
                               "choose a free port, or 0") from error
        registry.register(StatusCollector(control))
        try:
            yield f"http://{options.host}:{server.server_port}/metrics"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
