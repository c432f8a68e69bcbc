"""The options of `blockroll eval`, and those it shares with `blockroll tradeoff`.

Invariants: all options are checked when an `Options` is made, before anything is loaded or decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import InvalidInput
from ...seeds import MAX_SEED
from ..engine import EngineConfig
from ..params import MAX_SAMPLES
from ..schedule import DEFAULT_LEVELS, Schedule
from ..types import SamplerName, SamplingParams
from .decoding import check_groups

MAX_TASKS = 100_000
"""Held-out tasks. They are drawn before the first is decoded, about 5,000 a second."""
MAX_BATCH = 65_536
"""Samples decoded at once."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How held-out tasks are decoded.

    Attributes:
        samples: of each task.
        mix_weights: `mixed` is measured with each.
        batch: samples decoded at once.
        seed: of the tasks and of their samples.
        device, dtype: where and as what policies run (`model.device.placement`).
    """

    samples: int = 4
    mix_weights: tuple[float, ...] = (0.25, 0.5, 0.75)
    batch: int = 32
    max_tokens: int = 256
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None

    @property
    def powers(self) -> tuple[int, ...]:
        """The powers of two up to `samples`."""
        return tuple(2**i for i in range(self.samples.bit_length()))


@dataclass(frozen=True, kw_only=True)
class Options(DecodingOptions):
    """What `blockroll eval` measures.

    Attributes:
        tasks: held-out tasks; all there are, where a source of one's own has fewer.
        documents: records of one's own documents, where some are given.
        samples: of each task at the first temperature; elsewhere one.
        k: sizes of groups for pass@k; None for the powers of two up to `samples`.
        samplers: beside `ar`.
        temperatures: the first one is that of pass@k and of all that is given at one temperature.
        levels: of the schedule `fused`, which every sampler but `ar` is decoded with.
        block_sizes: compared at the first temperature; all else is at the policy's own.
        draft_temperatures: `EngineConfig.draft_temperature`, compared likewise; none: no comparison.
    """

    tasks: int = 500
    documents: int = 1000
    k: tuple[int, ...] | None = None
    samplers: tuple[SamplerName, ...] = ("ar", "lossless", "mixed")
    temperatures: tuple[float, ...] = (1.0, 0.3)
    levels: tuple[int, ...] = DEFAULT_LEVELS
    block_sizes: tuple[int, ...] = (8, 16)
    draft_temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, most in (("tasks", MAX_TASKS), ("documents", MAX_TASKS), ("samples", MAX_SAMPLES), ("batch", MAX_BATCH)):
            if not 1 <= getattr(self, name) <= most:
                problem = "is less than 1" if getattr(self, name) < 1 else f"is more than {most}"
                raise InvalidInput(name, f"{getattr(self, name)} {problem}", f"use a number from 1 to {most}")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidInput("seed", f"{self.seed} is outside 0..2**63-1", "use a 63-bit seed")
        for name in ("temperatures", "mix_weights"):
            if not getattr(self, name):
                raise InvalidInput(name, "none are given", "give at least one")
        check_groups(self.groups, self.samples)
        for size in self.block_sizes:
            EngineConfig(block_size=size)
        for temperature in self.draft_temperatures:
            EngineConfig(draft_temperature=temperature)
        for way in self.ways():
            way.params(self.max_tokens)

    @property
    def groups(self) -> tuple[int, ...]:
        """k, in rising order."""
        return self.powers if self.k is None else tuple(sorted(set(self.k)))

    def ways(self) -> Iterator[Way]:
        """The ways the policy is decoded in, but for the comparisons of block sizes and of draft temperatures."""
        for temperature in dict.fromkeys(self.temperatures):
            for sampler in dict.fromkeys(("ar", *self.samplers)):
                for weight in dict.fromkeys(self.mix_weights) if sampler == "mixed" else (None,):
                    yield Way(sampler, temperature, Schedule("ar") if sampler == "ar" else Schedule("fused", levels=self.levels),
                              weight, self.samples if temperature == self.temperatures[0] else 1)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to decode."""

    sampler: SamplerName
    temperature: float
    schedule: Schedule
    mix_weight: float | None
    samples: int
    block_size: int | None = None
    draft_temperature: float | None = None

    @property
    def name(self) -> str:
        """What the JSON calls the sampler."""
        return self.sampler if self.mix_weight is None else f"{self.sampler}({self.mix_weight:g})"

    @property
    def weight(self) -> float:
        """Of p's logits; without a meaning for samplers other than `mixed`."""
        return 0.5 if self.mix_weight is None else self.mix_weight

    def params(self, max_tokens: int) -> SamplingParams:
        """As requests carry it, once it is checked."""
        return SamplingParams(self.sampler, self.temperature, mix_weight=self.weight, max_tokens=max_tokens)
