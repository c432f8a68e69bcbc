"""Rotary embeddings and activations, bit for bit as transformers has them, without its model code."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from random_zaya import zaya_config
from transformers.activations import ACT2FN
from transformers.models.zaya.modeling_zaya import ZayaRotaryEmbedding

from blockroll.model.rotary import RotaryEmbedding, activation, rotary_embedding

KINDS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 8.0, "original_max_position_embeddings": 64,
     "partial_rotary_factor": 1.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 0.5},
]


@pytest.mark.parametrize("parameters", KINDS, ids=lambda parameters: parameters["rope_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_transformers(parameters: dict[str, Any], dtype: torch.dtype) -> None:
    config = zaya_config(rope_parameters={"hybrid": parameters, "hybrid_sliding": {**parameters, "rope_theta": 123.0}})
    ours, theirs = rotary_embedding(config), ZayaRotaryEmbedding(config)
    assert isinstance(ours, RotaryEmbedding) == (parameters["rope_type"] != "dynamic")
    assert {name: b.tolist() for name, b in ours.named_buffers()} == {name: b.tolist() for name, b in theirs.named_buffers()}
    assert ours.state_dict() == {}
    x, position = torch.zeros(1, dtype=dtype), torch.tensor([[0, 1, 7, 40000]])
    for kind in set(config.layer_types):
        for got, expected in zip(ours(x, position, kind), theirs(x, position, kind), strict=True):
            assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("name", ["silu", "gelu", "relu"])
def test_activations_are_those_of_transformers(name: str) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(activation(name)(x), ACT2FN[name](x))


def test_a_policy_loads_without_the_model_code_of_transformers_and_without_torchs_compiler() -> None:
    program = ("import sys; from blockroll.rollout.engine import Engine; Engine('tiny-reasoner', max_batch=1)\n"
               "heavy = {'transformers.models.zaya.modeling_zaya', 'transformers.integrations.hub_kernels',\n"
               "         'torch._dynamo', 'sympy'}\n"
               "print(*(heavy & sys.modules.keys()))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
