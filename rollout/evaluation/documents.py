"""The AR loss of a policy on documents of one's own, which it was not trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import Field

from ...errors import DataError
from ...model.checkpoint import load_policy
from ...model.conversion.config import Data, JsonLines, Parquet
from ...model.conversion.config import HuggingFace as SavedFiles
from ...model.conversion.data import Document
from ...model.conversion.data.sources import RecordPools
from ...model.device import placement
from ...model.policy import Policy
from ...model.scoring import score
from ...settings import Config
from ..progress import Meter
from .counts import ratio

FileSource = JsonLines | Parquet | SavedFiles


class Documents(Config):
    """The file of `blockroll eval --documents`."""

    documents: FileSource = Field(discriminator="kind", description="files, as a source of a conversion's data names them")


_AT_ONCE = 64
"""Documents of one call of the scorer, which packs them."""


def read_documents(source: FileSource, policy: Policy, count: int, seed: int) -> list[Document]:
    """At most `count` documents of the files, in an order that the seed decides. One that is longer than the policy's longest
    sequence becomes several.

    Raises:
        DataError: a file cannot be read, a record cannot become a document, or the policy has no tokenizer.
    """
    if policy.tokenizer is None:
        raise DataError("documents", "the policy has no tokenizer to encode them with", "put its files beside the weights")
    pools = RecordPools(source.model_copy(update={"epochs": 1}), Data(pool=count, seed=seed), 1.0, policy.tokenizer, "heldout")
    longest = policy.config.max_position_embeddings
    found = [part for _, document in pools.pool(0) or () for part in _parts(document, longest)]
    if not found:
        raise DataError("documents", "hold no token that could be predicted", "give longer ones")
    return found


def _parts(document: Document, longest: int) -> Iterator[Document]:
    for start in range(0, len(document.tokens), longest):
        part = document.part(start, min(start + longest, len(document.tokens)))
        if part is not None:
            yield part


def document_figures(
    policy_name: str | os.PathLike[str], parent_name: str | os.PathLike[str] | None, source: FileSource, count: int, seed: int,
    device: str, dtype: str | None,
) -> dict[str, Any]:
    """The losses of a policy, and of its parent where there is one, where nothing else is measured: part of what `blockroll eval`
    writes, under the same keys."""
    names = {"document_loss": policy_name} | ({} if parent_name is None else {"parent_document_loss": parent_name})
    figures: dict[str, Any] = {"standard_error": {}}
    for key, name in names.items():
        policy = load_policy(name, *placement(device, dtype))
        documents = read_documents(source, policy, count, seed)
        figures["documents"] = len(documents)
        figures[key], figures["standard_error"][key] = document_loss(policy, documents)
    return figures


def document_loss(policy: Policy, documents: list[Document], title: str = "documents") -> tuple[float, float]:
    """Nats per learned token, and its standard error over documents."""
    losses, counts = [], []
    with Meter(title, len(documents)) as meter:
        for start in range(0, len(documents), _AT_ONCE):
            some = documents[start : start + _AT_ONCE]
            scored = score(policy, [(tuple(d.tokens[:1]), tuple(d.tokens[1:])) for d in some])
            for document, logprobs in zip(some, scored, strict=True):
                learned = np.concatenate([logprobs[max(a, 1) - 1 : b - 1] for a, b in document.spans])
                losses.append(-float(learned.sum(dtype=np.float64)))
                counts.append(len(learned))
                meter.advance(len(document.tokens), 0)
    return ratio(losses, counts)
