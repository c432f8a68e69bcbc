"""Fresh tensors that hold NaN until they are written."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN, or -7 in integers, so that an output nobody wrote is seen."""
    empty = torch.empty
    with torch.device("cpu"):
        empty(0)  # torch lists its constructors when such a context is first used, and must not list ours

    def poisoned(*size, **options) -> torch.Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)
