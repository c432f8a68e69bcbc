"""The arithmetic of memory and time, against the network itself and against the page that prints it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from random_zaya import zaya_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import ZayaConfig

from blockroll.model.conversion.budget import MI300X, Setting, flops_per_token, memory, row_bytes, size, table
from blockroll.model.conversion.config import ConversionConfig
from blockroll.model.layout import diffusion
from blockroll.model.policy import Layer, Policy
from blockroll.settings import load_yaml

ROOT = Path(__file__).resolve().parents[3]
# The proportions of ZAYA1-8B.
SMALL = dict(vocab_size=64, hidden_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
             moe_intermediate_size=256, num_experts=2, router_hidden_size=32, tie_word_embeddings=True,
             layer_types=["hybrid", "hybrid"], sliding_window=None)  # fmt: skip


def pack(documents: int, length: int = 32):
    draw = random.Random(0)
    texts = [[draw.randrange(1, 60) for _ in range(length)] for _ in range(documents)]
    return diffusion(texts, [[(start, 16) for start in range(length - 16, 0, -16)] for _ in texts], 63)[0]


def test_parameters_are_those_of_the_network():
    config = zaya_config(**SMALL)
    policy = Policy(config)
    count = size(config)
    assert count.whole == sum(p.numel() for p in policy.parameters())
    assert count.whole == count.ends + sum(p.numel() for p in policy.model.layers.parameters())
    assert size(ZayaConfig()).whole == pytest.approx(8.84e9, rel=0.001)  # 17.7 GB in bfloat16


def test_operations_are_those_torch_counts():
    """All matrix products of a forward pass; attention apart, for the plain kernel also multiplies what is masked."""
    config = zaya_config(**SMALL)
    policy = Policy(config).initialise(torch.Generator().manual_seed(0))
    layout = pack(4)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.head(policy(layout))
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    per_row = products / layout.rows
    without_attention = flops_per_token(config, Setting(1, masked_copies=0)) - 2 * 4 * 8 * 16 * 0.5
    assert per_row == pytest.approx(without_attention, rel=0.01)


def test_saved_bytes_are_those_autograd_saves(monkeypatch: pytest.MonkeyPatch):
    config = zaya_config(**SMALL)
    policy = Policy(config).initialise(torch.Generator().manual_seed(0)).bfloat16().requires_grad_(True)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    forward, last = Layer.forward, policy.model.layers[-1]

    def saved_bytes(documents: int) -> tuple[int, int]:
        held: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            # Masks and indices are shared by the layers, or absent at length.
            if tensor.untyped_storage().data_ptr() not in weights and tensor.is_floating_point() and tensor.dim() < 4:
                held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        def watched(self, *inputs):
            if self is not last:
                return forward(self, *inputs)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                return forward(self, *inputs)

        layout = pack(documents)
        monkeypatch.setattr(Layer, "forward", watched)
        with torch.autocast("cpu", torch.bfloat16):
            policy(layout)
        monkeypatch.setattr(Layer, "forward", forward)
        return layout.rows, sum(tensor.untyped_storage().nbytes() for tensor in held.values())

    (few, less), (many, more) = saved_bytes(4), saved_bytes(8)
    assert row_bytes(config) == pytest.approx((more - less) / (many - few), rel=0.2)


def test_memory_grows_with_rows_and_shrinks_with_devices():
    config = ZayaConfig()
    half, whole = (memory(config, Setting(tokens), 8) for tokens in (16_384, 32_768))
    assert half.states == whole.states == 2 * memory(config, Setting(16_384), 16).states
    assert whole.kept == 2 * half.kept and whole.total < 2.2 * half.total
    assert memory(config, Setting(32_768, parent=True), 8).total > whole.total
    assert whole.fits(MI300X) and not memory(config, Setting(32_768, checkpointing=False), 8).fits(MI300X)


def test_stages_of_zaya1_8b_fit_their_devices():
    run = load_yaml(ROOT / "configs" / "conversion" / "zaya1-8b.yaml", ConversionConfig)
    for stage in run.runs:
        setting = Setting(stage.pack_tokens, masked_copies=stage.masked_copies, parent=stage.ar_target == "parent",
                          checkpointing=stage.activation_checkpointing)  # fmt: skip
        assert memory(ZayaConfig(), setting, run.launcher.workers).fits(MI300X), stage.name


def test_page_prints_what_is_computed():
    assert table(ZayaConfig()) in (ROOT / "ARCHITECTURE.md").read_text()
