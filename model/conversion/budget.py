"""The cost of training a policy, in memory of a device and in time, from the policy's dimensions and a stage's settings.

Invariants:
- Parameters are counted on the network itself; the cost of a row follows from the widths of the layers.
- Memory figures are estimates of what exists at the same time. `Memory.fits` leaves a tenth of the device to allocators and
  kernels.
- Rates are peak rates of data sheets times a stated utilisation, which counts the arithmetic of the model (forward, and twice
  that backward) and not what is computed again to save memory.

    python -m blockroll.model.conversion.budget

prints the table of ARCHITECTURE.md. Legend: rows of a pack are clean and mask rows; a token is a clean row.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from functools import lru_cache

import torch
from transformers import ZayaConfig

from ..policy import Policy
from ..vocabulary import OTHER_BYTES


@dataclass(frozen=True)
class Device:
    """An accelerator: memory in bytes, peak bfloat16 rate in FLOP/s without sparsity."""

    name: str
    memory: float
    peak: float


MI300X = Device("MI300X", 192e9, 1307.4e12)
"""AMD's data sheet of the Instinct MI300X."""


@dataclass(frozen=True)
class Setting:
    """How a stage is run.

    Attributes:
        pack_tokens: clean tokens of a pack, on each device.
        document_tokens: of one document; attention grows with it. None for one document per pack.
        masked_copies: mask rows per clean token; 0 for an autoregressive stage.
        checkpointing: layers are computed again in the backward pass.
        parent: a second, frozen policy stands beside (`ar_target: parent`).
    """

    pack_tokens: int
    document_tokens: int | None = None
    masked_copies: int = 1
    checkpointing: bool = True
    parent: bool = False

    @property
    def rows(self) -> int:
        """Rows of a pack."""
        return self.pack_tokens * (1 + self.masked_copies)


