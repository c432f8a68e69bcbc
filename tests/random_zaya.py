"""Configurations and random weights of small ZAYA models."""

from __future__ import annotations

import torch
from transformers import ZayaConfig

from blockroll.model import checkpoint
from blockroll.model.policy import Policy


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


@torch.no_grad()
def large_policy(layers: int = 12) -> Policy:
    """A policy whose weights take about 170 MB a layer in float32; nothing else is kept in memory."""
    config = ZayaConfig(vocab_size=32_000, num_hidden_layers=layers, hidden_size=1024, moe_intermediate_size=1024, num_experts=12,
                        head_dim=128, router_hidden_size=64, max_position_embeddings=4096)  # fmt: skip
    with torch.device("meta"):
        policy = Policy(config)
    checkpoint._place(policy, torch.float32, torch.device("cpu"))
    for tensor in policy.state_dict().values():
        tensor.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(tensor.numel()))
    return policy
