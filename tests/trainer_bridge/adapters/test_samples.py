"""Prompts, rewards and advantages in TRL's forms, and a rollout worker by itself."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bridge_parts import ToyBackend, until
from engine_backend import EngineBackend

pytest.importorskip("trl")

from trl.experimental.async_grpo import AsyncGRPOConfig
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

import blockroll
from blockroll.errors import InvalidInput, TransportError
from blockroll.trainer_bridge.adapters.async_grpo import RolloutWorker, WeightTransfer
from blockroll.trainer_bridge.adapters.policy_model import load_model, load_tokenizer
from blockroll.trainer_bridge.adapters.samples import advantages, completion, prompt_tokens, reward, sampling_params
from blockroll.trainer_bridge.adapters.weight_sync import WeightSync
from blockroll.trainer_bridge.client import RolloutClient
from blockroll.trainer_bridge.gateway import Gateway

POLICY = "tiny-reasoner-terse"
ROWS = [{"prompt": f"Q:{i}+1\nS:", "number": i} for i in range(6)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutClient]:
    gateway = Gateway(EngineBackend(POLICY), "tcp://127.0.0.1:*", tmp_path_factory.mktemp("service") / "ledger.sqlite").start()
    with blockroll.connect(gateway.address) as found:
        yield found
    gateway.stop()


def args(output: Path, **options: Any) -> AsyncGRPOConfig:
    return AsyncGRPOConfig(str(output), use_cpu=True, bf16=False, report_to=[],
                           **{"num_generations": 4, "max_completion_length": 12, "max_inflight_tasks": 8, **options})  # fmt: skip


def worker(client: RolloutClient, output: Path, reward_func: Any, rows: Any = ROWS, **options: Any) -> RolloutWorker:
    made = RolloutWorker(client, rows, reward_func, load_tokenizer(POLICY), args(output, **options))
    made.update_model_version(1)
    made.start()
    return made


def test_a_worker_delivers_whole_groups_with_what_their_tokens_were_drawn_by(client: RolloutClient, tmp_path: Path) -> None:
    def longer(completions: list[str], number: list[int], weight_versions: list[list[int]], **_: Any) -> list[float]:
        assert len(set(number)) == 1 and all(weight_versions)
        return [float(len(text)) for text in completions]

    made = worker(client, tmp_path, longer)
    found = [made.rollout_buffer.get(timeout=60) for _ in range(28)]  # more groups than rows
    made.check_health(60.0)
    made.stop()
    assert not made._thread.is_alive()
    groups: dict[int, list[RolloutSample]] = {}
    for sample in found:
        groups.setdefault(sample.group_id, []).append(sample)
        prompt = len(sample.input_ids) - int(sample.completion_mask.sum())
        assert (sample.completion_mask[:prompt] == 0).all() and (sample.completion_mask[prompt:] == 1).all()
        assert (sample.old_log_probs[:prompt] == 0).all() and (sample.old_log_probs[prompt:] <= 0).all()
        assert sample.model_version == 1 and sample.metrics["reward"] == sample.metrics["rewards/longer"]
    whole = {number: group for number, group in groups.items() if len(group) == 4}
    assert len(whole) == 7 and max(groups) >= 6
    for group in whole.values():
        assert len({tuple(s.input_ids.tolist()) for s in group}) > 1  # no seed is used twice
        assert abs(sum(s.advantage for s in group)) < 1e-4
    tokens, forwards = made.metrics_queue.get_nowait()["rollout/tokens_per_forward"]
    assert tokens >= forwards > 0
    until(lambda: client.status()["in_flight"] == 0)


def test_a_worker_makes_no_more_than_may_be_in_flight(client: RolloutClient, tmp_path: Path) -> None:
    made = worker(client, tmp_path, lambda completions, **_: [0.0] * len(completions))
    deadline = time.monotonic() + 60
    while made.rollout_buffer.qsize() < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert made.rollout_buffer.qsize() == 8 and not made._groups
    made.rollout_buffer.get_nowait()
    for _ in range(3):
        made.rollout_buffer.get_nowait()
    while made.rollout_buffer.qsize() < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert made.rollout_buffer.qsize() == 8
    made.stop()


def test_samples_in_flight_go_on_under_a_new_version(client: RolloutClient, tmp_path: Path) -> None:
    seen: list[list[list[int]]] = []

    def watching(completions: list[str], weight_versions: list[list[int]], **_: Any) -> list[float]:
        seen.append(weight_versions)
        return [0.0] * len(completions)

    model = load_model(POLICY)
    transfer = WeightTransfer(client)
    transfer.attach(model)
    transfer.send_weights(model.named_parameters())
    first = client.version
    made = worker(client, tmp_path, watching, max_completion_length=192, temperature=3.0)
    while made.rollout_buffer.qsize() < 4:
        transfer.send_weights(model.named_parameters())
    found = [made.rollout_buffer.get_nowait() for _ in range(4)]
    made.stop()
    made.check_health(60.0)
    assert any(len(set(versions)) > 1 for versions in seen[0])
    for sample, versions in zip(found, seen[0], strict=True):
        assert sorted(versions) == versions and sample.model_version == 1 + versions[0] - first


def test_what_ends_a_worker_is_raised_in_the_trainer(client: RolloutClient, tmp_path: Path) -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("answer")

    for options, error in (({"reward_func": broken}, KeyError), ({"reward_func": lambda **_: [1.0]}, InvalidInput),
                           ({"reward_func": broken, "rows": []}, InvalidInput)):  # fmt: skip
        made = worker(client, tmp_path, **options)
        made._thread.join(60)
        with pytest.raises(error):
            made.check_health(60.0)
        made.stop()
    silent = RolloutWorker(client, ROWS, broken, load_tokenizer(POLICY), args(tmp_path))
    silent._seen -= 61
    with pytest.raises(TransportError, match="no rollout has arrived"):
        silent.check_health(60.0)
    with pytest.raises(InvalidInput, match=r"reward_funcs: empty"):
        RolloutWorker(client, ROWS, [], load_tokenizer(POLICY), args(tmp_path))
    with pytest.raises(InvalidInput, match=r"weight_transfer: not attached"):
        WeightTransfer(client).send_weights(iter([]))


def test_a_full_queue_does_not_hold_up_the_end(client: RolloutClient, tmp_path: Path) -> None:
    made = worker(client, tmp_path, lambda completions, **_: [0.0] * len(completions), queue_maxsize=2)
    assert isinstance(made.rollout_buffer, queue.Queue)
    while made.rollout_buffer.qsize() < 2:
        time.sleep(0.02)
    began = time.monotonic()
    made.stop()
    assert not made._thread.is_alive() and time.monotonic() - began < 10


def test_weights_are_pushed_in_the_dtype_of_the_service(tmp_path: Path) -> None:
    """The gateway takes a version only in its own dtypes; buffers keep theirs. The gateway is asked for the serving number, so it
    does not matter who pushed before."""
    backend = ToyBackend(expected={"weight": ("bfloat16", (3,)), "bias": ("float32", (2,))})
    gateway = Gateway(backend, "tcp://127.0.0.1:*", tmp_path / "ledger.sqlite").start()
    parameters, buffers = {"weight": torch.tensor([1.0, 2.0, 3.0], requires_grad=True)}, {"bias": torch.zeros(2)}
    with blockroll.connect(gateway.address) as one, blockroll.connect(gateway.address) as other:
        with pytest.raises(TransportError):
            WeightSync(one).push(parameters, buffers)
        assert WeightSync(one, "bfloat16").push(parameters, buffers) == 1
        assert WeightSync(other, "bfloat16").push(parameters, buffers) == 2
        assert WeightSync(one, "bfloat16").push(parameters, buffers) == 3
    assert backend.arrays["weight"].dtype == np.uint16
    gateway.stop()


def test_rewards_may_be_coroutines_or_missing() -> None:
    async def later(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0, None]

    with pytest.raises(InvalidInput, match="reward_funcs: <lambda> returned an infinite reward"):
        reward(lambda **_: [1.0, float("-inf")], {}, 2)
    scores = reward(later, {"completions": ["a", "b"]}, 2)
    assert scores[0] == 1.0 and np.isnan(scores[1])
    found = advantages(np.array([1.0, 3.0, np.nan]))
    assert np.allclose(found, [-1, 1, 0]) and (advantages(np.full(2, np.nan)) == 0).all()


def test_prompts_are_texts_or_conversations(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(POLICY)
    assert prompt_tokens(tokenizer, "Q:") == (tokenizer.bos_token_id, *tokenizer.encode("Q:", add_special_tokens=False))
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}S:"
    chat = [{"role": "user", "content": "Q:"}]
    assert prompt_tokens(tokenizer, chat) == prompt_tokens(tokenizer, "Q:S:")
    assert completion(tokenizer, chat, [tokenizer.bos_token_id]) == [{"role": "assistant", "content": ""}]
    params = sampling_params(args(tmp_path, top_k=5, min_p=0.1, temperature=0.5), "mixed")
    assert (params.top_k, params.min_p, params.temperature, params.max_tokens, params.sampler) == (5, 0.1, 0.5, 12, "mixed")
