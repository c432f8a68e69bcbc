"""Decoding and scoring of a small float32 policy on a CPU.

`weights` folds the policy's weights, `plan` holds the places of a layout, and `backend` runs the network over both. Between the
matrix products run `stages` and `attention`, which numba compiles at first use. The products are `kernels/linear/numba.py`.

A clean row depends on its prefix alone, to the last bit, on every machine, because the order of each sum is written down. The
policies that are not served here (accelerators, other dtypes, more parameters) have no such promise: their libraries choose the
order of a sum by the number of rows, so that the same row differs by rounding.

`backend` is imported where a policy is served, because numba takes a moment to import and an accelerator does without it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ....kernels.dispatch import takes_triton

if TYPE_CHECKING:
    from ...policy import Policy

MOST_PARAMETERS = 2**26
"""Most parameters of a policy that this backend serves. In a larger policy matrix products take most of the time, and a second
copy of the weights would need too much memory."""


def serves(policy: Policy) -> bool:
    """Whether this backend runs the policy."""
    return (
        policy.device.type == "cpu"
        and not takes_triton(policy.model.embed_tokens.weight)
        and policy.dtype == torch.float32
        and policy.config.hidden_act == "silu"
        and sum(parameter.numel() for parameter in policy.parameters()) <= MOST_PARAMETERS
        and find_spec("numba") is not None
    )
