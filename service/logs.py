"""Where the log lines of this package go, and what they look like. Standard library only.

Invariants:
- Only the logger `blockroll` is touched; other libraries log as they would.
- A line is `2026-01-31 12:00:00.000 INFO blockroll.trainer_bridge.gateway: lease 3: 20 requests`, or one JSON object with the
  same fields.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

from ..errors import InvalidInput
from ..files import make_directory, storing

ROOT = __package__.partition(".")[0]
LEVELS = ("debug", "info", "warning", "error")


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(level: str, format: str = "text", file: str | None = None) -> None:
    """Sends log lines of at least `level` to a file, or to standard error. Replaces what an earlier call set up.

    Raises:
        InvalidInput: an unknown level. StorageError: the file cannot be written.
    """
    if level not in LEVELS:
        raise InvalidInput("log-level", f"unknown level {level!r}", f"use one of {', '.join(LEVELS)}")
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        make_directory(Path(file).parent)
        with storing(file):
            handler = logging.FileHandler(file)
    handler.setFormatter(_Json() if format == "json" else _Text())
    logger = logging.getLogger(ROOT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
