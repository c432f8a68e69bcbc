"""The work of a client that will not come back is ended, and nobody else's."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from bridge_parts import done, record, request

from blockroll.errors import TransportError
from blockroll.trainer_bridge.gateway.departed_client import end_client
from blockroll.trainer_bridge.gateway.kept_work import kept_work
from blockroll.trainer_bridge.gateway.ledger import Ledger


def test_a_client_that_is_gone_for_good_leaves_nothing_to_do(tmp_path: Path) -> None:
    """One request was delivered in part, one waits, one is leased, one had failed; another client's go on."""
    path = tmp_path / "ledger.sqlite"
    begun, waits, leased, other = request("begun", 3), request("waits", 2), request("leased"), request("other")
    with closing(Ledger(path)) as ledger:
        ledger.claim("gone", "an old key")
        record(ledger, begun, leased, client="gone", batch="1")
        assert ledger.lease(10) == (1, [begun, leased])
        ledger.record([done(1, begun, 1)])
        record(ledger, waits, client="gone", batch="2")
        record(ledger, other, client="stays")
        with pytest.raises(TransportError):
            ledger.claim("gone", "a new key")
    assert kept_work(path) == (6, 1) and kept_work(path, "gone") == (1, 0) and kept_work(path, "stays") == (5, 1)
    assert end_client(path, "gone") == 3
    with closing(Ledger(path)) as ledger:
        ledger.claim("gone", "a new key")
        counters = ledger.counters
        assert (counters.requested, counters.unique, counters.failed, counters.missing) == (7, 1, 5, 1)
        assert ledger.pending("gone", 0) == [] and ledger.outstanding == 1
        leases = ledger.lease(10)
        assert leases is not None and leases[1] == [other]
    assert kept_work(path) == (1, 0) and kept_work(tmp_path / "none") == (0, 0) and not (tmp_path / "none").exists()
    assert end_client(path, "gone") == 0 and end_client(path, "nobody") == 0
