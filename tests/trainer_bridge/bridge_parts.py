"""A small in-process backend for tests of the bridge: the engine is absent, everything else is real.

A sample is a function of (weights, prompt, seed, sample number), so that a test can say what must arrive. Run as a script
it serves a gateway in a process of its own, to be killed, or to kill itself at a named moment of its first weight push.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from blockroll.errors import ClusterError
from blockroll.rollout.backend import Completed
from blockroll.rollout.types import RolloutRequest, SamplingParams, StepTrace, Trajectory
from blockroll.trainer_bridge.client import RolloutClient, ServiceControl, connect
from blockroll.trainer_bridge.client.host_weights import HostWeights
from blockroll.trainer_bridge.gateway import Gateway
from blockroll.trainer_bridge.gateway.batch_parts import Part
from blockroll.trainer_bridge.gateway.kept_versions import KeptVersions, VersionFile
from blockroll.trainer_bridge.gateway.ledger import Ledger
from blockroll.trainer_bridge.wire.manifest import Manifest
from blockroll.trainer_bridge.wire.records import encode_request

EXPECTED: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed.weight": ("float32", (32, 8)), "scale": ("float32", ()), "half": ("float16", (3, 5)),
    "none": ("float32", (0, 4))}


def request(name: str, samples: int = 1, prompt: Sequence[int] = (1, 2, 3), seed: int = 7,
            **params: object) -> RolloutRequest:
    return RolloutRequest(id=name, prompt_tokens=tuple(prompt), samples=samples, seed=seed,
                          params=SamplingParams(**{"max_tokens": 20, **params}))  # type: ignore[arg-type]


def make_trajectory(asked: RolloutRequest, sample: int, version: int = 0) -> Trajectory:
    """What the backend generates for this sample."""
    text = repr((asked.prompt_tokens, asked.seed, sample, version)).encode()
    rng = np.random.default_rng(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    count = int(rng.integers(1, asked.params.max_tokens + 1))
    logprobs = -rng.random(count, np.float32)
    steps = tuple(StepTrace(len(asked.prompt_tokens) - 1 + i, 0, 0, -1, 0, 1) for i in range(count))
    rows = len(asked.prompt_tokens) + count - 1
    return Trajectory(
        request_id=asked.id, sample=sample, prompt_tokens=asked.prompt_tokens,
        tokens=rng.integers(0, 32, count).tolist(), logprobs=logprobs, behavior_logprobs=logprobs * np.float32(0.5),
        versions=np.full(count, version, np.int32), from_draft=rng.random(count) < 0.5, finish_reason="length",
        forwards=count, trace=steps, support_logmass=logprobs.copy() if asked.params.top_k else None,
        routed_experts=rng.integers(0, 16, (rows, 2)).astype(np.int16) if asked.params.routed_experts else None)


def assert_same(a: Trajectory, b: Trajectory) -> None:
    """Equal in every field, arrays bit for bit."""
    for name in Trajectory.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), name
        else:
            assert x == y and type(x) is type(y), name


def record(ledger: Ledger, *asked: RolloutRequest, client: str = "t", batch: str = "b", part: int = 0,
           final: bool = True) -> tuple[list[int], list[tuple[int, str]]]:
    """A batch, or part of one, recorded as a gateway would."""
    return ledger.record_parts([Part(client, batch, part, [(r, encode_request(r)) for r in asked], final)])[0]


def done(epoch: int, asked: RolloutRequest, sample: int, version: int = 0) -> Completed:
    """What an engine hands back for a sample."""
    return Completed(epoch, asked.id, make_trajectory(asked, sample, version))


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something that happens soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextmanager
def working(gateway: Gateway, *asked: RolloutRequest) -> Iterator[tuple[RolloutClient, ServiceControl]]:
    """A client of the gateway and a control session, once the backend has begun these requests, one batch."""
    with connect(gateway.address, client_id="t") as client, ServiceControl(gateway.address) as control:
        client.submit(asked)
        until(lambda: gateway._driver.in_flight > 0)
        yield client, control


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"embed.weight": rng.random((32, 8), np.float32), "scale": np.array(seed + 0.5, np.float32),
            "half": rng.random((3, 5)).astype(np.float16), "none": np.zeros((0, 4), np.float32)}


def make_manifest(version: int, parent: int, tensors: Mapping[str, Any]) -> Manifest:
    """The manifest a client announces these tensors with."""
    return HostWeights.copy_of(tensors).manifest(version, parent)


def name_weights(arrays: Mapping[str, np.ndarray]) -> str:
    """Short name of the content of some weights."""
    content = hashlib.blake2b(digest_size=8)
    for name, array in sorted(arrays.items()):
        content.update(repr((name, array.dtype, array.shape)).encode() + array.tobytes())
    return content.hexdigest()


class ToyBackend:
    """Finishes `rate` samples per second, in a scrambled order; refuses prompts longer than `longest`."""

    def __init__(self, rate: float = 1e9, longest: int = 64, repeat: bool = False, expected: Mapping[
            str, tuple[str, tuple[int, ...]]] = EXPECTED) -> None:
        self.version, self.rate, self.longest, self.repeat = 0, rate, longest, repeat
        self.expected = dict(expected)
        self.arrays: dict[str, np.ndarray] = {}
        self.batches: list[tuple[int, list[str]]] = []
        self.broken = ""
        self._work: deque[tuple[int, RolloutRequest, int]] = deque()
        self._allowance, self._last = 0.0, time.monotonic()
        self.in_flight_at_commit = -1

    def submit(self, batch: Sequence[RolloutRequest], epoch: int, clients: Sequence[str] | None = None) -> None:
        if self.broken:
            raise ClusterError(self.broken)
        self.batches.append((epoch, [r.id for r in batch]))
        for asked in batch:
            self._work.extend((epoch, asked, i) for i in reversed(range(asked.samples)))

    def poll(self, timeout: float) -> list[Completed]:
        time.sleep(min(timeout, 0.002))
        now = time.monotonic()
        self._allowance = min(self._allowance + (now - self._last) * self.rate, 64.0)
        self._last = now
        found = []
        while self._work and self._allowance >= 1.0:
            self._allowance -= 1.0
            self._work.rotate(5)
            epoch, asked, sample = self._work.popleft()
            if len(asked.prompt_tokens) > self.longest:
                self._work = deque(w for w in self._work if w[1].id != asked.id)
                why = f"prompt_tokens: {len(asked.prompt_tokens)} tokens are more than {self.longest}; shorten the prompt"
                found.append(Completed(epoch, asked.id, error=why))
                continue
            found += [Completed(epoch, asked.id, make_trajectory(asked, sample, self.version))] * (1 + self.repeat)
        return found

    def revoke(self, epoch: int) -> None:
        """A sample in flight under this epoch comes all the same: late."""

    def cancel(self, request_ids: Sequence[str]) -> None:
        self._work = deque(w for w in self._work if w[1].id not in request_ids)

    def commit_weights(self, version: int, arrays: Mapping[str, np.ndarray]) -> None:
        if self.broken:
            raise ClusterError(self.broken)
        self.in_flight_at_commit = len(self._work)
        self.arrays, self.version = dict(arrays), version

    def expected_weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return self.expected

    def stats(self) -> dict[str, float | int | str]:
        return {"queued": len(self._work), "rate": self.rate, "weights": name_weights(self.arrays)}

    def close(self) -> None:
        self._work.clear()


class Endless(ToyBackend):
    """Its work never ends, and it can be interrupted, which takes its time."""

    def __init__(self) -> None:
        super().__init__(rate=1e-9)

    def hold(self, held: bool) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        pass

    def label_version(self, version: int) -> None:
        self.version = version

    def abort(self, request_ids: object = None) -> None:
        pass


class Served:
    """A gateway process on a fixed port, to be killed and started again."""

    def __init__(self, ledger: Path, rate: float, die: str = "") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self._command = [sys.executable, __file__, self.address, str(ledger)]
        self.start(rate, die)

    def start(self, rate: float | None = None, die: str = "") -> None:
        self._rate = self._rate if rate is None else rate
        self.process = subprocess.Popen([*self._command, "--rate", str(self._rate), "--die", die],
                                        stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == self.address

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def die_at(moment: str) -> None:
    """Kills this process before or after the first call of what the moment is called for."""
    owner, name, when = {
        "sealing": (VersionFile, "seal", "before"), "sealed": (VersionFile, "seal", "after"),
        "taken": (ToyBackend, "commit_weights", "after"), "recording": (Ledger, "record_version", "before"),
        "recorded": (Ledger, "record_version", "after"), "swept": (KeptVersions, "sweep", "after"),
    }[moment]
    call = getattr(owner, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        if when == "after":
            call(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("ledger")
    parser.add_argument("--rate", type=float, default=1e9)
    parser.add_argument("--die", default="")
    args = parser.parse_args()
    with Gateway(ToyBackend(rate=args.rate), args.address, args.ledger) as gateway:
        if args.die:
            die_at(args.die)
        print(gateway.address, flush=True)
        gateway.wait()


if __name__ == "__main__":
    main()
