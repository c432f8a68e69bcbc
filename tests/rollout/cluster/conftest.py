"""Makes `cluster_parts` importable; a small random policy on disk, for engines in other processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import ZayaConfig

sys.path.insert(0, str(Path(__file__).parent))

import blockroll
from blockroll.model.policy import Policy


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory):
    config = ZayaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=24, num_experts=3, router_hidden_size=8, max_position_embeddings=128, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.diffusion = {"block_size": 8, "mask_token_id": 3}
    policy = Policy(config).initialise(torch.Generator().manual_seed(0))
    return str(blockroll.save_policy(policy, tmp_path_factory.mktemp("policies") / "random"))
