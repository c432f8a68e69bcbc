"""The samplers' rows of a batch, made anew when its samples change.

Mostly one sample has ended and another has begun, with the same parameters: then only the seeds are new.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.transfer import upload
from ..params import SamplingParams
from ..sampling.adjustment import Prefix
from ..sampling.drafts import SamplerRows
from ..sequence import Sample


class SamplerRowsCache:
    """Rows of the present batch, and the latest parameters of each size of a batch.

    Args:
        draft_temperature: as in `SamplerRows.make`.
    """

    def __init__(self, device: torch.device, draft_temperature: float) -> None:
        self._device, self._on_cpu, self._draft_temperature = device, device.type == "cpu", draft_temperature
        self._samples: list[Sample] = []
        self._rows: SamplerRows | None = None
        self._known: dict[int, tuple[list[SamplingParams], SamplerRows]] = {}

    def rows(self, decoding: Sequence[Sample]) -> SamplerRows:
        """Seeds and parameters of the samples."""
        if self._rows is None or self._samples != decoding:  # samples are compared by identity
            self._samples, self._rows = list(decoding), self._make(decoding)
        return self._rows

    def forget_samples(self) -> None:
        """Drop every reference to samples."""
        self._samples, self._rows = [], None

    def _make(self, decoding: Sequence[Sample]) -> SamplerRows:
        params = [sample.request.params for sample in decoding]
        seeds = [sample.seed for sample in decoding]
        known = self._known.get(len(params))
        if known is not None and known[0] == params:
            self._known[len(params)] = params, known[1]  # the next comparison meets the same objects again
            seed_S = torch.from_numpy(np.array(seeds, np.int64))
            return known[1].with_seeds(seed_S if self._on_cpu else upload(seed_S, self._device))
        if any(p.adjusts for p in params):  # what adjusts logits follows the tokens of its samples
            prefixes = [Prefix(s.tokens, len(s.request.prompt_tokens), s.stops) for s in decoding]
            return SamplerRows.make(params, seeds, self._device, prefixes, self._draft_temperature)
        rows = SamplerRows.make(params, seeds, self._device, draft_temperature=self._draft_temperature)
        self._known[len(params)] = params, rows
        return rows
