"""`blockroll COMMAND`: arguments in, one call into the package, one line out when something is wrong."""

from __future__ import annotations


def main() -> None:
    raise SystemExit("no command yet")
