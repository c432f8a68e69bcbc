"""Rotary embeddings as `transformers.models.zaya.modeling_zaya.ZayaRotaryEmbedding` computes them, and activations by name.

That module imports half of transformers, which takes longer than loading a small policy. So it is imported only for what is not
here: frequencies that change with the length of the sequence, and rare activations. A test compares both bit for bit.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .zaya_config import ZayaConfig

FIXED = ("default", "linear", "yarn", "llama3")
"""Kinds whose frequencies depend on the configuration alone."""


class RotaryEmbedding(nn.Module):
    """cos and sin of every position, one set of frequencies per kind of layer. Buffers are not part of a checkpoint."""

    def __init__(self, config: ZayaConfig) -> None:
        super().__init__()
        self.config = config
        for kind in sorted(set(config.layer_types)):
            if (parameters := config.rope_parameters[kind]) is None:
                continue
            if parameters["rope_type"] == "default":
                inverse, scaling = _default(config, kind), 1.0
            else:
                inverse, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, layer_type=kind)
            self.register_buffer(f"{kind}_inv_freq", inverse, persistent=False)
            self.register_buffer(f"{kind}_original_inv_freq", inverse.clone(), persistent=False)
            setattr(self, f"{kind}_attention_scaling", scaling)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [..., 2 * frequencies], in the dtype of `x`, for integer positions [...]."""
        inverse = getattr(self, f"{layer_type}_inv_freq").to(device=x.device, dtype=torch.float)
        angles = position_ids[..., None].float() * inverse
        angles = torch.cat((angles, angles), dim=-1)
        scaling = getattr(self, f"{layer_type}_attention_scaling")
        return (angles.cos() * scaling).to(dtype=x.dtype), (angles.sin() * scaling).to(dtype=x.dtype)


def rotary_embedding(config: ZayaConfig) -> nn.Module:
    """The rotary embedding of a configuration."""
    kinds = {parameters["rope_type"] for parameters in config.rope_parameters.values() if parameters is not None}
    if kinds <= set(FIXED):
        return RotaryEmbedding(config)
    from transformers.models.zaya.modeling_zaya import ZayaRotaryEmbedding

    rotary: nn.Module = ZayaRotaryEmbedding(config)
    return rotary


def is_activation(name: str) -> bool:
    """Whether transformers knows the activation."""
    if name == "silu":
        return True
    from transformers.activations import ACT2FN

    return name in ACT2FN


def activation(name: str) -> nn.Module:
    """An activation by transformers' name."""
    if name == "silu":
        return nn.SiLU()
    from transformers.activations import ACT2FN

    found: nn.Module = ACT2FN[name]
    return found


def _default(config: ZayaConfig, kind: str) -> torch.Tensor:
    parameters = config.rope_parameters[kind]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = int(head * parameters.get("partial_rotary_factor", 1.0))
    # On the host, also for a policy on the meta device: torch's `arange` there imports its compiler.
    return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float, device="cpu") / size))
