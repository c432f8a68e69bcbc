"""The samples of a step, as the planner sees them: how many there are of which kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..sequence import Sample
from ..types import SamplingParams

Kind = tuple[str, float, bool]
"""Samples of one kind share acceptance rates: sampler, temperature, whether a cut-off (top-k, top-p, min-p) is active."""


def kind_of(params: SamplingParams) -> Kind:
    """The kind of samples with these parameters."""
    return params.sampler, params.temperature, params.top_k > 0 or params.top_p < 1 or params.min_p > 0


class StepBatch(NamedTuple):
    """S samples of a step.

    Attributes:
        kind_S: the kind of each sample. kinds: how many are of each kind; kinds of `ar`, which takes no drafts, left out.
    """

    samples: list[Sample]
    kind_S: list[Kind]
    kinds: dict[Kind, int]

    @classmethod
    def of(cls, samples: Sequence[Sample], before: StepBatch | None = None) -> StepBatch:
        """The samples of a step; `before`: another batch, some of whose samples may be the same."""
        if samples and before is not None and before.samples and before.kinds.get(before.kind_S[0]) == len(before.samples):
            kind, new = before.kind_S[0], set(samples).difference(before.samples)
            if all([kind_of(sample.request.params) == kind for sample in new]):
                return cls(list(samples), [kind] * len(samples), {kind: len(samples)})
        known = {} if before is None else dict(zip(before.samples, before.kind_S, strict=True))
        kind_S = [known.get(sample) or kind_of(sample.request.params) for sample in samples]
        kinds = {kind: kind_S.count(kind) for kind in dict.fromkeys(kind_S) if kind[0] != "ar"}
        return cls(list(samples), kind_S, kinds)

    def is_like(self, before: StepBatch) -> bool:
        """Whether a choice for the batch before stands: there are not a quarter more or fewer samples, neither of any kind."""
        count, old = len(self.samples), len(before.samples)
        if self.kinds == before.kinds and count == old:
            return True
        return 4 * abs(count - old) < old and self.kinds.keys() == before.kinds.keys() and all(
            4 * abs(count - before.kinds[kind]) < before.kinds[kind] for kind, count in self.kinds.items()
        )

    @property
    def drafting(self) -> list[Sample]:
        """Those whose sampler takes drafts."""
        return [sample for sample, kind in zip(self.samples, self.kind_S, strict=True) if kind[0] != "ar"]
