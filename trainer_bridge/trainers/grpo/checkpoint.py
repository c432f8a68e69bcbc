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
from ....model.conversion.checkpoints import prepare_states, training_state
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
    with torch.no_grad():
        try:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
                step, row = int(metadata["step"]), json.loads(metadata["row"])
                saved = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise _broken(path, " ".join(str(error).split())) from error
        parameters = {name: p.clone() for name, p in learner.policy.named_parameters()}
        prepare_states(learner.policy, learner.optimizer)
        own = training_state(learner.policy, learner.optimizer)
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
            for name, parameter in learner.policy.named_parameters():
                parameter.copy_(parameters[name])
            learner.optimizer.state.clear()
            raise _broken(path, "it holds the tensors of another policy")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    return step, row


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError("checkpoint", f"{path} cannot be resumed ({why})",
                           "restore it from a copy, or start anew with --overwrite")  # fmt: skip
