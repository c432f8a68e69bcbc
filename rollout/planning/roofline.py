"""What a decode step must move and compute, and how long a device needs for that.

Invariants:
- A step's work follows from the policy's dimensions, the schedule, the batch and the context alone. Every weight that is
  needed is read once per pass, every cached key and value once per pass and sequence; rows choose experts uniformly.
- Parts of a step (dense layers, experts, attention, head, activations) follow one another; each takes the longer of its
  bytes and its FLOPs. So times are lower bounds at peak rates, and estimates at rates that kernels reach.
- At rates of a known architecture attention takes what its programs take as well (`attention_work.py`).
- Numbers have two bytes, except the residual stream (four).

Legend: S sequences, R rows per sequence, T = S R rows, L context, m drafts, B mask rows of a proposal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import ZayaConfig

from ...errors import DataError
from ...model.conversion.budget import size
from ..schedule import Schedule
from .attention_work import AttentionCall, shares
from .survival import chain, lasting

KERNELS_PER_LAYER, KERNELS_PER_PASS, SORT_INSIDE = 11, 18, 512
"""Launches of one layer in a decode step: projections 2, CCA 1, attention 2, residuals and norms 2, router 2, experts 2; one
more in passes of over `SORT_INSIDE` rows, which sorts them by expert; and those of a pass around its layers: embedding,
positions, the last norm."""
KERNELS_OF_AR, KERNELS_OF_DRAFTS = 18, 47
"""Launches of a captured step's sampling: AR's draw; verification, the choice of a proposal and the draw of drafts."""
HIP_LAUNCH, CUDA_LAUNCH = 3.85e-6, 2e-6
"""Seconds that a kernel costs beside its work in a graph whose kernels follow one another. HIP: 941 small kernels took 3.85 to
3.87 us each on a Radeon Pro W7900 (ROCm/rocm-systems, issue 10834); not measured on an MI300X. CUDA: assumed."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s and byte/s of plain kernels and of decode attention, and seconds that one kernel costs beside its work. `arch`: the
    architecture, as `kernels/launch.py` names it, whose programs attention counts; None counts bytes and FLOPs alone."""

    flops: float
    bytes: float
    attention_flops: float
    attention_bytes: float
    launch: float = 0.0
    arch: str | None = None

    def attention(self, call: AttentionCall) -> float:
        """Seconds of one layer's attention, its launches apart."""
        flops, moved = call.flops / self.attention_flops, call.bytes / self.attention_bytes
        return max(flops, moved) if self.arch is None else shares(self.arch, call).seconds(flops, moved, self.bytes)


@dataclass(frozen=True)
class Hardware:
    """A device.

    Attributes:
        flops, bytes: peak dense bfloat16 FLOP/s and memory bandwidth of `source`.
        reached: rates that kernels reach, as fractions of the peaks: matrix products, copies, attention's products,
            attention's reads. basis: where the fractions come from.
        launch: seconds per launch in a captured step. arch: the architecture, as `kernels/launch.py` names it.
    """

    name: str
    flops: float
    bytes: float
    source: str
    reached: tuple[float, float, float, float]
    basis: str
    launch: float
    arch: str

    @property
    def peak(self) -> Rates:
        """Peak rates; launches cost nothing."""
        return Rates(self.flops, self.bytes, self.flops, self.bytes)

    @property
    def achieved(self) -> Rates:
        """The rates of `reached`, with launches in a captured step."""
        products, copies, attention_products, attention_reads = self.reached
        return Rates(
            self.flops * products, self.bytes * copies, self.flops * attention_products, self.bytes * attention_reads,
            self.launch, self.arch,
        )


_READS = "paged decode attention reads at about 70 % of peak on AMD and 80-90 % on Hopper"
_MI300X = f"copies 4.3 TB/s published; products assumed; {_READS}"
_MI355X = f"assumed, copies as on MI300X; {_READS}"
_H200 = f"copies 4.3 TB/s and products 790 TFLOP/s measured; attention's products assumed; {_READS}"
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("mi300x", 1307.4e12, 5.3e12, "AMD Instinct MI300X data sheet", (0.54, 0.81, 0.42, 0.70), _MI300X, HIP_LAUNCH,
                 "gfx942"),
        Hardware("mi355x", 2516.6e12, 8.0e12, "AMD Instinct MI355X data sheet", (0.60, 0.81, 0.56, 0.70), _MI355X, HIP_LAUNCH,
                 "gfx950"),
        Hardware("h200", 989.4e12, 4.8e12, "NVIDIA H200 data sheet", (0.80, 0.90, 0.67, 0.85), _H200, CUDA_LAUNCH,
                 "sm_90"),
        Hardware("h100", 989.4e12, 3.35e12, "NVIDIA H100 SXM data sheet", (0.80, 0.90, 0.67, 0.85), f"as H200; {_READS}",
                 CUDA_LAUNCH, "sm_90"),
    )
}


