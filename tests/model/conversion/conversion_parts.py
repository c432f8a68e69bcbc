"""Small conversions that several tests run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockroll.model.conversion.config import ConversionConfig, Data, Stage
from blockroll.model.conversion.data import Document, PackStream

SHAPE = dict(
    hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=2, expert_size=32, router_size=8,
    max_position_embeddings=256,
)  # fmt: skip


def recipe(folder: Path, *stages: dict[str, Any], **changes: Any) -> ConversionConfig:
    """A run of two short stages over tiny packs, or of the stages given."""
    common = dict(pack_tokens=600, autocast="float32", warmup_steps=5, report_steps=1)
    plain = (
        dict(name="ar", kind="ar", tokens=2400),
        dict(name="diffusion", kind="diffusion", tokens=2400, draft=dict(ce=0.5, tv=1.0, slot_decay=0.9)),
    )
    data = dict(
        output=str(folder / "policy"), architecture=SHAPE, data=dict(pool=8), block_size=8,
        stages=[{**common, **stage} for stage in stages or plain], save_dtype="float32",
    )  # fmt: skip
    return ConversionConfig.model_validate({**data, **changes})


def curve(folder: Path) -> list[dict[str, Any]]:
    """The log's lines without what is measured by a clock."""
    lines = (folder / "policy.log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in rows]


def packs(data: Data, tokenizer: Any, stage: Stage) -> Iterator[list[Document]]:
    """The packs of a stage, for one process."""
    for _, documents in PackStream(data, tokenizer, stage):
        yield documents
