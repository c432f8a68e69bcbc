"""Starts a service in a process of its own, which outlives the command that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ..errors import ClusterError
from ..files import make_directory, storing
from . import runtime_file
from .config import ServiceConfig
from .runtime_file import ServiceRecord

_POLL_S = 0.05
_END_S = 30.0
"""Seconds a service gets to end after a signal before its process is killed."""


def start(config_path: Path, config: ServiceConfig, level: str | None) -> ServiceRecord:
    """Starts `blockroll up CONFIG` in a session of its own; returns its record once it answers.

    Raises:
        ClusterError: it ended before it answered; the text is its own last line.
    """
    log = runtime_file.log_beside(config.ledger)
    make_directory(log.parent)
    command = [sys.executable, "-m", f"{__package__.partition('.')[0]}.cli",
               *(["--log-level", level] if level else []), "up", str(config_path), "--log", str(log)]  # fmt: skip
    with storing(log), open(log, "ab") as file:
        start_of_log = file.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True)
    try:
        while True:
            record = runtime_file.read(config.ledger)
            if record is not None and record.pid == process.pid and record.state == "ready":
                return record
            if process.poll() is not None:
                raise ClusterError(_last_line(log, start_of_log))
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        end(process.pid, config.ledger)
        raise


def end(pid: int, ledger: Path) -> None:
    """Ends a service's process by SIGTERM, and by SIGKILL after 30 s. Its ledger stays whole either way.

    Raises:
        ClusterError: the number is not that of a service's process: 0 and negative ones name groups of processes.
    """
    if pid <= 1:
        raise ClusterError(f"service: {runtime_file.path_beside(ledger)} names process {pid}, which is no service; end the "
                           "service by its own process number")
    for number, seconds in ((signal.SIGTERM, _END_S), (signal.SIGKILL, _END_S)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        if wait_gone(pid, ledger, seconds):
            return


def wait_gone(pid: int, ledger: Path, seconds: float) -> bool:
    """Whether the service of that process has let go of its ledger, and ended, within `seconds`."""
    end_at = time.monotonic() + seconds
    while time.monotonic() < end_at:
        record = runtime_file.read(ledger)
        if (record is None or record.pid not in (pid, 0)) and not _runs(pid):
            return True
        time.sleep(_POLL_S)
    return False


def _runs(pid: int) -> bool:
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == pid:  # a child of this process
            return False
    except ChildProcessError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # A process that has ended and was not collected by its parent holds nothing.
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def _last_line(log: Path, start_of_log: int) -> str:
    with open(log, "rb") as file:
        file.seek(start_of_log)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    return f"service: it ended before it answered; see {log}" + (f" ({lines[-1][:300]})" if lines else "")
