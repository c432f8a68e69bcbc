"""Decoding and scoring of a small float32 policy on a CPU: `weights` folded from the policy's, the `plan` of a layout, the
network over both (`forward`), and what stands between its matrix products (`stages` and `attention`, compiled by numba at
first use).

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
    if (
        policy.device.type != "cpu"
        or takes_triton(policy.model.embed_tokens.weight)
        or policy.dtype != torch.float32
        or policy.config.hidden_act != "silu"
        or sum(parameter.numel() for parameter in policy.parameters()) > MOST_PARAMETERS
        or find_spec("numba") is None
    ):
        return None
    from .forward import PackedForward

    return PackedForward(policy)
