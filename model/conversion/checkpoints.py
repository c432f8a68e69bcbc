"""Checkpoints of an interrupted stage: written by all processes at once, found again by any number of them.

Invariants:
- The file `latest` names a complete checkpoint or is absent. It is replaced after every process has written its part, so
  whatever dies in between leaves the previous checkpoint in force.
- A checkpoint holds whole tensors by name (`torch.distributed.checkpoint` cuts and joins them), never a process's share:
  it can be resumed with another number of processes.

    DIRECTORY/latest               name of the checkpoint in force
    DIRECTORY/step-00000500/       its tensors, and progress.json: what is not a tensor
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ...errors import CheckpointError, StorageError
from ...files import make_directory, storage_error, storing, write_atomic, write_json
from ..policy import Policy
from .distributed import Group


class Checkpoints:
    """The checkpoints of one stage under `directory`, which every process of the group sees."""

    def __init__(self, directory: Path, group: Group) -> None:
        self.directory, self._group = directory, group

    @property
    def latest(self) -> Path | None:
        """The checkpoint in force."""
        pointer = self.directory / "latest"
        return self.directory / pointer.read_text().strip() if pointer.is_file() else None

    def progress(self) -> dict[str, Any] | None:
        """What is not a tensor in the checkpoint in force; None where there is none.

        Raises:
            CheckpointError: the checkpoint lost a file.
        """
        latest = self.latest
        if latest is None:
            return None
        try:
            return json.loads((latest / "progress.json").read_text())
        except (OSError, ValueError) as error:
            raise self._broken(latest, error) from error

    def load(self, tensors: dict[str, Any]) -> None:
        """Fill `tensors`, in place, from the checkpoint in force.

        Raises:
            CheckpointError: it lost a file, or holds other tensors.
        """
        latest = self.latest
        assert latest is not None
        try:
            with _quiet():
                dcp.load(tensors, checkpoint_id=latest, no_dist=self._group.size == 1)
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
            raise self._broken(latest, error) from error

    def save(self, step: int, tensors: dict[str, Any], progress: Mapping[str, Any]) -> None:
        """Write a checkpoint and make it the one in force; older ones go.

        Raises:
            StorageError: it could not be written whole; the previous one is in force.
        """
        target = self.directory / f"step-{step:08d}"
        if self._group.first:
            make_directory(self.directory)
            shutil.rmtree(target, ignore_errors=True)
        self._group.barrier()
        try:
            with storing(target), _quiet():
                dcp.save(tensors, checkpoint_id=target, no_dist=self._group.size == 1)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise storage_error(cause, target) or StorageError(f"{target}: the checkpoint could not be written ({cause})") \
                from error
        if self._group.first:
            write_json(target / "progress.json", dict(progress))
            write_atomic(self.directory / "latest", f"{target.name}\n".encode())
            for path in self.directory.glob("step-*"):
                if path != target:
                    shutil.rmtree(path, ignore_errors=True)
        self._group.barrier()

    def clear(self) -> None:
        """Remove them all, the pointer first."""
        self._group.barrier()
        if self._group.first:
            (self.directory / "latest").unlink(missing_ok=True)
            shutil.rmtree(self.directory, ignore_errors=True)

    def _broken(self, latest: Path, error: BaseException) -> CheckpointError:
        why = " ".join(str(error).split())[-300:]
        return CheckpointError("checkpoint", f"{latest} cannot be resumed ({why})",
                               f"restore its files, or remove {self.directory} to train the stage from its start")  # fmt: skip


def training_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every tensor that the next step depends on, by name: parameters, persistent buffers, optimiser states."""
    kept = policy.state_dict()
    tensors: dict[str, torch.Tensor] = {f"policy.{name}": p for name, p in policy.named_parameters()}
    tensors |= {f"policy.{name}": b for name, b in policy.named_buffers() if name in kept}
    for name, parameter in policy.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()
                    if isinstance(value, torch.Tensor)}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def prepare_states(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser allocate its states, which it does in its first step; parameters may change: load afterwards."""
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class _quiet(warnings.catch_warnings):
    """Without the library's remarks about running in one process."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
