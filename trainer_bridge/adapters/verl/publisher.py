"""Pushes verl's weights as the next version of the service.

Invariants:
- Every rank of the trainer goes through the whole generator: gathering a tensor is a collective. One rank pushes.
- A tensor travels in the dtype that the service holds it in.
- verl takes expert weights apart into one matrix per expert; they are put together again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable, Iterable, Mapping
from typing import Any

import torch

from ....errors import InvalidInput
from ....model.weights import DTYPES
from ...client import ServiceControl
from ...wire.key_files import client_keys
from .settings import ServiceSettings
from .weight_steps import weight_steps

_PARTS = ("gate_proj", "up_proj", "down_proj")
_EXPERT = re.compile(rf"(.*\.experts)\.(\d+)\.({'|'.join(_PARTS)})\.weight")


class Publisher:
    """The end of a worker that pushes.

    Args:
        leads: whether this worker pushes. The others gather alone.
    """

    def __init__(self, settings: ServiceSettings, leads: bool) -> None:
        self._settings, self._leads = settings, leads
        self._control: ServiceControl | None = None

    async def publish(self, weights: Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]],
                      global_steps: int | None) -> int | None:
        """Makes these serve; returns their version when every engine has it, None in a worker that does not push.

        Raises as `RolloutClient.push_weights`; the version before then serves.
        """
        kept: dict[str, torch.Tensor] = {}
        async for name, tensor in _each(weights):
            if self._leads:
                kept[name] = tensor.detach().to("cpu", copy=True)  # verl may use its memory for the next tensor
        if not self._leads:
            return None
        version, expected = await asyncio.to_thread(self._ask)
        if global_steps is not None:
            await weight_steps().record.remote(version, global_steps)
        in_flight = "keep" if self._settings.in_flight == "keep" else "finish"
        assert self._control is not None
        return await asyncio.to_thread(self._control.push_weights, version, in_dtypes(joined_experts(kept), expected),
                                       in_flight=in_flight)  # fmt: skip

    def _ask(self) -> tuple[int, dict[str, tuple[str, tuple[int, ...]]]]:
        """The number of the next version, and the tensors that it consists of."""
        if self._control is None:
            self._control = ServiceControl(self._settings.address, keys=client_keys(self._settings.keys or None),
                                           timeout=self._settings.timeout)  # fmt: skip
        return int(self._control.status().figures["version"]) + 1, self._control.expected_weights()


async def _each(weights: Iterable[Any] | AsyncIterable[Any]) -> Any:
    if isinstance(weights, AsyncIterable):
        async for item in weights:
            yield item
        return
    for item in weights:
        yield item


def joined_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors under the policy's names: `X.experts.E.gate_proj.weight`, `up_proj` and `down_proj` of all experts E become
    `X.experts.gate_up_proj` and `X.experts.down_proj`. Raises InvalidInput where a part is missing."""
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            parts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            found[name] = tensor
    for name, matrices in parts.items():
        experts = range(1 + max(expert for expert, _ in matrices))
        if missing := [f"{name}.{e}.{kind}.weight" for e in experts for kind in _PARTS if (e, kind) not in matrices]:
            raise InvalidInput("weights", f"{missing[0]} is missing", "send every tensor of the model")
        both = [torch.cat([matrices[e, "gate_proj"], matrices[e, "up_proj"]]) for e in experts]
        found[f"{name}.gate_up_proj"] = torch.stack(both)
        found[f"{name}.down_proj"] = torch.stack([matrices[e, "down_proj"] for e in experts])
    return found


def in_dtypes(tensors: Mapping[str, torch.Tensor],
              expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """The tensors in the dtypes of the service; those that it does not know stay as they are, and it refuses them."""
    return {name: tensor.to(DTYPES[expected[name][0]]) if name in expected and expected[name][0] in DTYPES else tensor
            for name, tensor in tensors.items()}  # fmt: skip
