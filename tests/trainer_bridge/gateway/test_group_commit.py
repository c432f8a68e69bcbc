"""What a round of the gateway records reaches the disk with one `sync`, and nobody is told of it before."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest
import zmq
from bridge_parts import Endless, ToyBackend, record, request, until, working

from blockroll.errors import StorageError, TransportError
from blockroll.rollout.types import Trajectory
from blockroll.trainer_bridge.client import RolloutClient, connect
from blockroll.trainer_bridge.gateway import Gateway, ledger_file, message_router
from blockroll.trainer_bridge.gateway.batch_parts import Part
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire import messages
from blockroll.trainer_bridge.wire.client_socket import ClientSocket
from blockroll.trainer_bridge.wire.records import encode_request

Serve = Callable[..., Gateway]


class Disk:
    """Holds the gateway's waits for the disk while `open` is not set. `waits`: how many there were. `once`: lets one pass."""

    def __init__(self) -> None:
        self.open, self.waits, self._sync = threading.Event(), 0, ledger_file._sync
        self.once = False
        self.open.set()

    def sync(self, descriptor: int) -> None:
        self.waits += 1
        assert self.open.wait(10)
        if self.once:
            self.open.clear()
        self._sync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    found = Disk()
    monkeypatch.setattr(ledger_file, "_sync", found.sync)
    yield found
    found.open.set()


def test_nothing_is_confirmed_or_sent_before_the_disk_has_it(serve: Serve, disk: Disk) -> None:
    backend = ToyBackend(rate=0.0)
    gateway = serve(backend)
    with connect(gateway.address) as client:
        disk.open.clear()
        submitting = threading.Thread(target=client.submit, args=([request("a")],))
        submitting.start()
        until(lambda: len(backend.batches) == 1)  # the engines begin meanwhile
        time.sleep(0.1)
        assert submitting.is_alive()
        disk.open.set()
        submitting.join(10)
        disk.open.clear()
        waits, backend.rate = disk.waits, 1e9
        until(lambda: disk.waits > waits)
        with pytest.raises(TransportError, match="no trajectory for"):
            client.take(0.2, "raise")
        disk.open.set()
        assert [each.key for each in client.results(timeout=10)] == [("a", 0)]


def test_a_batch_takes_two_waits_for_the_disk(serve: Serve, disk: Disk) -> None:
    """One before its receipt and one before its samples; the acknowledgement of the batch before goes with the receipt."""
    with connect(serve(ToyBackend()).address) as client:
        client.generate([request("first", 4)])
        waits = disk.waits
        for turn in range(20):
            client.generate([request(f"r{turn}-{i}", 4) for i in range(4)])
        assert disk.waits - waits <= 3 * 20  # samples may come in two reports


def test_a_gateway_whose_disk_fails_confirms_nothing_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    backend = ToyBackend(rate=0.0)
    gateway = Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "l").start()
    client = connect(gateway.address)
    with monkeypatch.context() as broken:
        broken.setattr(ledger_file, "_sync", fail)
        with pytest.raises((StorageError, TransportError), match=r"Input/output error|has not answered"):
            client.submit([request("a")])
        with pytest.raises(StorageError, match=r"Input/output error; check the disk"):
            gateway.wait(10)
    client.close(acknowledge=False)
    with suppress(StorageError):
        gateway.stop()
    backend.rate = 1e9
    with Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "l") as again, connect(again.address, client_id="b") as other:
        assert len(other.generate([request("b")])) == 1


def test_a_ledger_that_was_synced_holds_what_was_recorded(tmp_path: Path) -> None:
    """Read from a copy of its files, as they are after a power cut."""
    ledger = Ledger(tmp_path / "l")
    asked = request("a")
    ledger.record_parts([Part("t", "batch", 0, [(asked, encode_request(asked))], True)])
    ledger.sync()
    for name in ("l", "l-wal"):
        shutil.copyfile(tmp_path / name, tmp_path / f"copy{name[1:]}")
    ledger.close()
    with sqlite3.connect(tmp_path / "copy") as copy:
        assert copy.execute("SELECT id, state FROM requests").fetchall() == [("a", ledger_file.QUEUED)]


