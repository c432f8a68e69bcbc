"""What tests of trainers' routes share: a live service, weights in directories, and requests in flight."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from http_parts import wait_for
from step_gate import StepGate

import blockroll
from blockroll.service.lifecycle import Service
from blockroll.trainer_bridge.client import ServiceControl

POLICY = "tiny-reasoner"


class Live:
    """A service, a client of it, and threads for requests that take a while."""

    def __init__(self, service: Service, folder: Path, gate: StepGate) -> None:
        assert service.record.http is not None
        self.url, self.address = service.record.http, service.address
        self.http = httpx.Client(base_url=self.url, timeout=60.0, limits=httpx.Limits(max_connections=64))
        self.threads = ThreadPoolExecutor(32)
        self.folder, self.gate, self._saved = folder, gate, 0

    def post(self, path: str, body: Any = None, status: int = 200, **options: Any) -> Any:
        """The JSON that a POST is answered with."""
        answer = self.http.post(path, json=body, **options)
        assert answer.status_code == status, (path, answer.status_code, answer.text)
        return answer.json() if answer.content and "json" in answer.headers["content-type"] else answer.text

    def get(self, path: str, **options: Any) -> Any:
        """The JSON that a GET is answered with."""
        answer = self.http.get(path, **options)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        return answer.json() if answer.content and "json" in answer.headers["content-type"] else answer.text

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events that a POST is answered with, without the last one, [DONE]. The first comes while no long sample can end."""
        with ExitStack() as until_first:
            until_first.enter_context(self.gate.closed(1))
            with self.http.stream("POST", path, json=body | {"stream": True}) as answer:
                assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.read()
                lines = answer.iter_lines()
                events = [next(lines)]
                until_first.close()
                events += lines
        events = [line.removeprefix("data: ") for line in events if line]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def start(self, path: str, body: Any, **options: Any) -> Future[Any]:
        """A POST in another thread."""
        return self.threads.submit(self.post, path, body, **options)

    @contextmanager
    def in_flight(self, path: str, *bodies: Any, **options: Any) -> Iterator[list[Future[Any]]]:
        """POSTs, of one sample each, that have tokens. The engine makes no step until the block ends, so none ends in it."""
        with self.gate.closed(len(bodies)) as waiting:
            started = [self.start(path, body, **options) for body in bodies]
            wait_for(lambda: waiting() == 1)
            yield started

    def figures(self) -> dict[str, Any]:
        """Figures of the service."""
        with ServiceControl(self.address) as control:
            return dict(control.status().figures)

    def version(self) -> int:
        """The weight version that serves."""
        return int(self.get("/weight_info")["weight_version"])

    def settled(self) -> None:
        """Nothing is lost: requested = unique + failed, once nothing is in flight."""
        end = time.monotonic() + 20
        while (figures := self.figures())["outstanding"]:
            assert time.monotonic() < end, figures
            time.sleep(0.02)
        assert figures["requested"] == figures["unique"] + figures["failed"] and figures["missing"] == 0

    def weights(self, change: Callable[[dict[str, Any]], None] = lambda state: None, **options: Any) -> Path:
        """A directory with the weights of the policy, a little changed."""
        import torch
        from safetensors.torch import load_file, save_file

        self._saved += 1
        policy = blockroll.load_policy(POLICY)
        with torch.no_grad():
            policy.state_dict()["model.norm.weight"].mul_(1 + 0.01 * self._saved)
        path = Path(blockroll.save_policy(policy, self.folder / f"weights-{self._saved}", **options))
        if (whole := path / "model.safetensors").exists():
            state = load_file(whole)
            change(state)
            save_file(state, whole)
        return path


def tokens(count: int = 300, **more: Any) -> dict[str, Any]:
    """A body of `/inference/v1/generate` for so many tokens."""
    params = {"max_tokens": count, "ignore_eos": True, "logprobs": 1, "seed": 11, **more}
    return {"token_ids": [5, 6, 7], "sampling_params": params}
