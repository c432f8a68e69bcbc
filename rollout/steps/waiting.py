"""The drafts that wait for verification, gathered from the samples that hold them.

Each sample holds a row of the batch of drafts that its last step drew. Samples of one batch seldom part, so the batch itself is
mostly what is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...kernels.transfer import upload
from ..sampling.drafts import Drafts
from ..sequence import Sample


def waiting_drafts(decoding: Sequence[Sample], count_D: np.ndarray, device: torch.device) -> Drafts:
    """The first `count_D` (int64[D]) waiting drafts of each sample, in order. M is the largest count."""
    most = int(count_D.max(initial=0))
    if not most:
        return Drafts.none(len(decoding), device)
    # Neighbours that hold rows of one batch are selected together.
    parts: list[tuple[Drafts | None, list[int]]] = []
    for sample in decoding:
        if parts and parts[-1][0] is sample.drafts:
            parts[-1][1].append(sample.draft_index)
        else:
            parts.append((sample.drafts, [sample.draft_index]))
    (batch, mine), unchanged = parts[0], count_D.tolist() == [sample.draft_count for sample in decoding]
    if unchanged and batch is not None and len(parts) == 1 and mine == list(range(len(batch.count_S))):
        return batch.narrow(most)
    most_D, *index = upload([torch.from_numpy(count_D), *(torch.tensor(mine) for _, mine in parts)], device)
    chosen = []
    for (batch, mine), index_N in zip(parts, index, strict=True):
        if batch is None:
            chosen.append(Drafts.none(len(mine), device))
        else:
            chosen.append(batch if mine == list(range(len(batch.count_S))) else batch.select(index_N))
    drafts = chosen[0] if len(chosen) == 1 else Drafts.join(chosen)
    return drafts.limit(most_D, most)
