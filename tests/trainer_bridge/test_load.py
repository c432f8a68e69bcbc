"""What the gateway alone carries: requests recorded, and finished samples written, sent and acknowledged, per second.

As a script it serves a gateway whose engines finish samples of 200 tokens at once.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bridge_parts import Served, ToyBackend, make_trajectory, request

from blockroll.rollout.backend import Completed
from blockroll.trainer_bridge.client import connect
from blockroll.trainer_bridge.gateway import Gateway

REQUESTS, SAMPLES, TOKENS = 100_000, 16_000, 200


@pytest.mark.slow
def test_a_hundred_thousand_requests_at_once(tmp_path: Path) -> None:
    """Recorded at 3,000 per second and more; the gateway's memory does not grow with them."""
    served = Served(tmp_path / "ledger", rate=1e-6)
    gateway = psutil.Process(served.process.pid)
    try:
        with connect(served.address) as client:
            client.submit([request("first")])
            before, mine, peak = gateway.memory_info().rss, psutil.Process().memory_info().rss, 0
            start = time.monotonic()
            client.submit([request(f"r{i}") for i in range(REQUESTS)])
            while client.status()["requested"] < REQUESTS + 1:
                peak = max(peak, gateway.memory_info().rss)
                time.sleep(0.05)
            seconds = time.monotonic() - start
            grown, client_grown = (peak - before) / 1e6, (psutil.Process().memory_info().rss - mine) / 1e6
    finally:
        served.kill()
    print(f"{REQUESTS / seconds:,.0f} requests/s; gateway + {grown:.0f} MB, client + {client_grown:.0f} MB")
    assert REQUESTS / seconds >= 3000 and grown < 100 and client_grown < 200


class AtOnce(ToyBackend):
    """Its samples have 200 tokens and are made before they are asked for."""

    made = replace(
        make_trajectory(request("x", max_tokens=1), 0), tokens=list(range(TOKENS)), logprobs=np.full(TOKENS, -0.5, np.float32),
        behavior_logprobs=np.full(TOKENS, -0.5, np.float32), versions=np.zeros(TOKENS, np.int32),
        from_draft=np.ones(TOKENS, bool), forwards=30)  # fmt: skip

    def poll(self, timeout: float) -> list[Completed]:
        if not self._work:
            time.sleep(min(timeout, 0.002))
        work = [self._work.popleft() for _ in range(min(64, len(self._work)))]
        return [Completed(epoch, asked.id, replace(self.made, request_id=asked.id, sample=n)) for epoch, asked, n in work]


@pytest.mark.slow
def test_finished_samples_per_second(tmp_path: Path) -> None:
    """1,000 samples of 200 tokens per second and more: in the ledger, sent, acknowledged."""
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path / "ledger")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        with connect(process.stdout.readline().strip()) as client:
            asked = [request(f"r{i}", samples=16) for i in range(SAMPLES // 16)]
            start = time.monotonic()
            found = client.generate(asked)
            client.acknowledge(found)
            seconds = time.monotonic() - start
            spent = sum(psutil.Process(process.pid).cpu_times()[:2])
            status = client.status()
    finally:
        process.kill()
        process.wait()
    assert len({trajectory.key for trajectory in found}) == SAMPLES == status["unique"]
    print(f"{SAMPLES / seconds:,.0f} samples/s; the gateway took {spent:.1f} s of CPU time")
    assert SAMPLES / seconds >= 1000


if __name__ == "__main__":
    with Gateway(AtOnce(), "tcp://127.0.0.1:*", sys.argv[1], max_in_flight=20_000) as gateway:
        print(gateway.address, flush=True)
        gateway.wait()
