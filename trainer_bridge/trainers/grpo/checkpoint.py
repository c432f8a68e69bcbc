"""The checkpoint of a run: one file, whole or absent, written after every step, from which a killed run resumes.

Invariants:
- The file of step s is on disk before version s is pushed and before the trajectories of step s are acknowledged. So
  all that a resumed run needs is in this file or is delivered again.
- It holds parameters, buffers and optimiser states. Everything else the next step depends on is a function of the run's
  configuration and the step's number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ....errors import CheckpointError
from ....files import whole_file
from ....model.conversion.checkpoints import training_state
from .learner import Learner

NAME = "checkpoint.safetensors"


def save_checkpoint(path: Path, learner: Learner, step: int, row: dict[str, Any]) -> None:
    """Write the state after `step`, with the step's line of metrics. StorageError leaves the previous file in force."""
    tensors = {name: tensor.contiguous() for name, tensor in training_state(learner.policy, learner.optimizer).items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step), "row": json.dumps(row)})


def load_checkpoint(path: Path, learner: Learner) -> tuple[int, dict[str, Any]]:
    """Fill the learner's policy and optimiser; returns the step and its line of metrics.

    Raises:
        CheckpointError: the file is damaged or of another policy; nothing has changed.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            step, row = int(metadata["step"]), json.loads(metadata["row"])
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _broken(path, " ".join(str(error).split())) from error
    policy, optimizer = learner.policy, learner.optimizer
    own = {name: tensor for name, tensor in training_state(policy, optimizer).items() if name.startswith("policy.")}
    theirs = {name: tensor.shape for name, tensor in saved.items() if name.startswith("policy.")}
    if {name: tensor.shape for name, tensor in own.items()} != theirs:
        raise _broken(path, "it holds the tensors of another policy")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    # A parameter that has had no gradient yet has no state, and gets none here: its first step would be another one.
    for name, parameter in policy.named_parameters():
        prefix = f"optimizer.{name}."
        state = {key.removeprefix(prefix): tensor for key, tensor in saved.items() if key.startswith(prefix)}
        if state:
            optimizer.state[parameter] = state
    return step, row


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError("checkpoint", f"{path} cannot be resumed ({why})",
                           "restore it from a copy, or start anew with --overwrite")  # fmt: skip
