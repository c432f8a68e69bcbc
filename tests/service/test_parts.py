"""The parts of a service that need no engine: its runtime file, its log lines, the number of engines that a queue wants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blockroll.errors import ClusterError, ConfigError, InvalidInput, StorageError
from blockroll.service import detached, logs, runtime_file
from blockroll.service.autoscaler import Decision
from blockroll.service.config import Engines
from blockroll.service.located import located
from blockroll.service.of_run import service_of
from blockroll.service.runtime_file import ServiceRecord
from blockroll.settings import parse
from blockroll.trainer_bridge.trainers.grpo.attachment import attach
from blockroll.trainer_bridge.trainers.grpo.config import GrpoConfig

HOLD = """
import sys, time
from pathlib import Path
from blockroll.service import runtime_file
with runtime_file.held(Path(sys.argv[1]), runtime_file.ServiceRecord(7, "ready", "tcp://127.0.0.1:1")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_runtime_file_lives_as_long_as_its_process(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    assert runtime_file.read(ledger) is None
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(ledger)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    found = runtime_file.read(ledger)
    assert found is not None and (found.pid, found.address, found.state) == (7, "tcp://127.0.0.1:1", "ready")
    with pytest.raises(StorageError, match=r"is up at tcp://127.0.0.1:1 \(process 7\)"):
        with runtime_file.held(ledger, ServiceRecord(8)):
            pass
    process.kill()
    process.wait()
    process.stdout.close()
    assert runtime_file.path_beside(ledger).exists() and runtime_file.read(ledger) is None
    with runtime_file.held(ledger, ServiceRecord(os.getpid(), log="a" * 100)) as held:
        held.update(log=None, state="ready", address="x")
        assert runtime_file.read(ledger) == held.record
    assert list(tmp_path.iterdir()) == []


READ = """
import sys
from pathlib import Path
from blockroll.service import runtime_file
ledger, seen = Path(sys.argv[1]), set()
print("reads", flush=True)
while not (ledger.parent / "stop").exists():
    found = runtime_file.read(ledger)
    seen.add(-1 if found is None else found.pid)
print(*sorted(seen))
"""


def test_readers_neither_hinder_a_start_nor_meet_a_stale_record(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    stale = json.dumps({"pid": 77, "state": "ready", "address": "tcp://127.0.0.1:1"})
    readers = [subprocess.Popen([sys.executable, "-c", READ, str(ledger)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in readers:
            assert process.stdout is not None and process.stdout.readline() == "reads\n"
        for _ in range(1000):
            runtime_file.path_beside(ledger).write_text(stale)
            with runtime_file.held(ledger, ServiceRecord(8)):
                pass
    finally:
        (tmp_path / "stop").touch()
        said = [process.communicate(timeout=10)[0] for process in readers]
    assert all(set(text.split()) <= {"-1", "0", "8"} for text in said), said


def test_a_start_that_is_delayed_shows_no_stale_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, seen, empty = tmp_path / "ledger.sqlite", [], os.ftruncate
    runtime_file.path_beside(ledger).write_text(json.dumps({"pid": 77, "state": "ready"}))

    def look_and_empty(descriptor: int, size: int) -> None:
        seen.append(runtime_file.read(ledger))
        empty(descriptor, size)

    monkeypatch.setattr(os, "ftruncate", look_and_empty)
    with runtime_file.held(ledger, ServiceRecord(8)):
        assert seen == [None]
        found = runtime_file.read(ledger)
        assert found is not None and found.pid == 8


def test_what_is_no_process_of_a_service_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    for pid in (0, 1, -1):
        with pytest.raises(ClusterError, match=f"names process {pid}, which is no service"):
            detached.end(pid, tmp_path / "ledger.sqlite")


def test_down_waits_for_a_service_that_has_not_written_its_record(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    with runtime_file.held(ledger, ServiceRecord(8)) as held:
        os.truncate(held.path, 0)
        threading.Timer(0.2, held.update, kwargs={"state": "ready"}).start()
        found = runtime_file.read_written(ledger, 10)
        assert found is not None and found.pid == 8
        os.truncate(held.path, 0)
        with pytest.raises(StorageError, match="has not written which it is; try again"):
            runtime_file.read_written(ledger, 0.1)


@pytest.mark.parametrize("command", [[], ["--log-level", "error"]], ids=" ".join)
def test_warnings_of_every_command_have_the_format_of_log_lines(command: list[str]) -> None:
    program = ("import sys, logging; from blockroll import cli\n"
               "def status(*a, **k): logging.getLogger('blockroll.rollout').warning('an engine is replaced: %s', 'x')\n"
               "from blockroll.service import commands; commands.status = status\n"
               f"sys.argv = ['blockroll', *{command!r}, 'status', 'x']; cli.main()")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if command:
        assert done.stderr == ""
    else:
        assert done.stderr.endswith(" WARNING blockroll.rollout: an engine is replaced: x\n") and done.stderr[:2] == "20"


def test_log_lines_as_json_in_a_file(tmp_path: Path) -> None:
    import logging

    try:
        logs.configure("info", "json", str(tmp_path / "log" / "service.log"))
        logging.getLogger("blockroll.trainer_bridge.gateway").info("lease %d: %d requests", 3, 20)
        logging.getLogger("blockroll.service").debug("unseen")
    finally:
        logs.configure("warning")
        logging.getLogger("blockroll").propagate = True
    [line] = (tmp_path / "log" / "service.log").read_text().splitlines()
    entry = json.loads(line)
    assert entry.pop("time")[:2] == "20"
    assert entry == {"level": "info", "logger": "blockroll.trainer_bridge.gateway", "message": "lease 3: 20 requests"}
    with pytest.raises(InvalidInput, match="unknown level 'loud'"):
        logs.configure("loud")


def test_more_engines_at_once_and_fewer_after_a_while() -> None:
    decision = Decision(Engines(min=1, max=8, batch=10, idle_seconds=60, oversubscribe=True))
    assert decision.engines(0, 1, now=0) == 1
    assert decision.engines(35, 1, now=2) == 4
    assert decision.engines(1000, 4, now=4) == 8
    assert decision.engines(25, 8, now=10) == 8  # three would do, for six seconds so far
    assert decision.engines(5, 8, now=40) == 8
    assert decision.engines(5, 8, now=65) == 3  # the most that any look of this while asked for
    assert decision.engines(5, 3, now=70) == 3
    assert decision.engines(31, 3, now=75) == 4
    assert decision.engines(0, 4, now=100) == 4 and decision.engines(0, 4, now=200) == 1


def test_a_run_has_one_service_and_keeps_to_it(tmp_path: Path) -> None:
    run = {"output": "x", "policy": "tiny-reasoner"}
    for more, said in (({"address": "tcp://127.0.0.1:1", "service": {}}, "address: tcp://127.0.0.1:1 beside a section"),
                       ({"keys": "k"}, "keys: k without an address")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            parse({**run, **more}, GrpoConfig, "run")
    config = parse({**run, "service": {"engines": {"count": 1}}}, GrpoConfig, "run")
    with service_of(config, "tcp://127.0.0.1:5555")(tmp_path / "unused") as endpoint:
        assert endpoint.shared and endpoint.address == "tcp://127.0.0.1:5555" and endpoint.keys is None
    with pytest.raises(InvalidInput, match="address: 'tcp://10.0.0.1:5' is not an address that can be used"):
        service_of(config, "tcp://10.0.0.1:5")
    with pytest.raises(InvalidInput, match="--keys: k without --address"):
        service_of(config, keys="k")

    assert attach(tmp_path, shared=False, resume=False).client == "grpo"
    began = attach(tmp_path, shared=True, resume=False)
    assert began.version is None and began.client == f"grpo-{began.prefix[:-1]}"
    known = began.at(5, tmp_path)
    assert attach(tmp_path, shared=True, resume=True) == known and known.version == 5
    with pytest.raises(ConfigError, match="began with a service that ran already and is to go on with its own"):
        attach(tmp_path, shared=False, resume=True)
    attach(tmp_path, shared=False, resume=False)  # another run in the same directory, at a service of its own
    assert attach(tmp_path, shared=False, resume=True).client == "grpo"


def test_time_is_not_lost_to_stale_descriptors(tmp_path: Path) -> None:
    """Reading many times while a service holds the file leaves no descriptor open."""
    ledger = tmp_path / "ledger.sqlite"
    before = len(os.listdir("/proc/self/fd"))
    with runtime_file.held(ledger, ServiceRecord(1, started=time.time())):
        for _ in range(50):
            runtime_file.read(ledger)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_service_is_named_by_its_configuration(tmp_path: Path) -> None:
    file, ledger = tmp_path / "service.yaml", tmp_path / "ledger.sqlite"
    file.write_text(f"policy: tiny-reasoner\ndelivery: {{ledger: {ledger}}}\n")
    assert located("tcp://127.0.0.1:9", "k") == ("tcp://127.0.0.1:9", "k")
    with pytest.raises(ClusterError, match="no service of it is up; run `blockroll up"):
        located(str(file), None)
    with runtime_file.held(ledger, ServiceRecord(7, address="tcp://127.0.0.1:1")) as held:
        with pytest.raises(ClusterError, match="is still starting"):
            located(str(file), None)
        held.update(state="ready", keys="made")
        assert located(str(file), None) == ("tcp://127.0.0.1:1", "made")
        assert located(str(file), "mine") == ("tcp://127.0.0.1:1", "mine")
    with pytest.raises(ConfigError, match="none.yaml"):
        located(str(tmp_path / "none.yaml"), None)
