"""A weight version that was checked, converted and folded beside the one that serves, so that taking it is quick.

Invariants:
- Staging changes nothing that a step reads, so it may run in another thread than the steps.
- On a CPU the policy takes the staged tensors themselves: nothing is copied, and engines of one host may share their memory,
  which may be read-only. On a device they are copied into the policy's own, because graphs read the weights where they lie.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import RequestError
from ..model.arguments import is_whole, require, short
from ..model.backends import Backend
from ..model.policy import Policy
from ..model.twin import copy_tensors, swap_tensors, with_tensors
from ..model.weights import fitting_tensors

Weights = Mapping[str, torch.Tensor]
SPARE = 1 << 30
"""Bytes of a device that staging leaves free for steps. Where a version would take more, it waits in host memory."""


@dataclass(frozen=True)
class StagedWeights:
    """One version, for the engine that staged it.

    Attributes:
        version: its number.
        tensors: by name, in the policy's dtype; those that the policy holds already may be missing.
        folded: what the backend made of them.
        replaced: the tensors in whose place these were taken. Freeing gigabytes takes a moment, which is left to whoever drops
            the staged version.
    """

    version: int
    tensors: Weights
    folded: Any = None
    replaced: list[torch.Tensor] = field(default_factory=list)


def checked(
    policy: Policy, tensors: Weights, version: int, changed: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a version, checked. Raises RequestError: they do not fit the policy, or the version is out of range.

    Args: changed: names of the tensors that differ from the policy's own; the others may be missing. None: all are here.
    """
    require(is_whole(version) and 0 <= version < 2**31, "version", f"{short(version)} is no whole number in 0..2**31-1",
            "count versions from 0")
    return fitting_tensors(policy, tensors, RequestError, "weights", f"version {version}", changed)


@torch.no_grad()
def stage(
    policy: Policy, backend: Backend, tensors: Weights, version: int, changed: Collection[str] | None = None
) -> StagedWeights:
    """Stages a version. The tensors must not change from here on. Arguments and errors as of `checked`."""
    given, own = checked(policy, tensors, version, changed), policy.state_dict()
    cast = {name: tensor.to(own[name].dtype) for name, tensor in given.items()}
    if policy.device.type == "cpu":
        cast = {name: tensor.contiguous() for name, tensor in cast.items()}
        return StagedWeights(version, cast, backend.fold(with_tensors(policy, cast)) if cast else None)
    size = sum(tensor.nbytes for tensor in cast.values() if tensor.device != policy.device)
    if policy.device.type == "cuda" and size + SPARE < torch.cuda.mem_get_info(policy.device)[0]:
        cast = {name: tensor.to(policy.device) for name, tensor in cast.items()}
        torch.cuda.synchronize(policy.device)
    return StagedWeights(version, cast)


def take(policy: Policy, staged: StagedWeights) -> None:
    """Has the policy hold a staged version."""
    if policy.device.type == "cpu":
        staged.replaced.extend(swap_tensors(policy, staged.tensors))
    else:
        copy_tensors(policy, staged.tensors)
