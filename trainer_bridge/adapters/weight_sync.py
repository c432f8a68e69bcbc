"""Pushes a trainer's weights as the next version of a service."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...errors import InvalidInput
from ...model.weights import DTYPES
from ..client import RolloutClient


class WeightSync:
    """Pushes the weights of a model as the next version of a service.

    Args:
        dtype: what the service holds its parameters in, where that differs from the trainer's (`bfloat16`). Buffers keep theirs.
        in_flight: what the commit does to unfinished samples, as in `push_weights`.
    """

    def __init__(self, client: RolloutClient, dtype: str | None = None, in_flight: str = "finish") -> None:
        if dtype is not None and dtype not in DTYPES:
            raise InvalidInput("dtype", f"unknown dtype {dtype!r}", f"use one of {', '.join(DTYPES)}")
        self._client, self._dtype, self._in_flight = client, None if dtype is None else DTYPES[dtype], in_flight

    def push(self, parameters: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> int:
        """Makes these serve, and returns their version when every engine has it. Only tensors that differ from those that serve
        are sent. Raises as `RolloutClient.push_weights`; the version before then serves."""
        kept = dict(parameters)
        if self._dtype is not None:
            kept = {name: tensor.detach().to(self._dtype) for name, tensor in kept.items()}
        serving = int(self._client.status()["version"])
        return self._client.push_weights(serving + 1, {**kept, **buffers}, in_flight=self._in_flight)
