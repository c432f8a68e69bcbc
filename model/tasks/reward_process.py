"""Calls a reward function in a process of its own.

Invariants:
- What takes longer than `timeout_s` is ended with its process and what that has started, whatever it does; the next call begins
  another one.
- A value is a finite number, or None where there is none: the function gave none, or took too long. Everything else that a
  function returns or raises is an error, in one line: a reward is never made up.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError

START_S = 120.0
"""Seconds in which the function's module must be imported: it may import torch and load a model."""
GRACE_S = 0.5
"""Seconds beyond the timeout in which a coroutine that was cancelled may end, before its process is ended."""
_WORKER = Path(__file__).with_name("reward_worker.py")


@dataclass(frozen=True)
class Parameters:
    """What the function takes. `named`: by name, whether it has a default. `any_name`: it takes every name."""

    named: Mapping[str, bool]
    any_name: bool


class RewardProcess:
    """One function.

    Args:
        function: `module:function`.
        field: what errors call it.

    Attributes:
        late: calls that took too long.
    """

    def __init__(self, function: str, timeout_s: float, field: str = "reward.function") -> None:
        self._function, self._timeout, self._field = function, timeout_s, field
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._together = False
        self.late = 0

    def start(self) -> Parameters:
        """Begins the process. Raises ConfigError where the function cannot be used."""
        path = [*sys.path, os.getcwd()] if os.getcwd() not in sys.path else sys.path
        command = [sys.executable, "-P", str(_WORKER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                         start_new_session=True)  # fmt: skip
        self._unread = b""
        self._send({"path": path, "function": self._function, "timeout": self._timeout})
        answer = self._read(time.monotonic() + START_S)
        if answer is None or "refused" in answer:
            self.close()
            why = f"its module was not imported within {START_S:g} s" if answer is None else answer["refused"]
            raise ConfigError(self._field, f"{self._function} cannot be used: {why}",
                              "give module:function, of a module that can be imported from the working directory")
        self._together = answer["together"]
        return Parameters(answer["parameters"], answer["any"])

    def batch(self, arguments: Mapping[str, Any], count: int) -> list[float | None]:
        """One call for `count` samples: lists in, one value for each out."""
        self._ready()
        self._send({"arguments": arguments})
        answer = self._read(time.monotonic() + self._timeout + GRACE_S)
        if answer is None or "late" in answer:
            self._took_too_long(answer is None)
            return [None] * count
        values = self._checked(answer, "values")
        if len(values) != count:
            raise self._error(f"returned {len(values)} values for {count} samples", "return one number for each completion")
        return [self._number(value) for value in values]

    def each(self, calls: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """One call for each sample. One that takes too long leaves the others their values."""
        values: dict[int, float | None] = {}
        alone = False
        while left := [i for i in range(len(calls)) if i not in values]:
            self._ready()
            left = left[:1] if alone else left
            self._send({"calls": [calls[i] for i in left]})
            for _ in left:
                answer = self._read(time.monotonic() + self._timeout + GRACE_S)
                if answer is None and self._together and not alone:
                    # A coroutine that does not wait blocks those that run beside it. From here on each is called alone.
                    self.close()
                    alone = True
                    break
                if answer is None:
                    # Calls are made in their order.
                    self._took_too_long(True)
                    values[next(i for i in left if i not in values)] = None
                    break
                if "late" in answer:
                    self._took_too_long(False)
                    values[left[answer["call"]]] = None
                else:
                    values[left[answer["call"]]] = self._number(self._checked(answer, "value"))
        return [values[i] for i in range(len(calls))]

    def close(self) -> None:
        """Ends the process, and what it has started."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _ready(self) -> None:
        if self._process is None:
            self.start()

    def _took_too_long(self, end: bool) -> None:
        self.late += 1
        if end:
            self.close()

    def _checked(self, answer: Mapping[str, Any], key: str) -> Any:
        if "error" in answer:
            raise self._error(answer["error"], "correct the function; `--resume` goes on with the run")
        return answer[key]

    def _number(self, value: float | None) -> float | None:
        if value is not None and not math.isfinite(value):
            raise self._error(f"returned {value}", "return a finite number, or None for a sample that has no reward")
        return value

    def _error(self, problem: str, remedy: str) -> DataError:
        self.close()
        return DataError(self._field, f"{self._function} {problem}", remedy)

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        data = json.dumps(message, default=str).encode() + b"\n"
        try:
            while data:
                data = data[self._process.stdin.write(data) or 0 :]
        except BrokenPipeError:
            raise self._ended() from None

    def _read(self, deadline: float) -> dict[str, Any] | None:
        """The next answer; None where none comes in time."""
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise self._ended()
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _ended(self) -> DataError:
        assert self._process is not None
        status = self._process.wait()
        return self._error(f"ended its process (status {status})", "correct the function; what it does must not end the process")
