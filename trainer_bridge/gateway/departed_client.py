"""Ends the work of a client that will not come back for it: one whose answers belonged to connections that are gone."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from .ledger import Ledger
from .retention import KEEP

_log = logging.getLogger(__package__)
WHY = "its connection is gone"


def end_client(path: str | Path, client: str, keep: int = KEEP) -> int:
    """Fails the unfinished requests of a client, and acknowledges all that it was not sent; its id is free for another key. No
    gateway may have the ledger. Returns how many requests were unfinished.

    Args:
        keep: wholly acknowledged requests that the ledger remembers.

    Raises StorageError."""
    with closing(Ledger(path, keep=keep)) as ledger:
        unfinished = ledger.release_client(client)
        ledger.cancel(client, unfinished, WHY)
        while found := ledger.pending(client, 0):
            ledger.acknowledge(client, [(each.request_id, each.sample) for each in found])
    if unfinished:
        _log.info("%d requests of client %s are dropped: %s", len(unfinished), client, WHY)
    return len(unfinished)
