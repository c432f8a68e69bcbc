"""What the commands of a service do: up, status, scale, down, logs. They print to standard output."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import BlockrollError, ClusterError, InvalidInput, StorageError
from ..settings import load_yaml
from ..trainer_bridge.client import ServiceControl, ServiceStatus
from ..trainer_bridge.wire.key_files import load_client_keys
from . import detached, logs, preflight, runtime_file
from .config import ServiceConfig, check_cores
from .http import HTTP_CLIENT
from .runtime_file import ServiceRecord

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WATCH_S = 1.0
"""Seconds between two states that `status --watch` shows."""


def load(path: Path) -> ServiceConfig:
    """The configuration in a file. Raises ConfigError."""
    return load_yaml(path, ServiceConfig)


def up(path: Path, *, detach: bool, log: Path | None, level: str | None) -> None:
    """Starts a service; returns once it answers (`detach`), or once it has ended.

    Args:
        log: the file that standard error goes to, where it is one.
        level: of log lines; None for the configuration's.
    """
    config = load(path)
    preflight.check_not_up(config)
    if detach:
        # Refused here, before a process is started, where that is possible.
        preflight.check_policy(config)
        preflight.check_device(config)
        _say(_described(detached.start(path, config, level)))
        return
    from .lifecycle import serve

    options = config.logging
    logs.configure(level or options.level, options.format, options.file)
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupt)
    try:
        with serve(config, None if log is None else str(log)) as service:
            _say(_described(service.record))
            service.wait()
    except KeyboardInterrupt as stop:
        name = str(stop)
        print(f"the service is down ({name}); {_kept(config)}", file=sys.stderr, flush=True)
        sys.exit(128 + signal.Signals[name])
    _say("the service is down")


def status(path: Path, *, as_json: bool, watch: bool) -> None:
    """Shows what the service does. Raises ClusterError where none runs."""
    config = load(path)
    if not watch:
        record, state = _ask(config)
        _say(json.dumps(as_contract(record, state)) if as_json else table(config, record, state))
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    record = _running(config)
    with Live(console=Console(), auto_refresh=False) as live, _control(record) as control:
        while True:
            live.update(Text(table(config, record, control.status())), refresh=True)
            time.sleep(WATCH_S)


def scale(path: Path, engines: int) -> None:
    """Changes the number of engines. Raises InvalidInput for a number that the configuration does not allow."""
    config = load(path)
    if engines < 1:
        raise InvalidInput("N", f"{engines} engines", "give 1 or more, or stop the service with `blockroll down`")
    if config.engines.follows_queue:
        raise InvalidInput("N", f"the number follows the queue between {config.engines.min} and {config.engines.max}",
                           "change engines.min and engines.max, or give engines.count")
    check_cores(config.engines, engines, config.ray.address)
    record = _running(config)
    with _control(record) as control:
        control.scale(engines)
    _say(f"the service has {engines} engine{'s' if engines > 1 else ''}; one that starts loads the policy first, one that leaves "
         "ends the samples it has begun")  # fmt: skip


def down(path: Path, *, drain: bool, seconds: float | None) -> None:
    """Stops the service; one that is down stays down.

    Args:
        drain: let engines end the work they hold.
        seconds: most time to drain; None for as long as it takes.
    """
    config = load(path)
    record = runtime_file.read_written(config.ledger)
    if record is None:
        _say(f"no service of {config.ledger} runs")
        return
    began, stopped = time.monotonic(), False
    if record.state == "ready":
        with _control(record, timeout=5.0) as control:
            try:
                stopped = control.stop(drain=drain, timeout=seconds) or control.stop(drain=False, timeout=10.0)
            except BlockrollError:
                stopped = False  # it does not answer: its process is ended
    if not (stopped and detached.wait_gone(record.pid, config.ledger, 60.0)):
        detached.end(record.pid, config.ledger)
    if runtime_file.read(config.ledger) is not None:
        raise ClusterError(f"service: process {record.pid} does not end; see {record.log or 'its terminal'}")
    _say(f"the service is down after {time.monotonic() - began:.1f} s; {_kept(config)}")


def show_logs(path: Path, *, follow: bool, lines: int) -> None:
    """Prints the end of the service's log, and with `follow` what is added to it."""
    config = load(path)
    record = runtime_file.read(config.ledger)
    name = config.logging.file or (record.log if record is not None and record.log else runtime_file.log_beside(config.ledger))
    try:
        file = open(name, encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    except OSError as error:
        raise StorageError(f"logs: {name} cannot be read ({error.strerror}); a service in a terminal logs there, one that was "
                           "started with --detach to this file") from error
    with file:
        for line in file.readlines()[-lines:]:
            sys.stdout.write(line)
        while follow:
            if line := file.readline():
                print(line, end="", flush=True)
            else:
                time.sleep(0.2)


def as_contract(record: ServiceRecord, state: ServiceStatus) -> dict[str, Any]:
    """What `status --json` prints."""
    engines = [{"id": e.id, "pid": e.pid, "node": e.node, "device": e.device, "state": e.state, "version": e.version,
                "tokens_per_s": e.tokens_per_s} for e in state.engines]  # fmt: skip
    return {"address": record.address, "http": record.http, "version": int(state.figures["version"]), "engines": engines,
            **state.counts()}


def table(config: ServiceConfig, record: ServiceRecord, state: ServiceStatus) -> str:
    """What `status` prints."""
    figures, counts = state.figures, state.counts()
    age = time.time() - record.started
    lines = [
        f"{config.policy} at {record.address}, process {record.pid}, up for {_duration(age)}, version {figures['version']}",
        f"samples: {counts['requested']} requested, {counts['unique']} recorded, {figures['failed']} failed, "
        f"{figures['missing']} to come of which engines hold {counts['in_flight']}, {figures['acknowledged']} acknowledged",
        f"{figures['sessions']} sessions, {counts['restarts']} restarts, {int(figures['ledger_bytes']) / 1e6:.1f} MB of ledger",
    ]
    named = (("http", record.http), ("metrics", record.metrics), ("keys", record.keys), ("log", record.log),
             ("trouble", figures.get("notice")))
    lines += [f"{name}: {value}" for name, value in named if value]
    rows = [("engine", "process", "node", "device", "state", "version", "tokens/s", "")]
    rows += [(str(e.id), str(e.pid or "-"), e.node or "-", e.device or "-", e.state, str(e.version), f"{e.tokens_per_s:,.0f}",
              e.reason) for e in state.engines]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _described(record: ServiceRecord) -> str:
    named = (("http", record.http), ("keys", record.keys), ("metrics", record.metrics), ("log", record.log))
    more = "".join(f", {name} {value}" for name, value in named if value)
    return f"the service of {record.policy} is up at {record.address} (process {record.pid}{more})"


def _kept(config: ServiceConfig) -> str:
    """What the ledger of a service that has ended keeps. The answers of requests by HTTP are not kept."""
    from ..trainer_bridge.gateway.kept_work import kept_work

    try:
        unfinished, waiting = kept_work(config.ledger, HTTP_CLIENT)
    except StorageError as error:
        return str(error)
    if not (unfinished or waiting):
        return f"nothing in {config.ledger} is unfinished or not fetched"
    return f"{config.ledger} keeps {unfinished} unfinished samples and {waiting} that are not fetched"


def _running(config: ServiceConfig) -> ServiceRecord:
    record = runtime_file.read(config.ledger)
    if record is None:
        raise ClusterError(f"service: no service of {config.ledger} runs; start it with `blockroll up`")
    if record.state != "ready":
        raise ClusterError(f"service: the service of {config.ledger} is starting (process {record.pid}); wait, or see its log")
    return record


def _control(record: ServiceRecord, timeout: float = 10.0) -> ServiceControl:
    keys = None if record.keys is None else load_client_keys(record.keys)
    return ServiceControl(record.address, keys=keys, timeout=timeout)


def _ask(config: ServiceConfig) -> tuple[ServiceRecord, ServiceStatus]:
    record = _running(config)
    with _control(record) as control:
        return record, control.status()


def _interrupt(number: int, frame: object) -> None:
    # A second signal is too late to change anything.
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def _duration(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def _say(text: str) -> None:
    print(text, flush=True)
