"""What a ledger keeps for the next gateway: work that is unfinished, and answers that were not fetched."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from .ledger_counters import Totals
from .ledger_file import UNACKED, LedgerFile


def kept_work(path: str | Path, but: str = "") -> tuple[int, int]:
    """Unfinished samples, and answers that were not acknowledged, of all clients but one; (0, 0) of a file that is missing or
    empty. No gateway may have the ledger. Makes no ledger.

    Raises StorageError, also for a file that is no ledger."""
    path = Path(path)
    if not path.exists() or not path.stat().st_size:
        return 0, 0
    with closing(LedgerFile(path, None, make=False)) as file, file.guard():
        unfinished = sum(samples for client, samples in Totals(file).unfinished.items() if client != but)
        return unfinished, file.value(f"SELECT COUNT(*) FROM trajectories WHERE {UNACKED} AND client<>?", but)
