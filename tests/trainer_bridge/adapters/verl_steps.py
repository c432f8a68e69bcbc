"""Run in verl's environment: verl's own workers, servers, losses and checkpoint manager against a service, for one PPO step.

    PYTHON verl_steps.py ADDRESS MODEL_DIRECTORY OUTPUT.json [BACKEND]

MODEL_DIRECTORY is what `adapters.verl.model` writes. BACKEND is a checkpoint engine: `naive` for trainer and rollouts in one
worker, or `blockroll`, with standalone replicas. The figures go to OUTPUT.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import tensordict
import torch
import transformers
import verl
import verl.trainer
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.checkpoint_engine import CheckpointEngineManager
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.llm_server import LLMServerManager
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from blockroll.trainer_bridge.client import ServiceControl

PROMPTS, SAMPLES, PROMPT, ANSWER, MANY = 4, 4, 24, 64, 200
PARAMS = {"temperature": 0.9, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}


def configuration(address: str, model: str, backend: str) -> DictConfig:
    rollout = "actor_rollout_ref.rollout"
    apart = [] if backend == "naive" else [
        f"+{rollout}.checkpoint_engine.engine_kwargs.blockroll.address={address}", f"{rollout}.nnodes=1"]  # fmt: skip
    with initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=[
            f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.model.enable_gradient_checkpointing=False",
            "actor_rollout_ref.model.external_lib=blockroll.trainer_bridge.adapters.verl.model",
            "actor_rollout_ref.actor.strategy=fsdp2", "actor_rollout_ref.actor.optim.lr=1e-4",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8", "actor_rollout_ref.actor.use_torch_compile=False",
            "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
            "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
            f"{rollout}.name=blockroll", f"+{rollout}.engine_kwargs.blockroll.address={address}",
            f"{rollout}.tensor_model_parallel_size=1", f"{rollout}.log_prob_micro_batch_size_per_gpu=8", f"{rollout}.n={SAMPLES}",
            f"{rollout}.temperature={PARAMS['temperature']}", f"{rollout}.checkpoint_engine.backend={backend}",
            f"data.max_prompt_length={PROMPT}", f"data.max_response_length={ANSWER}", "trainer.device=cpu",
            "trainer.n_gpus_per_node=1", *apart,
        ])  # fmt: skip
    OmegaConf.resolve(config)
    return config


async def roll_out(client: Any, prompts: list[list[int]], name: str) -> list[Any]:
    """Samples of each prompt by verl's client, which calls the server actor; prompt by prompt."""
    return await asyncio.gather(*(client.generate(f"{name}-{i}-{k}", prompt_ids=prompt, sampling_params=dict(PARAMS))
                                  for i, prompt in enumerate(prompts) for k in range(SAMPLES)))  # fmt: skip


def batch_of(prompts: list[list[int]], outputs: list[Any]) -> DataProto:
    """verl's padded batch: prompts to the left, answers to the right."""
    rows = len(outputs)
    ids, mask = torch.zeros(rows, PROMPT + ANSWER, dtype=torch.long), torch.zeros(rows, PROMPT + ANSWER, dtype=torch.long)
    recorded = torch.zeros(rows, ANSWER)
    for row, output in enumerate(outputs):
        prompt, answer = prompts[row // SAMPLES], output.token_ids
        begin, end = PROMPT - len(prompt), PROMPT + len(answer)
        ids[row, begin:end], mask[row, begin:end] = torch.tensor([*prompt, *answer]), 1
        recorded[row, : len(answer)] = torch.tensor(output.log_probs)
    return DataProto.from_dict({
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:], "response_mask": mask[:, PROMPT:], "rollout_log_probs": recorded,
    }, meta_info={"temperature": PARAMS["temperature"]})  # fmt: skip


def log_probs(workers: Any, batch: DataProto) -> torch.Tensor:
    """Of the answers, by verl's actor."""
    data = left_right_2_no_padding(batch.to_tensordict())
    tu.assign_non_tensor(data, calculate_entropy=False, compute_loss=False)
    return no_padding_2_padding(tu.get(workers.compute_log_prob(data), "log_probs"), data).float()


def ratios(batch: DataProto, theirs: torch.Tensor) -> tuple[float, float]:
    """Least and largest importance ratio: verl's actor over what was recorded."""
    mask = batch.batch["response_mask"].bool()
    ratio = torch.exp(theirs - batch.batch["rollout_log_probs"])[mask]
    return float(ratio.min()), float(ratio.max())