def test_a_sync_that_failed_stays_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel reports what it has lost once."""
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    ledger = Ledger(tmp_path / "l")
    record(ledger, request("a"))
    with monkeypatch.context() as broken, pytest.raises(StorageError):
        broken.setattr(ledger_file, "_sync", fail)
        ledger.sync()
    with pytest.raises(StorageError, match="Input/output error"):
        ledger.sync()
    ledger.close()


def test_a_pause_is_answered_when_what_has_ended_is_on_disk(serve: Serve, disk: Disk) -> None:
    backend = Endless()
    gateway = serve(backend)
    with working(gateway, request("a")) as (_, control):
        pausing = threading.Thread(target=control.pause, args=("wait",))
        pausing.start()
        until(lambda: gateway.paused == "wait")
        disk.open.clear()
        backend.rate = 1e9
        until(lambda: gateway._ledger.counters.unique == 1)
        pausing.join(0.3)
        assert pausing.is_alive()
        disk.open.set()
        pausing.join(10)
        assert not pausing.is_alive()


def test_figures_count_what_is_on_disk(serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_router, "PROBE_S", 0.05)  # the gateway finds soon that the client is gone
    backend = Endless()
    gateway = serve(backend)
    with working(gateway, request("a")) as (client, control):
        client.close()
        until(lambda: control.status().figures["sessions"] == 1)
        backend.rate = 1e9
        until(lambda: gateway._ledger.counters.unique == 1)
        waits = disk.waits
        assert control.status().figures["unique"] == 1 and disk.waits == waits + 1


def test_figures_count_the_acknowledgements_that_were_given_before(serve: Serve, disk: Disk) -> None:
    """Also those that wait behind one which is not confirmed."""
    with connect(serve(ToyBackend()).address) as client:
        client.submit([request(f"r{i}") for i in range(3)])
        until(lambda: bool(client.status()) and len(client._pending.inbox) == 3)
        disk.open.clear()
        results = client.results(timeout=10)
        assert [next(results).sample for _ in range(3)] == [0] * 3
        found = list[object]()
        asking = threading.Thread(target=lambda: found.append(client.status()["acknowledged"]))
        asking.start()
        time.sleep(0.1)
        disk.open.set()
        asking.join(10)
        assert found == [2]


def test_a_push_does_not_wait_for_what_another_thread_acknowledges_later(
    serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with connect(serve(ToyBackend()).address) as client:
        monkeypatch.setattr(client._control, "push", lambda *args, **named: 1)
        client.submit([request(f"r{i}") for i in range(3)])
        until(lambda: bool(client.status()) and len(client._pending.inbox) == 3)
        disk.open.clear()
        results = client.results(timeout=10)
        for _ in range(2):
            next(results)
        pushing = threading.Thread(target=client.push_weights, args=(1, {}))
        pushing.start()
        time.sleep(0.1)
        next(results)  # acknowledges the second one
        disk.once = True
        disk.open.set()
        pushing.join(3)
        assert not pushing.is_alive() and not disk.open.is_set()
        disk.once = False
        disk.open.set()


def test_a_batch_that_was_refused_in_an_earlier_session_is_recorded_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses to forget the first part of it until the next session has sent that part again."""
    full, forget = [True], Ledger.forget_batches

    def refuse(ledger: Ledger, batches: Collection[tuple[str, str]]) -> None:
        if full:
            raise StorageError("disk full")
        forget(ledger, batches)

    monkeypatch.setattr(Ledger, "forget_batches", refuse)
    monkeypatch.setattr(message_router, "RETRY_S", 0.1)
    gateway = serve(ToyBackend())
    parts = [encode_request(request(name)) for name in ("a", "b")]
    for second in (b"no request", parts[1]):
        with closing(ClientSocket(zmq.Context.instance(), gateway.address, None, None, 1 << 20)) as raw:
            assert raw.send(messages.encode(messages.Hello("t", False, 1 << 20, "", 0)), 5)
            assert raw.send(messages.encode(messages.Submit("batch", 0, False, (parts[0],))), 5)
            _await(raw, messages.Submitted)
            if second in parts:
                full.clear()
                time.sleep(0.6)  # the gateway tries again meanwhile
            assert raw.send(messages.encode(messages.Submit("batch", 1, True, (second,))), 5)
            _await(raw, messages.Submitted if second in parts else messages.Refused)
    until(lambda: gateway._ledger.counters.unique == 2)


def _await(raw: ClientSocket, kind: type[messages.Message]) -> None:
    """Reads messages up to one of this kind."""
    deadline = time.monotonic() + 10
    while not any(isinstance(messages.decode(frames), kind) for frames in raw.receive(0.1)):
        assert time.monotonic() < deadline


def test_acknowledgements_that_nobody_waits_for_go_together(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are taken one by one, as they come, cost a few messages; figures and a manual acknowledgement do not wait."""
    gateway = serve(ToyBackend(rate=200.0))
    recorded, acknowledge = list[int](), gateway._ledger.acknowledge

    def record(client: str, keys: Sequence[tuple[str, int]]) -> int:
        recorded.append(len(keys))
        return acknowledge(client, keys)

    monkeypatch.setattr(gateway._ledger, "acknowledge", record)
    with connect(gateway.address) as client:
        client.submit([request(f"r{i}", 8) for i in range(8)])
        start, taken = time.monotonic(), list(client.results(timeout=10))
        most = 3 + (time.monotonic() - start) / 0.05
        assert len(taken) == 64 and len(recorded) <= most
        assert list(client.results()) == [] and client.status()["acknowledged"] == 64
    with connect(gateway.address, ack="manual") as client:
        took = [_acknowledged(client, client.generate([request(f"m{i}")])) for i in range(5)]
        assert min(took) < 0.04


def _acknowledged(client: RolloutClient, done: list[Trajectory]) -> float:
    """Seconds an acknowledgement takes."""
    start = time.monotonic()
    client.acknowledge(done)
    return time.monotonic() - start
