"""Which policy a ledger belongs to: requests and versions of one policy mean nothing to another."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ...errors import StorageError
from .ledger_file import LedgerFile


def claim(path: str | Path, name: str, identity: str) -> None:
    """Marks a ledger without requests and versions as this policy's; makes the file if it is missing.

    Args:
        name, identity: what errors call the policy, and what tells it from others.

    Raises StorageError for a ledger of another policy, one that another process holds, and one that is broken."""
    with closing(LedgerFile(path, None)) as file:
        with file.transaction():
            owner = file.run("SELECT value FROM meta WHERE key='policy'").fetchone()
            used = file.value("SELECT requested FROM counters WHERE id=1") or file.value("SELECT COUNT(*) FROM versions")
            if owner is None or not used:
                file.run("INSERT OR REPLACE INTO meta VALUES ('policy', ?)", (f"{identity} {name}",))
                return
    theirs, _, their_name = owner[0].partition(" ")
    if theirs != identity:
        raise StorageError(f"ledger: {path} belongs to another policy ({their_name}, with other weights or sizes than {name}); "
                           "name another ledger, or that policy")
