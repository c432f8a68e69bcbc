"""Linear layers of the policy."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` whose product can be batch-invariant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
