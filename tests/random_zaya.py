"""Configurations and random weights of small ZAYA models."""

from __future__ import annotations

import torch
from transformers import ZayaConfig


def zaya_config(**changes) -> ZayaConfig:
    """A ZAYA of a few thousand parameters."""
    fields = dict(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=24, num_experts=3, router_hidden_size=8, max_position_embeddings=160, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, layer_types=["hybrid", "hybrid_sliding", "hybrid"],
        sliding_window=24,
    )  # fmt: skip
    return ZayaConfig(**{**fields, **changes})


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0, sharpness: float = 1.0) -> None:
    """Every parameter and buffer at random; norms and scales near one, so that context matters."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith(("scale", "norm.weight", "layernorm.weight", "temp")) else 0.0
        spread = 0.2 if centre or name.endswith("bias") else 0.4
        parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=draw))
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=draw))
            buffer[-1] = 0.1  # so that some rows take the skip expert
    model.get_parameter("lm_head.weight").mul_(sharpness)
