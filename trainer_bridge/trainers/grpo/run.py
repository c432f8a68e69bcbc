"""One GRPO run: its directory and its trainer. The service it trains against is brought up, or named, by the caller.

Invariants:
- A directory belongs to one process at a time. A run in it is resumed or replaced only on request.
- Everything that can be refused is checked before an earlier run is touched. A run that replaces an earlier one puts
  that one back when its own start fails.
- Files are whole or absent: config.yaml, metrics.jsonl (a line per step), rollouts.jsonl (the first groups of each step),
  checkpoint.safetensors, ledger.sqlite and what lies beside it (service.json at a service that ran already), summary.json,
  report.png, policy/.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import torch

from ....errors import ConfigError, InvalidInput
from ....files import locked_directory, make_directory, write_atomic, write_json
from ....model.checkpoint import load_policy, save_policy
from ....model.policy import Policy
from ....model.tasks.own import OwnTasks
from ....model.tasks.task_set import ReasoningGym, TaskSet
from ....rollout.sample_lines import CONFIG
from ....settings import load_yaml, whole_text
from ...client import connect
from .attachment import Endpoint, attach
from .config import GrpoConfig
from .directory import LEDGER, POLICY, SUMMARY, recover, replacing, run_files
from .metrics import METRICS
from .report import Display, draw_report
from .trainer import Trainer

Serve = Callable[[Path], AbstractContextManager[Endpoint]]
"""Brings a rollout service with this ledger up for a `with` block, or names one that runs."""


def run(config_path: str | os.PathLike[str], service: Callable[[GrpoConfig], Serve], resume: bool = False,
        overwrite: bool = False) -> dict[str, Any]:
    """Trains against a rollout service and writes the run's files; returns the summary.

    Args:
        service: checks what the configuration says of the service, and returns what brings it up.
        resume: go on with the run in the output directory from its last checkpoint. Start a run when there is none, and leave a
            finished one as it is.
        overwrite: replace the run in the output directory.

    Raises:
        ConfigError: the file is not a run's, the directory holds a run and neither flag is given, or a run of another
            configuration is to be resumed.
    """
    if resume and overwrite:
        raise InvalidInput("--overwrite", "given together with --resume", "give one of them")
    torch.set_num_threads(1)
    config = load_yaml(config_path, GrpoConfig)
    serve = service(config)
    policy = load_policy(config.policy)
    with closing(task_set(config, policy)) as tasks:
        return _run(config, config_path, serve, policy, tasks, resume, overwrite)


def task_set(config: GrpoConfig, policy: Policy) -> TaskSet:
    """What the run's prompts and rewards come from. Raises ConfigError or DataError where they cannot be used."""
    if config.tasks.source is None:
        return ReasoningGym(config.tasks.families)
    return OwnTasks(config.tasks.source, policy, config.seed, prompts_per_step=config.tasks.prompts_per_step)


def _run(config: GrpoConfig, config_path: str | os.PathLike[str], serve: Serve, policy: Policy, tasks: TaskSet,
         resume: bool, overwrite: bool) -> dict[str, Any]:
    output = make_directory(config.output)
    with locked_directory(output), Display(config) as display:
        recover(output)
        if resume and run_files(output):
            _check_same(output, config, config_path)
            if (output / SUMMARY).exists():
                display.say(f"the run in {output} is finished")
                return json.loads((output / SUMMARY).read_text())
        with replacing(output, overwrite, kept=resume) as started:
            write_atomic(output / CONFIG, whole_text(config_path).encode())
            display.say("starting the rollout service")
            with serve(output / LEDGER) as endpoint:
                attachment = attach(output, endpoint.shared, resume and (output / METRICS).exists())
                with connect(endpoint.address, client_id=attachment.client, keys=endpoint.keys, timeout=120.0,
                             ack="manual") as client:  # fmt: skip
                    if attachment.version is None:
                        display.say(f"the starting policy becomes version {client.version + 1} of {endpoint.address}")
                        version = client.push_weights(client.version + 1, policy.state_dict())
                        attachment = attachment.at(version, output)
                    start = load_policy(config.policy) if config.loss.kl_weight else None
                    trainer = Trainer(config, policy, client, output, display, attachment, tasks, start)
                    started()
                    if resume:
                        trainer.resume()
                    summary = trainer.train()
        if config.save_policy:
            save_policy(policy.eval(), output / POLICY)
        write_json(output / SUMMARY, summary)
        draw_report(output)
    return summary


def _check_same(output: Path, config: GrpoConfig, config_path: str | os.PathLike[str]) -> None:
    """Raises ConfigError unless the run in the directory has this configuration."""
    theirs, ours = load_yaml(output / CONFIG, GrpoConfig).model_dump(), config.model_dump()
    for name, value in ours.items():
        if name not in ("output", "address", "keys") and theirs[name] != value:
            raise ConfigError(name, f"{value} in {os.fspath(config_path)} differs from the run in {output}, which has "
                              f"{theirs[name]}", "resume with the configuration it began with, or give another output")