def train(workers: Any, batch: DataProto, old: torch.Tensor) -> dict[str, Any]:
    """One PPO step by verl's advantages, loss and optimiser. The reward is the share of even tokens."""
    mask = batch.batch["response_mask"]
    scores = (mask * (batch.batch["responses"] % 2 == 0)).sum(1) / mask.sum(1)
    rewards = torch.zeros(mask.shape)
    rewards[torch.arange(len(mask)), mask.sum(1) - 1] = scores
    groups = np.repeat([f"group-{i}" for i in range(PROMPTS)], SAMPLES)
    advantages, _ = compute_grpo_outcome_advantage(rewards, mask, groups)
    batch.batch["old_log_probs"], batch.batch["advantages"] = old, advantages
    data = left_right_2_no_padding(batch.to_tensordict())
    size = PROMPTS * SAMPLES
    tu.assign_non_tensor(data, calculate_entropy=False, global_batch_size=size, mini_batch_size=size, epochs=1, seed=1,
                         dataloader_kwargs={"shuffle": False}, compute_loss=True)  # fmt: skip
    return dict(tu.get(workers.update_actor(data), "metrics"))


def figures(batch: DataProto, outputs: list[Any], theirs: torch.Tensor) -> dict[str, Any]:
    fields = [output.extra_fields for output in outputs]
    return {
        "ratio": ratios(batch, theirs), "lengths": [len(output.token_ids) for output in outputs],
        "stop_reasons": sorted({output.stop_reason for output in outputs}),
        "steps": sorted({each[name] for each in fields for name in ("global_steps", "min_global_steps", "max_global_steps")}),
        "versions": sorted({version for each in fields for version in each["blockroll"]["weight_versions"]}),
        "answers": [list(output.token_ids) for output in outputs],
    }  # fmt: skip


def abort_and_resume(servers: LLMServerManager, address: str, prompt: list[int]) -> dict[str, Any]:
    """Requests that verl aborts end with the tokens that they have, and those that arrive meanwhile wait."""
    replica, client = servers.get_replicas()[0], servers.get_client()
    params = {**PARAMS, "ignore_eos": True}

    async def run() -> dict[str, Any]:
        all_of_them = [asyncio.ensure_future(client.generate(f"abort-{i}", prompt_ids=prompt, sampling_params=dict(params)))
                       for i in range(MANY)]  # fmt: skip
        with ServiceControl(address) as control:
            while not int((await asyncio.to_thread(control.status)).figures["in_flight"]):
                await asyncio.sleep(0.01)
        await replica.abort_all_requests()
        late = asyncio.ensure_future(client.generate("late", prompt_ids=prompt, sampling_params=dict(params)))
        waited = not (await asyncio.wait([late], timeout=2.0))[0]
        await replica.resume_generation()
        outputs = await asyncio.gather(*all_of_them)
        aborted = [len(output.token_ids) for output in outputs if output.stop_reason == "aborted"]
        return {"answered": len(outputs), "aborted": len(aborted), "tokens_of_aborted": [min(aborted), max(aborted)],
                "late_waited": waited, "late": (await late).stop_reason}  # fmt: skip

    return asyncio.run(run())


def main(address: str, model: str, output: str, backend: str = "naive") -> None:
    began = time.monotonic()
    config = configuration(address, model, backend)
    section = config.actor_rollout_ref
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(num_cpus=16, num_gpus=2, include_dashboard=False)  # verl places workers by GPUs; none is used
    role = "actor_rollout" if backend == "naive" else "actor"
    pool = RayResourcePool([1], use_gpu=True, max_colocate_count=3)
    workers = RayWorkerGroup(pool, RayClassWithInitArgs(ray.remote(ActorRolloutRefWorker), config=section, role=role))
    workers.init_model()
    servers = LLMServerManager.create(config, worker_group=workers if backend == "naive" else None)
    weights = CheckpointEngineManager(section.rollout.checkpoint_engine, workers, servers.get_replicas())
    weights.update_weights(global_steps=0)
    client = servers.get_client()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    prompts = [[tokenizer.bos_token_id, *tokenizer(f"Q:{13 + 7 * i}+{28 + i}\nS:", add_special_tokens=False)["input_ids"]]
               for i in range(PROMPTS)]  # fmt: skip
    found: dict[str, Any] = {"backend": backend, "device": verl.utils.device.get_device_name(), "versions": {
        "verl": verl.__version__, "transformers": transformers.__version__, "torch": torch.__version__, "ray": ray.__version__,
        "tensordict": tensordict.__version__, "python": sys.version.split()[0]}}  # fmt: skip
    for step in range(2):
        outputs = asyncio.run(roll_out(client, prompts, f"step-{step}"))
        batch = batch_of(prompts, outputs)
        theirs = log_probs(workers, batch)
        found[f"rollout_{step}"] = figures(batch, outputs, theirs)
        if step == 0:
            found["train"] = {name: float(np.mean(value)) for name, value in train(workers, batch, theirs).items()
                              if isinstance(value, int | float | list)}  # fmt: skip
            found["ratio_after_step"] = ratios(batch, log_probs(workers, batch))
            weights.update_weights(global_steps=1)
    Path(output).write_text(json.dumps(found))
    found["aborted"] = abort_and_resume(servers, address, prompts[0])
    found["seconds"] = time.monotonic() - began
    Path(output).write_text(json.dumps(found))
    ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("VERL_PLATFORM", "blockroll_cpu")
    main(*sys.argv[1:])
