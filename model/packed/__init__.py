"""Decoding and scoring of a small float32 policy on a CPU: `weights` folded from the policy's, the `plan` of a layout, the
network over both (`forward`), and what stands between its matrix products (`stages` and `attention`, compiled by numba at
first use). The products are those of `kernels/linear/numba.py`.

A clean row depends on its prefix alone, to the last bit, by construction and so on every machine. No such promise holds for the
policies that are not served here (accelerators, other dtypes, more parameters): there libraries choose the order of a sum by the
number of rows, and the same row differs by rounding.

`PackedForward` is imported where a policy is served: numba takes a moment, and a machine with an accelerator does without it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ...kernels.dispatch import takes_triton

if TYPE_CHECKING:
    from ..policy import Policy
    from .forward import PackedForward

MOST_PARAMETERS = 2**26
"""A larger policy is not paid by the operation, and its copy would weigh."""


def packed_forward(policy: Policy) -> PackedForward | None:
    """The network of a policy as it decodes here; None where `Policy.forward` is to serve."""
    if not _served(policy):
        return None
    from .forward import PackedForward

    return PackedForward(policy)


def products(policy: Policy) -> str:
    """Who multiplies the clean rows of a policy where it decodes and is scored, for whoever reads a figure."""
    if not _served(policy):
        return "the library's, equal up to rounding"
    from ...kernels.linear.numba import name

    return name()


def _served(policy: Policy) -> bool:
    return (
        policy.device.type == "cpu"
        and not takes_triton(policy.model.embed_tokens.weight)
        and policy.dtype == torch.float32
        and policy.config.hidden_act == "silu"
        and sum(parameter.numel() for parameter in policy.parameters()) <= MOST_PARAMETERS
        and find_spec("numba") is not None
    )
