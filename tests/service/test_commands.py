"""up, status, scale, down and logs, as commands: what scripts may rely on."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.request import urlopen

sys.path.insert(0, str(Path(__file__).parent))

from service_parts import Commands

from blockroll.service import runtime_file

CONFIG = """
policy: tiny-reasoner
engines: {count: 1, num_cpus: 0.5, batch: 4}
delivery: {ledger: ledger.sqlite, keys: keys, bind: 'tcp://127.0.0.1:*'}
metrics: {port: 0}
"""
CLIENT = """
import sys
import blockroll
with blockroll.connect(sys.argv[1], client_id="c", keys="keys") as client:
    params = blockroll.SamplingParams(max_tokens=4)
    found = client.generate([blockroll.RolloutRequest(f"r{i}", (5, 6, 7), params) for i in range(6)], timeout=60)
print(len(found))
"""


def test_the_life_of_a_service_in_commands(tmp_path: Path) -> None:
    """Its Ray is its own, also where the machine belongs to a cluster."""
    commands, config = Commands(tmp_path), tmp_path / "service.yaml"
    commands.environment["RAY_ADDRESS"] = "127.0.0.1:1"
    config.write_text(CONFIG)
    said = commands.run("down", config)
    assert said == "no service of ledger.sqlite runs\n"
    assert "no service of ledger.sqlite runs; start it with `blockroll up`" in commands.run("status", config, status=2)

    said = commands.run("up", config, "--detach")
    try:
        found = commands.status(config)
        assert said.startswith(f"the service of tiny-reasoner is up at {found['address']} (process ") and said.count("\n") == 1
        assert list(found) == ["address", "http", "version", "engines", "requested", "unique", "in_flight", "restarts"]
        [engine] = found["engines"]
        assert list(engine) == ["id", "pid", "node", "device", "state", "version", "tokens_per_s"]
        assert found["http"] is None and (engine["state"], engine["device"], found["version"]) == ("idle", "cpu", 0)
        assert f"is up at {found['address']} (process " in commands.run("up", config, status=2)
        assert commands.run(found["address"], program=CLIENT) == "6\n"
        found = commands.status(config)
        assert found["requested"] == found["unique"] == 6 and found["in_flight"] == 0
        assert commands.run("scale", config, 1).startswith("the service has 1 engine;")
        assert "engines: 99 engines of 0.5 cores each on a machine with " in commands.run("scale", config, 99, status=2)
        assert "6 requested, 6 recorded, 0 failed, 0 to come" in commands.run("status", config)
        assert "lease 1: 6 requests" in commands.run("logs", config)
        record = runtime_file.read(tmp_path / "ledger.sqlite")
        assert record is not None and record.metrics is not None
        lines = urlopen(record.metrics, timeout=20).read().decode().splitlines()
        assert {"blockroll_up 1.0", "blockroll_requested_total 6.0", "blockroll_unique_total 6.0"} <= set(lines)
        assert any(line.startswith("blockroll_engine_version{") for line in lines)
    finally:
        said = commands.run("down", config)
        assert said.startswith("the service is down after ")
        assert said.endswith(" s; nothing in ledger.sqlite is unfinished or not fetched\n")
    commands.wait_until_none_is_left()
    config.write_text(CONFIG.replace("tiny-reasoner", "tiny-reasoner-terse"))
    assert "belongs to another policy (tiny-reasoner, " in commands.run("up", config, status=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "ledger.sqlite", "service.log", "service.yaml"]
    assert (tmp_path / "keys" / "control.key").stat().st_mode & 0o77 == 0
