"""verl's adapter: what it translates and how its requests wait here; verl itself, in its own environment, in the slow tests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from bridge_parts import ToyBackend
from bridge_parts import request as bridge_request
from engine_backend import EngineBackend

from blockroll.errors import ConfigError, InvalidInput, RequestError, StorageError, TransportError
from blockroll.rollout.types import RolloutRequest, SamplingParams, Trajectory
from blockroll.trainer_bridge.adapters.verl import generations, turns
from blockroll.trainer_bridge.adapters.verl.generations import Generations
from blockroll.trainer_bridge.adapters.verl.sampling import longest_answer, sampling_params, token_output
from blockroll.trainer_bridge.adapters.verl.settings import service_settings
from blockroll.trainer_bridge.client import RequestRefused, RolloutClient, connection
from blockroll.trainer_bridge.client.async_client import AsyncRolloutClient
from blockroll.trainer_bridge.gateway import Gateway

ROOT = Path(__file__).resolve().parents[3]
POLICY = "tiny-reasoner-terse"
MODEL = "blockroll.trainer_bridge.adapters.verl.model"
VERL_PYTHON = os.environ.get("BLOCKROLL_VERL_PYTHON", "")
needs_verl = pytest.mark.skipif(not VERL_PYTHON, reason="BLOCKROLL_VERL_PYTHON names no interpreter of an environment with verl "
                                "(docs/trainers/verl.md)")  # fmt: skip


def test_parameters_of_an_agent_loop() -> None:
    given = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True, "max_tokens": 400,
             "stop": None, "stop_token_ids": [7]}  # fmt: skip
    assert sampling_params(given, "coupled", 96) == SamplingParams(
        sampler="coupled", temperature=0.7, top_p=0.9, stop_token_ids=(7,), max_tokens=96)
    assert sampling_params({"max_new_tokens": 5, "top_k": 3}, "ar", 96) == SamplingParams(sampler="ar", top_k=3, max_tokens=5)
    assert sampling_params({}, "ar", 12).max_tokens == 12
    assert given["max_tokens"] == 400  # verl uses the dictionary again


@pytest.mark.parametrize(("given", "message"), [
    ({"temperature": -1.0}, r"temperature: .*-1\.0"),
    ({"top_p": 0.0}, r"top_p: 0\.0 is outside"),
    ({"max_tokens": 0}, r"sampling_params.max_tokens: 0 is no whole number from 1"),
    ({"n": 2}, r"sampling_params.n: more than one sample of a call; set rollout.n"),
    ({"prompt_logprobs": 3}, r"sampling_params.prompt_logprobs: not supported; leave it out"),
    ({"guided_json": {}}, r"sampling_params.guided_json: not supported"),
])  # fmt: skip
def test_parameters_that_cannot_be_served(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sampling_params(given, "coupled", 96)


def test_budgets_of_an_answer() -> None:
    assert longest_answer(10, 64, 96, None) == 96
    assert longest_answer(100, 64, 96, None) == 60  # a later turn, whose prompt has used some of the answer's budget
    assert longest_answer(10, 64, 96, 50) == 40
    with pytest.raises(RequestError, match=r"prompt_ids: 160 tokens leave no room"):
        longest_answer(160, 64, 96, None)


def trajectory(versions: list[int], finish_reason: Any = "stop") -> Trajectory:
    size = len(versions)
    values = np.linspace(-2, -1, size, dtype=np.float32)
    return Trajectory(request_id="r", sample=0, prompt_tokens=(1, 2), tokens=tuple(range(5, 5 + size)), logprobs=values,
                      behavior_logprobs=values - 1, support_logmass=None, versions=np.array(versions, np.int32),
                      finish_reason=finish_reason, forwards=2, trace=(), from_draft=np.zeros(size, bool))  # fmt: skip


def test_an_answer_in_verls_form() -> None:
    found = token_output(trajectory([3, 3, 4]), {3: 0, 4: 10})
    extra = found["extra_fields"]
    assert found["token_ids"] == [5, 6, 7] and found["log_probs"] == pytest.approx([-3, -2.5, -2])
    assert found["stop_reason"] == "completed"
    assert (extra["global_steps"], extra["min_global_steps"], extra["max_global_steps"]) == (10, 0, 10)
    assert extra["blockroll"]["policy_logprobs"] == pytest.approx([-2, -1.5, -1])
    assert extra["blockroll"]["weight_versions"] == [3, 3, 4]
    aborted = token_output(trajectory([], "abort"), {})
    assert (aborted["stop_reason"], aborted["token_ids"]) == ("aborted", []) and "global_steps" not in aborted["extra_fields"]


@pytest.mark.parametrize(("section", "message"), [
    (None, r"rollout.engine_kwargs.blockroll: missing; add \+actor_rollout_ref"),
    ({}, r"address: missing in rollout.engine_kwargs.blockroll"),
    ({"address": "tcp://h:1", "samplr": "ar"}, r"samplr: unknown key .* did you mean `sampler`\?"),
    ({"address": "tcp://h:1", "in_flight": "drop"}, r"in_flight: .*drop"),
])  # fmt: skip
def test_settings_that_cannot_be_used(section: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        service_settings({"vllm": {}} if section is None else {"blockroll": section})


def test_experts_that_verl_took_apart_are_put_together() -> None:
    from blockroll.trainer_bridge.adapters.verl.publisher import in_dtypes, joined_experts

    both, down = torch.randn(3, 8, 5), torch.randn(3, 5, 4)
    parts: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(5)}
    for expert in range(3):  # as verl's FSDP engine sends them
        gate, up = both[expert].chunk(2)
        parts |= {f"l.mlp.experts.{expert}.{kind}.weight": each
                  for kind, each in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[expert]))}  # fmt: skip
    found = joined_experts(parts)
    assert set(found) == {"model.norm.weight", "l.mlp.experts.gate_up_proj", "l.mlp.experts.down_proj"}
    assert torch.equal(found["l.mlp.experts.gate_up_proj"], both) and torch.equal(found["l.mlp.experts.down_proj"], down)
    del parts["l.mlp.experts.1.up_proj.weight"]
    with pytest.raises(InvalidInput, match=r"weights: l.mlp.experts.1.up_proj.weight is missing"):
        joined_experts(parts)
    cast = in_dtypes({"a": torch.ones(2), "b": torch.ones(2)}, {"a": ("bfloat16", (2,))})
    assert (cast["a"].dtype, cast["b"].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("padded", [True, False])
def test_positions_that_are_trained(padded: bool) -> None:
    """Answers of 3 and 1 tokens after prompts of 2 and 4; the answer's second token is the environment's."""
    from blockroll.trainer_bridge.adapters.verl.positions import answer_masks, trained_positions

    masks = [torch.tensor([1, 0, 1]), torch.tensor([1])]
    if padded:
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])
        batch = {"loss_mask": torch.nn.utils.rnn.pad_sequence(masks, True), "prompts": torch.zeros(2, 4), "attention_mask": mask}
    else:
        batch = {"loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged)}
    found = trained_positions([5, 5], answer_masks(batch), packed=False)
    assert found.int().tolist() == [[0, 1, 0, 1, 0], [0, 0, 0, 1, 0]]
    assert torch.equal(trained_positions([5, 5], answer_masks(batch), packed=True), found.flatten()[None])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service")
    gateway = Gateway(EngineBackend(POLICY), "tcp://127.0.0.1:*", folder / "ledger.sqlite").start()
    yield gateway.address
    gateway.stop()


def test_requests_that_wait(address: str) -> None:
    """Each call has its own trajectory or refusal; the gate holds back, turns away, and a cancelled call ends its request."""

    def request(name: str, *prompt: int, tokens: int = 8) -> RolloutRequest:
        return RolloutRequest(name, prompt or (1, 5, 6), SamplingParams(sampler="coupled", max_tokens=tokens, ignore_eos=True))

    async def run() -> None:
        client = await AsyncRolloutClient.connect(address)
        found = Generations(client, lambda: pytest.fail("no request is aborted"), address=address, patience=60.0)
        answers = await asyncio.gather(*(found.generate(request(f"r-{i}")) for i in range(40)),
                                       found.generate(request("r-0-far", 1, 300)), return_exceptions=True)  # fmt: skip
        assert [answer.request_id for answer in answers[:40]] == [f"r-{i}" for i in range(40)]  # type: ignore[union-attr]
        assert isinstance(answers[40], RequestRefused) and answers[40].request_id == "r-0-far"
        with pytest.raises(RequestError):
            await found.generate(request("r-1", 1, 2))  # the id of another request
        found.close_gate()
        held = asyncio.ensure_future(found.generate(request("held")))
        await asyncio.sleep(0.05)
        assert not held.done() and not found.unfinished
        found.close_gate(turn_away=True)
        assert await found.generate(request("turned away")) is None
        found.open_gate()
        assert (await held).request_id == "held"  # type: ignore[union-attr]
        failed = (await client.status())["failed"]
        dropped = asyncio.ensure_future(found.generate(request("dropped", tokens=400)))
        await asyncio.sleep(0.05)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        assert not found.unfinished and (await client.status())["failed"] == failed + 1
        twice = asyncio.ensure_future(found.generate(request("twice", tokens=400)))
        await asyncio.sleep(0.05)
        async with found._submitting:  # as while a batch is being submitted: the first cancellation waits for it
            for _ in range(2):
                twice.cancel()
                await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await twice
        for _ in range(200):
            if (await client.status())["failed"] == failed + 2:
                break
            await asyncio.sleep(0.01)
        assert not found.unfinished and (await client.status())["failed"] == failed + 2
        await found.close()

    asyncio.run(run())


def test_an_error_of_one_call_ends_no_other(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id twice among requests that are submitted together; and a gateway whose disk is full, until it is started again."""

    def request(name: str, *prompt: int) -> RolloutRequest:
        return RolloutRequest(name, (1, *prompt), SamplingParams(sampler="coupled", max_tokens=8, ignore_eos=True))

    take, failed = RolloutClient.take, list[str]()

    def full_once(self: RolloutClient, *given: Any) -> Any:
        if not failed:
            failed.append("the disk is full")
            raise StorageError(failed[0])
        return take(self, *given)

    async def run() -> None:
        client = await AsyncRolloutClient.connect(address)
        found = Generations(client, lambda: pytest.fail("no request is aborted"), address=address, patience=60.0)
        await found.generate(request("first", 5))
        answers = await asyncio.gather(*(found.generate(request(name, 6)) for name in ("second", "first", "third")),
                                       return_exceptions=True)  # fmt: skip
        assert [isinstance(answer, RequestError) for answer in answers] == [False, True, False], answers
        monkeypatch.setattr(RolloutClient, "take", full_once)
        found._submitted.set()
        while not failed:
            await asyncio.sleep(0.01)
        assert (await found.generate(request("fourth", 6))).request_id == "fourth"  # type: ignore[union-attr]
        await found.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_calls_fail_while_the_gateway_is_gone_and_their_requests_do_not_run_after_it(
    serve: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(generations, "_RETRY_S", 0.05)
    monkeypatch.setattr(connection, "PING_S", 0.1)
    gateway = serve(ToyBackend(rate=0.0))
    address = gateway.address

    async def run() -> None:
        client = await AsyncRolloutClient.connect(address, timeout=0.3)
        found = Generations(client, lambda: pytest.fail("no request is aborted"), address=address, patience=0.3)
        calls = [asyncio.ensure_future(found.generate(bridge_request("recorded")))]
        while not (await client.status())["in_flight"]:
            await asyncio.sleep(0.01)
        gateway.stop()
        calls.append(asyncio.ensure_future(found.generate(bridge_request("not submitted"))))
        for error in await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10):
            assert isinstance(error, TransportError) and address in str(error), error
        serve(ToyBackend(rate=0.0), address)
        while (figures := await client.status())["failed"] < 2:
            await asyncio.sleep(0.01)
        assert figures["requested"] == 2 and figures["outstanding"] == 0
        await found.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_call_that_is_cancelled_while_its_batch_is_submitted(
    serve: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    gateway, submit = serve(ToyBackend(rate=0.0)), RolloutClient.submit

    def late(self: RolloutClient, batch: Any) -> None:
        time.sleep(0.2)
        submit(self, batch)

    monkeypatch.setattr(RolloutClient, "submit", late)

    async def run() -> None:
        client = await AsyncRolloutClient.connect(gateway.address)
        found = Generations(client, lambda: pytest.fail("no request is aborted"), address=gateway.address, patience=60.0)
        dropped = asyncio.ensure_future(found.generate(bridge_request("dropped")))
        await asyncio.sleep(0.05)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        await asyncio.sleep(0.3)
        figures = await client.status()
        assert (figures["requested"], figures["failed"], figures["outstanding"]) == (1, 1, 0)
        await found.close()

    asyncio.run(asyncio.wait_for(run(), 20))


def test_turns_of_verls_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """No id is made twice while its request goes on, however many others there were."""
    monkeypatch.setattr(turns, "MAX_COUNTED", 4)
    counted = turns.Turns()
    found = [counted.take("goes on")]
    for i in range(20):
        assert counted.take(f"r{i}") == 0
        if i % 3 == 0:
            found.append(counted.take("goes on"))
    assert found == list(range(8)) and len(counted) == 4


def test_the_parts_that_talk_to_the_service_import_neither_torch_nor_verl() -> None:
    names = ", ".join(f"blockroll.trainer_bridge.adapters.verl.{name}" for name in ("settings", "sampling", "generations"))
    code = f"import sys, {names}; assert not {{'torch', 'verl', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def environment(folder: Path) -> dict[str, str]:
    """Of a process of verl: blockroll is importable, and declares its plugin as pyproject.toml does."""
    (folder / "site/blockroll-0.dist-info").mkdir(parents=True)
    (folder / "site/blockroll").symlink_to(ROOT, target_is_directory=True)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    lines = [f"{name} = {module}" for name, module in points.items()]
    (folder / "site/blockroll-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: blockroll\nVersion: 0\n")
    (folder / "site/blockroll-0.dist-info/entry_points.txt").write_text("\n".join(["[verl.plugins]", *lines, ""]))
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "RAY_ADDRESS")}
    return {**kept, "PYTHONPATH": str(folder / "site"), "VERL_PLATFORM": "blockroll_cpu", "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1"}  # fmt: skip


