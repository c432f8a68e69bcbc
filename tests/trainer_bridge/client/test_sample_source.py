"""A search through a gateway gives what it gives in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from bridge_parts import ToyBackend

from blockroll.cli import searching
from blockroll.model.tasks import Task, make_tasks
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.backend import Completed
from blockroll.rollout.engine import Engine
from blockroll.rollout.search.candidates import Question
from blockroll.rollout.search.config import SearchConfig
from blockroll.rollout.search.driver import search
from blockroll.rollout.search.engine_source import EngineSource
from blockroll.rollout.types import RolloutRequest, SamplingParams
from blockroll.trainer_bridge.client import RequestRefused, connect
from blockroll.trainer_bridge.client.sample_source import ServiceSource
from blockroll.trainer_bridge.gateway import Gateway

PARAMS = SamplingParams(sampler="coupled", temperature=0.8, max_tokens=64)


class EngineBackend(ToyBackend):
    """One real engine behind a gateway, in the gateway's process."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(expected={})
        self._engine, self._epochs = engine, dict[str, int]()
        self.cancelled: list[str] = []

    def submit(self, batch: Sequence[RolloutRequest], epoch: int, clients: Sequence[str] | None = None) -> None:
        for request in batch:
            self._epochs[request.id] = epoch
            self._engine.add(request)

    def poll(self, timeout: float) -> list[Completed]:
        return [Completed(self._epochs[t.request_id], t.request_id, t) for t in self._engine.step()]

    def cancel(self, request_ids: Sequence[str]) -> None:
        self.cancelled += request_ids
        self._engine.cancel(request_ids)


@pytest.fixture(scope="module")
def policy():
    return Engine("tiny-reasoner", max_batch=1, device="cpu").policy


def questions(policy, tasks: Sequence[Task]) -> list[Question]:
    return [Question(task.id, tuple(encode_prompt(policy.tokenizer, task.prompt)), task.prompt) for task in tasks]


@pytest.mark.parametrize("fields", [
    {"method": "best_of_n"}, {"method": "self_consistency"}, {"method": "beam", "width": 2},
    {"method": "markovian_rsa", "aggregate": 2, "rounds": 1, "tail": 16, "aggregation": "{candidates}\n{question}"},
    {"method": "majority", "budget_tokens": 150},
], ids=lambda fields: str(fields["method"]))  # fmt: skip
def test_a_service_gives_the_answers_of_one_process(fields: dict, policy, serve: Callable[..., Gateway]) -> None:
    config, asked = SearchConfig(samples=4, seed=2, **fields), questions(policy, make_tasks("heldout", 3, 4))
    here = search(EngineSource(Engine(policy, max_batch=4)), asked, config, PARAMS)
    gateway = serve(EngineBackend(Engine(policy, max_batch=16)))
    with connect(gateway.address, client_id="search") as client:
        source = ServiceSource(client, policy.tokenizer, policy.config.max_position_embeddings)
        for _ in range(2):  # a client may search again
            there = search(source, asked, config, PARAMS)
            for one, other in zip(here, there, strict=True):
                assert one.verdict == other.verdict
                assert (one.spent.tokens, one.spent.forwards, one.spent.samples) == (
                    other.spent.tokens, other.spent.forwards, other.spent.samples)  # fmt: skip
        assert client.delivery["missing"] == client.delivery["failed"] == 0


def test_a_budget_of_seconds_cancels_at_the_service(policy, serve: Callable[..., Gateway]) -> None:
    backend = EngineBackend(Engine(policy, max_batch=1))
    gateway = serve(backend)
    with connect(gateway.address, client_id="search") as client:
        source = ServiceSource(client, policy.tokenizer, policy.config.max_position_embeddings)
        tasks = make_tasks("heldout", 1, 4)
        (result,) = search(source, questions(policy, tasks), SearchConfig(samples=500, budget_seconds=0.5), PARAMS)
        assert result.verdict.reason == "budget_seconds" and result.spent.cancelled > 0
        assert result.spent.samples == len(result.verdict.candidates) < 500
        (after,) = search(source, questions(policy, make_tasks("heldout", 1, 9)), SearchConfig(samples=2), PARAMS)
        assert after.spent.samples == 2
    assert len(backend.cancelled) >= result.spent.cancelled - 2  # some may have ended before they were


def test_what_a_service_refuses_ends_the_search(serve: Callable[..., Gateway], policy) -> None:
    gateway = serve(ToyBackend(longest=4))
    with connect(gateway.address, client_id="search") as client:
        source = ServiceSource(client, policy.tokenizer, policy.config.max_position_embeddings)
        with pytest.raises(RequestRefused, match="more than 4"):
            search(source, questions(policy, make_tasks("heldout", 1, 4)), SearchConfig(samples=2), PARAMS)


def test_the_command_reaches_a_service(serve: Callable[..., Gateway], policy, tmp_path: Path) -> None:
    gateway = serve(EngineBackend(Engine(policy, max_batch=16)))
    lines = {}
    for name, address in (("here", None), ("there", gateway.address)):
        searching.sample("tiny-reasoner", tasks=2, samples=3, sampler="coupled", max_tokens=64, output=tmp_path / name,
                         address=address, device="cpu")  # fmt: skip
        lines[name] = [line.partition('"seconds"')[0] for line in (tmp_path / name).read_text().splitlines()]
    assert len(lines["here"]) == 2 and lines["here"] == lines["there"]