@dataclass(frozen=True)
class Work:
    """Bytes moved and floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Step:
    """One decode step: the work of its parts, over all layers and passes.

    Attributes:
        rows: R, over both passes of `two_pass`. passes: forwards. experts: expected experts read per layer and pass.
        attention: the calls that the part of this name consists of, and how many of each.
    """

    schedule: Schedule
    rows: int
    passes: int
    experts: float
    parts: Mapping[str, Work]
    kernels: int
    attention: Mapping[AttentionCall, int]

    @property
    def total(self) -> Work:
        """All parts."""
        return sum(self.parts.values(), Work(0.0, 0.0))

    def seconds(self, rates: Rates) -> float:
        """At these rates, part after part."""
        total = self.kernels * rates.launch
        for name, work in self.parts.items():
            if name != "attention":
                total += max(work.flops / rates.flops, work.bytes / rates.bytes)
        total += sum(count * rates.attention(call) for call, count in self.attention.items())
        return total


def experts_touched(experts: int, rows: float) -> float:
    """Expected number of distinct experts that `rows` rows choose, each uniformly."""
    return experts * (1 - (1 - 1 / experts) ** rows)


@dataclass(frozen=True)
class Roofline:
    """Work of a policy's decode steps.

    Attributes:
        block: the policy's mask rows per block.
        parameters: of the whole policy. dense: weights of a layer that every row meets.
    """

    config: ZayaConfig
    block: int
    parameters: int
    dense: int

    @classmethod
    def of(cls, config: ZayaConfig) -> Roofline:
        """Counted on the network, without its weights."""
        count = size(config)
        block = (getattr(config, "diffusion", None) or {}).get("block_size", 16)
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        return cls(config, block, count.whole, count.met - expert)

    @property
    def kv_bytes(self) -> int:
        """Cached bytes per token."""
        config = self.config
        return 2 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers

    def proposals_until_compute_bound(self, rates: Rates) -> tuple[float, float]:
        """(rows per sequence at which attention over a long context takes as long for its FLOPs as for its bytes, and the
        proposals among them beside one block of verify rows).

        A cached position of one key head is 4 D bytes, and costs 4 D FLOPs per query row and head.
        """
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        rows = rates.attention_flops / rates.attention_bytes / group
        return rows, (rows - self.block) / self.block

    def rows(self, schedule: Schedule) -> tuple[list[int], list[int]]:
        """Rows per sequence of each forward pass, and of each product with the head, of a step with sizes."""
        drafts = schedule.drafts or 0
        if schedule.kind == "two_pass":
            return [1 + drafts, drafts], [1 + drafts, drafts]
        if schedule.kind == "fused":
            # The head sees the verify rows, then the rows of one proposal that can still become drafts.
            wide = schedule.block or self.block
            return [1 + drafts + len(schedule.levels) * wide], [1 + drafts, wide - 1]
        return [1], [1]

    def step(self, schedule: Schedule, batch: int, context: int) -> Step:
        """One decode step of `batch` sequences with `context` cached positions each, under `ar`, `two_pass` or `fused`."""
        config, chosen = self.config, schedule.within(self.block)
        passes, heads = self.rows(chosen)
        parts = {name: Work(0.0, 0.0) for name in ("dense", "experts", "attention", "head", "activations")}
        attention: Counter[AttentionCall] = Counter()
        for rows in passes:
            attention += self.attention_calls(batch, rows, context)
            for name, work in self._layers(batch, rows).items():
                parts[name] += work
        parts["attention"] = Work(
            sum(count * call.bytes for call, count in attention.items()),
            sum(count * call.flops for call, count in attention.items()),
        )
        weights = 2 * config.hidden_size * config.vocab_size
        for rows in heads:
            # Logits are float32. They are written once, and read once for the normaliser and once for the draw.
            logits = 3 * 4 * batch * rows * config.vocab_size
            parts["head"] += Work(weights + logits, weights * batch * rows)
        touched = sum(experts_touched(config.num_experts, batch * rows) for rows in passes) / len(passes)
        per_layer = [KERNELS_PER_LAYER + (batch * rows > SORT_INSIDE) for rows in passes]
        kernels = config.num_hidden_layers * sum(per_layer) + len(passes) * KERNELS_PER_PASS
        kernels += KERNELS_OF_AR if chosen.kind == "ar" else KERNELS_OF_DRAFTS
        return Step(chosen, sum(passes), len(passes), touched, parts, kernels, attention)

    def attention_calls(self, batch: int, rows: int, context: int) -> Counter[AttentionCall]:
        """Of all layers of one pass; a layer with a sliding window has that much context at most."""
        z = self.config
        window = z.sliding_window
        seen = (
            context if kind == "hybrid" or window is None else min(context, window) for kind in z.layer_types
        )
        return Counter(
            AttentionCall(z.num_attention_heads, z.num_key_value_heads, z.head_dim, batch, rows, each) for each in seen
        )

    def _layers(self, batch: int, rows: int) -> dict[str, Work]:
        """All layers of one pass, without attention."""
        config = self.config
        T, layers = batch * rows, config.num_hidden_layers
        hidden, inner, wide = config.hidden_size, config.moe_intermediate_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        expert = 3 * hidden * inner
        # Per row: two scaled residuals and norms (stream in, stream out, branch in, result out), projections and their
        # inputs, queries and outputs of attention, the expert's input, inner features and output.
        moved = 2 * (2 * 4 + 2 * 2) * hidden + 4 * (heads + 2 * groups) * wide * 2 + 2 * (3 * hidden + 2 * inner)
        touched = experts_touched(config.num_experts, T)
        return {
            "dense": Work(2 * self.dense * layers, 2 * self.dense * layers * T),
            "experts": Work(2 * expert * layers * touched, 2 * expert * layers * T),
            "activations": Work(moved * layers * T, 0.0),
        }


def geometric_survival(tokens_per_step: float, drafts: int) -> tuple[float, ...]:
    """P(at least k drafts are accepted), k = 1 .. drafts, each draft being accepted alike, such that a step of so many
    drafts commits `tokens_per_step` tokens on average."""
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        if 1 + sum(rate**k for k in range(1, drafts + 1)) < tokens_per_step:
            low = rate
        else:
            high = rate
    return tuple(low**k for k in range(1, drafts + 1))


def expected_tokens(schedule: Schedule, survival: Sequence[float], block: int) -> float:
    """Tokens that a step commits on average, in the long run.

    Args:
        survival: P(at least k drafts are accepted), k = 1, 2, .., in whatever slot the first one stands; a draft past its
            end is rejected.
    """
    chosen = schedule.within(block)
    if chosen.kind == "ar":
        return 1.0
    reached = [*survival, *[0.0] * block]
    if chosen.kind == "two_pass":
        return 1.0 + sum(reached[: chosen.drafts])
    move, gain, _ = chain(chosen, np.tile(reached[:block], (block + 1, 1)))
    return float(lasting(move) @ gain)


def measured_rates(figures: Mapping[str, Any], fallback: Rates) -> Rates:
    """Rates from the JSON of `blockroll bench gpu`; what it lacks is taken from `fallback`. Raises DataError."""
    ceilings, attention = figures.get("ceilings") or {}, figures.get("attention") or {}
    for name, section in (("ceilings", ceilings), ("attention", attention)):
        if not isinstance(section, Mapping):
            raise DataError("measured", f"{name} is no section", "give the file that `blockroll bench gpu` wrote")
    found = {
        "flops": ceilings.get("matmul_flops_per_s"), "bytes": ceilings.get("copy_bytes_per_s"),
        "attention_flops": attention.get("best_flops_per_s"), "attention_bytes": attention.get("best_bytes_per_s"),
        "launch": ceilings.get("seconds_per_launch"),
    }  # fmt: skip
    for name, value in found.items():
        if value is not None and not (isinstance(value, int | float) and 0 <= value < 1e30):
            raise DataError("measured", f"{name} is {value!r:.40}, no rate", "give the file that `blockroll bench gpu` wrote")
    return replace(fallback, **{name: value for name, value in found.items() if value})
