"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name. text: what was found. fix: what to do; empty where nothing is wrong.
        state: `fail` keeps engines or a service from working, `warn` may.
    """

    check: str
    text: str
    state: Literal["ok", "warn", "fail"] = "ok"
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.state:4}  {self.check}: {self.text}" + (f"; {self.fix}" if self.fix else "")
