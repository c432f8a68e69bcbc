"""Gives a policy, or another one of its structure, other tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from .policy import Policy


def with_tensors(policy: Policy, tensors: Mapping[str, torch.Tensor]) -> Policy:
    """A policy of the same structure that holds these tensors, and the policy's own where there is none of a name.

    Args:
        tensors: of the policy's dtype and shapes. They are shared, not copied.
    """
    memo: dict[int, Any] = {id(part): part for part in (policy.config, policy.tokenizer)}
    for name, parameter in policy.named_parameters():
        memo[id(parameter)] = torch.nn.Parameter(tensors.get(name, parameter.detach()), requires_grad=False)
    for name, buffer in policy.named_buffers():
        memo[id(buffer)] = tensors.get(name, buffer)
    return copy.deepcopy(policy, memo)


def swap_tensors(policy: Policy, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Has the policy hold these tensors, of its own dtype, device and shapes, in place of those of the same names. Nothing is
    copied: the tensors are the policy's from here on, and may be read-only. Returns those that it held, as they
    were."""
    own, replaced = _held(policy), []
    for name, tensor in tensors.items():
        replaced.append(own[name].data)
        own[name].data = tensor
        own[name].is_lent = True
    return replaced


@torch.no_grad()
def copy_tensors(policy: Policy, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies these tensors, of its own shapes, into the policy. Those of `swap_tensors` are left as they were."""
    own = _held(policy)
    for name, tensor in tensors.items():
        if getattr(own[name], "is_lent", False):
            own[name].data = tensor.to(own[name], copy=True)
            own[name].is_lent = False
        else:
            own[name].copy_(tensor)


def _held(policy: Policy) -> dict[str, Any]:
    return dict(policy.named_parameters()) | dict(policy.named_buffers())