def run_in(folder: Path, environment: dict[str, str], command: list[str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture
def service(tmp_path: Path) -> Iterator[str]:
    """A service of this environment, in a process of its own."""
    config = tmp_path / "service.yaml"
    config.write_text(yaml.safe_dump({
        "policy": POLICY, "engines": {"count": 1, "device": "cpu", "num_cpus": 0.5},
        "schedule": {"kind": "fused", "levels": [0, 4]},
        "delivery": {"ledger": str(tmp_path / "ledger.sqlite"), "bind": "tcp://127.0.0.1:*"},
    }))  # fmt: skip
    command = shutil.which("blockroll") or str(Path(sys.executable).parent / "blockroll")
    subprocess.run([command, "up", str(config), "--detach"], check=True, capture_output=True)
    try:
        yield json.loads(subprocess.check_output([command, "status", str(config), "--json"]))["address"]
    finally:
        subprocess.run([command, "down", str(config)], check=True, capture_output=True)


@pytest.mark.slow
@needs_verl
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("backend", ["naive", "blockroll"])
def test_rollouts_an_update_and_a_ppo_step_in_verls_environment(backend: str, service: str, tmp_path: Path) -> None:
    surroundings = environment(tmp_path)
    model = tmp_path / "model"
    run_in(tmp_path, surroundings, [VERL_PYTHON, "-m", MODEL, POLICY, str(model)])
    script, output = Path(__file__).with_name("verl_steps.py"), tmp_path / "found.json"
    run_in(tmp_path, surroundings, [VERL_PYTHON, str(script), service, str(model), str(output), backend])
    found = json.loads(output.read_text())
    print(json.dumps({name: value for name, value in found.items() if "rollout" not in name}, indent=1))
    first, second = found["rollout_0"], found["rollout_1"]
    print(first["ratio"], second["ratio"], first["versions"], second["versions"])
    for step, rollout in enumerate((first, second)):
        # On policy: what verl's actor computes is what the engines recorded, before the step and after it.
        assert all(abs(ratio - 1) < 1e-4 for ratio in rollout["ratio"]), rollout["ratio"]
        assert rollout["steps"] == [step] and rollout["versions"] == [step + 1] and rollout["stop_reasons"] == ["completed"]
        assert len(set(map(tuple, rollout["answers"]))) > 8
    assert found["ratio_after_step"][0] < 0.99 or found["ratio_after_step"][1] > 1.01  # the step changed the policy
    assert found["train"]["grad_norm"] > 0 and 0.3 < found["train"]["draft/overlap"] < 1
    aborted = found["aborted"]
    assert aborted["answered"] == 200 and aborted["aborted"] > 0 and aborted["tokens_of_aborted"][1] < 64, aborted
    assert aborted["late_waited"] and aborted["late"] == "completed"


@pytest.mark.slow
@needs_verl
@pytest.mark.timeout(2400)
def test_the_command_of_the_page(service: str, tmp_path: Path) -> None:
    """verl's own program, with its agent loop, reward workers and trainer, for two steps."""
    import pyarrow
    import pyarrow.parquet

    page = (ROOT / "docs/trainers/verl.md").read_text()
    command = next(text for text in re.findall(r"```sh\n(.*?)```", page, re.S) if "verl.trainer.main_ppo" in text)
    command = command.replace("verl-env/bin/python", VERL_PYTHON).replace("tcp://127.0.0.1:5555", service)
    rows = [{"data_source": "sum", "prompt": [{"role": "user", "content": f"Q:{a}+{a + 3}\nS:"}], "ability": "math",
             "reward_model": {"style": "rule", "ground_truth": str(2 * a + 3)}, "extra_info": {"index": a}}
            for a in range(11, 19)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    (tmp_path / "reward.py").write_text("def score(data_source, solution_str, ground_truth, extra_info=None, **_):\n"
                                        "    return len(set(solution_str)) % 5 / 4\n")  # fmt: skip
    surroundings = environment(tmp_path)
    run_in(tmp_path, surroundings, [VERL_PYTHON, "-m", MODEL, POLICY, "runs/verl/model"])
    said = run_in(tmp_path, surroundings, ["bash", "-euo", "pipefail", "-c", command])
    steps = [dict(re.findall(r"([\w/]+):(?:np\.\w+\()?(-?[\d.]+(?:e-?\d+)?|nan)", line)) for line in said.splitlines()
             if "step:" in line and "actor/pg_loss" in line]  # fmt: skip
    assert [step["training/global_step"] for step in steps] == ["1", "2"]
    for step in steps:
        print(step)
        assert float(step["training/rollout_probs_diff_max"]) < 1e-4
        assert float(step["training/off_policy/trajectory_staleness_worst/max"]) == 0
        assert float(step["actor/grad_norm"]) > 0 and 0.3 < float(step["actor/draft/overlap"]) < 1
