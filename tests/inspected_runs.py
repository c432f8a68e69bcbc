"""Runs to inspect: real samples of the shipped policy, and directories like those of a GRPO run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from blockroll import Engine, EngineConfig, RolloutRequest, SamplingParams
from blockroll.model.tasks import make_tasks
from blockroll.model.tokenizer import encode_prompt
from blockroll.rollout.sample_lines import dump, sample_line
from blockroll.rollout.schedule import Schedule

Record = dict[str, Any]


def sampled(tasks: int = 8, samples: int = 4, versions: bool = True) -> list[Record]:
    """Lines of real samples, lossless at three levels; with `versions` the weights change while they are made."""
    engine = Engine("tiny-reasoner", EngineConfig(Schedule("fused", levels=(0, 4, 8)), max_batch=16))
    policy, found, steps, version = engine.policy, [], 0, 0
    tensors = {name: tensor.clone() for name, tensor in policy.state_dict().items() if name != "lm_head.weight"}
    generator = torch.Generator().manual_seed(0)
    for i, task in enumerate(make_tasks("heldout", tasks, 5)):
        prompt = tuple(encode_prompt(policy.tokenizer, task.prompt))
        engine.add(RolloutRequest(f"step-{i % 4 + 1:05d}/00/{i:05d}", prompt, SamplingParams(max_tokens=120, n=samples)))
    while engine.has_work:
        found += engine.step()
        steps += 1
        if versions and steps % 12 == 0:
            version += 1
            noise = {name: tensor * (1 + 1e-3 * torch.randn(tensor.shape, generator=generator))
                     for name, tensor in tensors.items() if tensor.is_floating_point()}  # fmt: skip
            engine.load_weights(tensors | noise, version)
    found.sort(key=lambda sample: sample.key)
    chance = random.Random(0)
    return [
        sample_line(sample.request_id, sample, policy.tokenizer, {
            "step": int(sample.request_id[5:10]), "reward": round(chance.random(), 2), "advantage": chance.gauss(0, 1)})
        for sample in found
    ]  # fmt: skip


def repeated(records: list[Record], count: int) -> list[Record]:
    """So many lines, with names of their own."""
    return [records[i % len(records)] | {"id": f"{records[i % len(records)]['id']}/{i // len(records)}"} for i in range(count)]


def write(path: Path, records: list[Record]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(dump, records)))
    return path


def directory(path: Path, records: list[Record], steps: int = 12) -> Path:
    """A run's directory as `blockroll grpo` leaves it."""
    write(path / "rollouts.jsonl", records)
    rows = [{"step": step, "reward": 0.3 + 0.04 * step, "tokens_per_forward": 5 + 0.1 * step, "entropy": 0.4 - 0.01 * step,
             "gradient_norm": 1 / (1 + step), "seconds": {"rollout": 0.2, "train": 2.0 + step}} for step in range(steps)]
    write(path / "metrics.jsonl", rows)
    (path / "config.yaml").write_text("output: x\npolicy: tiny-reasoner\n")
    return path


def payload_of(page: Path) -> Record:
    """What a page holds, as its script reads it."""
    text = page.read_text(encoding="utf-8")
    return json.loads(text.split('id="payload">')[1].split("</script>")[0])
