"""A run as the page's script reads it: tables of numbers in base64, texts and names once each.

Invariants:
- The page shows the newest samples that fit `MAX_TOKENS`; `totals` counts all of the run's.
- A number that is not known is NaN. A column that no sample has is null.

Little-endian arrays; `page/data.js` names the same columns. Legend: M samples, N tokens of all of them, S their steps, P prompts.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .curves import curves
from .origins import ORIGINS
from .pieces import pieces
from .run import Run
from .samples import NO_VERSION, InspectedSample

MAX_TOKENS = 2_000_000
"""Tokens in a page, prompts included: 40 MB, which a browser reads in about a second."""
_STEP_TYPES = dict(start="<u4", drafted="u1", accepted="u1", slot="u1", level="i1", length="u1", forwards="u1")


def payload(
    run: Run, tokenizer: Any, policy: str | None, samples: Sequence[InspectedSample] | None = None, live: float | None = None
) -> dict[str, Any]:
    """What the page holds of a run.

    Args:
        tokenizer: gives tokens their text; None shows ids.
        policy: its name, shown.
        samples: in place of the run's own, for instance with entropies.
        live: seconds after which the page looks for newer data; None for a page that stays as it is.
    """
    shown = _fitting(run.samples if samples is None else samples)
    names, name_M = _numbered(sample.name for sample in shown)
    finishes, finish_M = _numbered(sample.finish for sample in shown)
    prompts, prompt_M = _numbered(sample.prompt.tobytes() for sample in shown)
    prompt_P = [np.frombuffer(prompt, dtype=np.uint32) for prompt in prompts]
    ids, piece_N = np.unique(_joined([*(s.tokens for s in shown), *prompt_P], np.uint32), return_inverse=True)
    tokens = sum(len(sample.tokens) for sample in shown)
    versions = [_changes(sample.versions) for sample in shown]
    steps = [sample.steps for sample in shown]
    return {
        "title": run.title, "policy": policy, "decoded": tokenizer is not None, "live": live, "made": round(time.time(), 3),
        "totals": asdict(run.totals), "origins": ORIGINS, "curves": curves(run.metrics or ()),
        "vocabulary": {"ids": ids.tolist(), "texts": pieces(tokenizer, ids.tolist())},
        "names": names, "finishes": finishes,
        "samples": {
            "name": _packed(name_M, "<u4"), "finish": _packed(finish_M, "<u4"), "prompt": _packed(prompt_M, "<u4"),
            "number": _packed([s.number for s in shown], "<u4"), "tokens": _packed([len(s.tokens) for s in shown], "<u4"),
            "steps": _packed([0 if s is None else len(s.start) for s in steps], "<u4"),
            "traced": _packed([s is not None for s in steps], "u1"),
            "changes": _packed([len(starts) for starts, _ in versions], "<u4"),
            **{name: _packed([np.nan if (value := getattr(s, name)) is None else value for s in shown], "<f8")
               for name in ("step", "reward", "advantage", "forwards")},
        },
        "prompts": {"tokens": _packed([len(prompt) for prompt in prompt_P], "<u4"), "piece": _packed(piece_N[tokens:], "<u4")},
        "tokens": {
            "piece": _packed(piece_N[:tokens], "<u4"), "origin": _packed(_joined([s.origin for s in shown], np.uint8), "u1"),
            "logprob": _column(shown, lambda s: s.logprobs), "entropy": _column(shown, lambda s: s.entropy),
            "behavior": _column(shown, lambda s: s.behavior) if any(map(_differs, shown)) else None,
        },
        "steps": {name: _packed(_joined([getattr(s, name) for s in steps if s is not None], np.int64), kind)
                  for name, kind in _STEP_TYPES.items()},
        "versions": {"start": _packed(_joined([starts for starts, _ in versions], np.uint32), "<u4"),
                     "version": _packed(_joined([values for _, values in versions], np.int32), "<i4")},
    }  # fmt: skip


def _fitting(samples: Iterable[InspectedSample]) -> list[InspectedSample]:
    """The newest samples that have at most MAX_TOKENS tokens together, prompts counted once per group."""
    kept: list[InspectedSample] = []
    left, seen = MAX_TOKENS, set[bytes]()
    for sample in reversed(list(samples)):
        prompt = sample.prompt.tobytes()
        left -= len(sample.tokens) + (0 if prompt in seen else len(sample.prompt))
        if left < 0:
            break
        seen.add(prompt)
        kept.append(sample)
    return kept[::-1]


def _differs(sample: InspectedSample) -> bool:
    """Whether the sample was drawn from another distribution than p."""
    behavior, logprobs = sample.behavior, sample.logprobs
    return behavior is not None and (logprobs is None or not np.array_equal(behavior, logprobs, equal_nan=True))


def _changes(versions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(first token, version) of every stretch of one version."""
    if versions is None or not len(versions):
        return np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.int32)
    made = np.flatnonzero(versions != NO_VERSION)
    starts = made[np.flatnonzero(np.diff(versions[made], prepend=NO_VERSION))]
    return starts.astype(np.uint32), versions[starts]


def _numbered(values: Iterable[Any]) -> tuple[list[Any], list[int]]:
    """Distinct values in the order of their first appearance, and the index of each value."""
    known: dict[Any, int] = {}
    index = [known.setdefault(value, len(known)) for value in values]
    return list(known), index


def _joined(parts: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=kind), *parts])


def _column(
    samples: Sequence[InspectedSample], values: Callable[[InspectedSample], np.ndarray | None]
) -> str | None:
    """float32[N], NaN for samples without it; None where no sample has it."""
    columns = [values(sample) for sample in samples]
    if all(column is None for column in columns):
        return None
    unknown = (np.full(len(sample.tokens), np.nan) for sample in samples)
    parts = [nan if column is None else column for nan, column in zip(unknown, columns, strict=True)]
    return _packed(_joined(parts, np.float32), "<f4")


def _packed(values: Sequence[Any] | np.ndarray, kind: str) -> str:
    array = np.asarray(values)
    if array.size and array.dtype.kind in "iu" and kind[-2] in "iu":
        array = np.clip(array, np.iinfo(kind).min, np.iinfo(kind).max)
    return base64.b64encode(np.ascontiguousarray(array, dtype=kind).tobytes()).decode()
