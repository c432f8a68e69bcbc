"""The configuration for a transformers that does not know ZAYA has the fields and values of transformers' own."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import ZayaConfig

from blockroll.model.checkpoint import resolve
from blockroll.model.earlier_transformers import ZayaConfig as Earlier

SHIPPED = json.loads((resolve("tiny-reasoner") / "config.json").read_text())


def test_the_fields_are_transformers_own() -> None:
    assert list(Earlier.__annotations__) == list(ZayaConfig.__annotations__)
    assert {name: getattr(Earlier, name) for name in Earlier.__annotations__} == {
        name: getattr(ZayaConfig, name) for name in ZayaConfig.__annotations__}  # fmt: skip


@pytest.mark.parametrize("values", [
    {},
    {"num_hidden_layers": 2, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 8},
    {"rope_parameters": {"rope_type": "default", "hybrid": {"rope_theta": 1e4}}},
    {name: value for name, value in SHIPPED.items() if name in ZayaConfig.__annotations__},
], ids=["defaults", "two kinds of layers", "as on the hub", "shipped"])  # fmt: skip
def test_what_is_derived_of_the_fields(values: dict[str, Any]) -> None:
    assert Earlier(**copy.deepcopy(values)).to_dict() == ZayaConfig(**copy.deepcopy(values)).to_dict()