@dataclass(frozen=True)
class Size:
    """Parameters of a policy: of the whole, of one layer, of embedding and head (one matrix where they are tied), and those
    of a layer that one row meets in a matrix product."""

    whole: int
    layer: int
    ends: int
    met: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
        states: its shards of parameters, gradients and AdamW's two moments, all float32.
        gathered: whole weights and gradients of the layers at hand and of embedding and head.
        kept: what the backward pass needs of all layers.
        layer: what one layer holds while it is computed; part of `kept` without checkpointing.
        head: logits and what is made of them, and final hidden states.
    """

    states: float
    gathered: float
    kept: float
    layer: float
    head: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(astuple(self))

    def fits(self, device: Device) -> bool:
        """Whether a tenth of the device stays free."""
        return self.total <= 0.9 * device.memory


def size(config: ZayaConfig) -> Size:
    """Counted on the network, without its weights."""
    return _size(config.to_json_string())


@lru_cache(maxsize=4)
def _size(config_json: str) -> Size:
    config = ZayaConfig(**json.loads(config_json))
    with torch.device("meta"):
        policy = Policy(config)
    layers = policy.model.layers
    layer = sum(p.numel() for p in layers[-1].parameters())
    experts = sum(p.numel() for name, p in layers[-1].named_parameters() if name.startswith("mlp.experts."))
    matrices = sum(p.numel() for p in layers[-1].parameters() if p.ndim > 1) - experts
    whole = sum(p.numel() for p in policy.parameters())
    ends = whole - sum(p.numel() for p in layers.parameters())
    return Size(whole, layer, ends, matrices + experts // config.num_experts)


def row_bytes(config: ZayaConfig) -> int:
    """Bytes that one layer saves for the backward pass, per row, with bfloat16 weights. Counted as the plain operations save
    them; fused ones save less.

    2-byte numbers unless said otherwise: the two norms in float32 and their results, the residuals and scaled branches of
    width D; projections, convolutions with their ancestors, normalised and turned queries and keys of the channels C;
    gate, up, their activation and product, of the expert's width; the router's states.
    """
    hidden, inner, router = config.hidden_size, config.moe_intermediate_size, config.router_hidden_size
    heads, groups, wide = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    channels = (heads + groups) * wide
    ancestors = config.cca_time0 + config.cca_time1 - 1
    stream = 4 * 4 * hidden + 9 * 2 * hidden
    attention = 2 * channels * (ancestors + config.cca_time1 + 5) + 2 * 2 * heads * wide + 2 * 2 * groups * wide
    experts = 2 * inner * 4
    routing = 4 * router + 7 * 2 * router
    return stream + attention + experts + routing


def memory(config: ZayaConfig, setting: Setting, devices: int) -> Memory:
    """Bytes of each of `devices` devices that hold a policy in shards (FSDP2) and train it in bfloat16."""
    count, rows, hidden = size(config), setting.rows, config.hidden_size
    # float32: parameter, gradient, two moments; of a parent the parameter alone.
    states = (16 + 4 * setting.parent) * count.whole / devices
    # bfloat16 weights and gradients: two layers while the next one is fetched, one of them being reduced in float32.
    gathered = 2 * (2 + 2) * count.layer + 4 * count.layer + (2 + 2 + 4) * count.ends + 2 * setting.parent * count.ends
    per_layer = row_bytes(config) * rows
    # Per layer the residual stream in float32 and the router's state.
    edge = (4 * hidden + 2 * config.router_hidden_size) * rows
    kept = config.num_hidden_layers * (edge if setting.checkpointing else per_layer)
    # Of the layer at hand: what it saved, and half as much for gradients on their way back.
    layer = per_layer * (1.5 if setting.checkpointing else 0.5)
    # Logits come in chunks of bounded size; final hidden states and their gradient.
    head = OTHER_BYTES + 3 * 4 * hidden * rows
    return Memory(states, gathered, kept, layer, head)


def flops_per_token(config: ZayaConfig, setting: Setting) -> float:
    """Floating-point operations of the forward pass per clean token: matrix products, attention, head."""
    count, rows_per_token = size(config), 1 + setting.masked_copies
    length = setting.document_tokens or setting.pack_tokens
    layer = 2 * count.met
    # A row at a random place sees half the document before it, twice: scores and values.
    attention = 4 * config.num_attention_heads * config.head_dim * length / 2
    head = 2 * config.hidden_size * config.vocab_size
    forward = rows_per_token * (config.num_hidden_layers * (layer + attention) + head)
    if setting.parent:
        forward += (config.num_hidden_layers * (layer + attention) + head) / 3  # a forward pass alone, of clean rows
    return forward


def tokens_per_second(config: ZayaConfig, setting: Setting, device: Device, devices: int, utilisation: float) -> float:
    """Clean tokens per second of `devices` devices at a model FLOP utilisation between 0 and 1."""
    return devices * device.peak * utilisation / (3 * flops_per_token(config, setting))


ROWS = (
    (8, Setting(32_768, checkpointing=False), 600e9),
    (8, Setting(32_768), 600e9),
    (8, Setting(32_768, document_tokens=4096), 600e9),
    (8, Setting(32_768, parent=True), 600e9),
    (8, Setting(122_880), 500e9),
    (8, Setting(131_072), 500e9),
    (16, Setting(131_072), 500e9),
)
"""Devices, setting, and clean tokens to train on (the published budgets)."""


def table(config: ZayaConfig, device: Device = MI300X, utilisation: float = 0.3) -> str:
    """The table of ARCHITECTURE.md, Markdown: memory in GB per device, operations, speed, days."""
    lines = [
        "| devices | pack | documents | layers computed again | clean rows learn | states | gathered | kept | one layer | head |"
        " total | fits | GFLOP per token | tokens/s | days |",
        "|---:|---:|---:|---|---|" + "---:|" * 6 + "---|---:|---:|---:|",
    ]
    for devices, setting, budget in ROWS:
        m = memory(config, setting, devices)
        rate = tokens_per_second(config, setting, device, devices, utilisation)
        parts = " | ".join(f"{value / 1e9:.0f}" for value in (*astuple(m), m.total))
        again, learns = "yes" if setting.checkpointing else "no", "parent" if setting.parent else "data"
        length = (setting.document_tokens or setting.pack_tokens) // 1024
        lines.append(
            f"| {devices} | {setting.pack_tokens // 1024}k | {length}k | {again} | {learns} | {parts} |"
            f" {'yes' if m.fits(device) else 'no'} | {3 * flops_per_token(config, setting) / 1e9:.0f} | {rate:,.0f} |"
            f" {budget / 1e9:.0f}B: {budget / rate / 86400:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(ZayaConfig()))
