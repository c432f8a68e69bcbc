"""The command: reads a run, writes its page, and with `live` writes it again while the run grows.

A live page needs no server: each writing replaces the file whole, and an open page takes the newer data out of it
(`page/live.js`). It ends with the run's summary.json or with Ctrl-C; the last page that is written stays as it is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, DataError, InvalidInput
from ...files import check_output, write_atomic
from ...model.checkpoint import load_policy, resolve
from ...model.device import placement
from ...model.tokenizer_files import read_tokenizer
from .entropy import with_entropy
from .page import page
from .payload import payload
from .run import Run
from .samples import InspectedSample

MAX_SAMPLES = 100_000
LIVE_SECONDS = 2.0
"""Seconds between two looks at a growing run."""
LIVE_SHARE = 0.1
"""Most of the time that writing may take: a long run's page is written less often."""
SUMMARY = "summary.json"


def inspect(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    policy: str | None = None,
    entropy: bool = False,
    temperature: float = 1.0,
    most: int = 2000,
    live: bool = False,
    device: str = "auto",
    dtype: str | None = None,
) -> Path:
    """Writes the page of a run and returns its path.

    Args:
        path: a GRPO run's directory, or a file as `blockroll generate` or `blockroll sample --candidates` writes it.
        output: where the page goes; `inspect.html` in the run's directory, or the file's name with `.html`.
        policy: gives tokens their text; without it the policy that a run's configuration names, where it can be read.
        entropy: recompute p with that policy, for the samples whose log-probabilities it reproduces at `temperature`.
        most: samples on the page, the newest; its counts are of the whole run.
        live: go on until the run is finished.
        device, dtype: where and as what the policy runs, for `entropy`.

    Raises:
        InvalidInput: an option cannot be used. DataError: there is no run at the path, or a line of it cannot be read.
        StorageError: the page could not be written.
    """
    if not 1 <= most <= MAX_SAMPLES:
        raise InvalidInput("most", f"{most} is outside 1..{MAX_SAMPLES}", "show at least one sample")
    if entropy and policy is None:
        raise InvalidInput("entropy", "given without a policy", "name the policy that made the samples (--policy)")
    if entropy and live:
        raise InvalidInput("entropy", "given together with live", "score the run when it is finished")
    run = Run.find(path, most, live)
    place = Path(path)
    target = Path(output) if output is not None else place / "inspect.html" if place.is_dir() else place.with_suffix(".html")
    check_output(target, run.rollouts.path)
    name = policy or run.policy
    tokenizer = _tokenizer(name, required=policy is not None)
    run.encode = None if tokenizer is None else partial(tokenizer.encode, add_special_tokens=False)
    run.read()
    if not run.samples and not live:
        raise DataError(os.fspath(run.rollouts.path), "holds no samples", "give a file with at least one line")
    _check_text(run.samples, tokenizer)
    samples = with_entropy(load_policy(policy, *placement(device, dtype)), list(run.samples), temperature) \
        if entropy and policy is not None else None  # fmt: skip
    shown = None if tokenizer is None else os.path.basename(os.path.normpath(name or ""))
    try:
        if live:
            _follow(run, place, target, tokenizer, shown)
    finally:  # Ctrl-C too leaves a page that stays as it is
        write_atomic(target, page(payload(run, tokenizer, shown, samples)))
    known = sum(sample.entropy is not None for sample in samples or ())
    note = f", entropies of {known}" if entropy else ""
    print(f"{target}: {run.totals.trajectories} trajectories{note}")
    return target


def _follow(run: Run, place: Path, target: Path, tokenizer: Any, policy: str | None) -> None:
    """Writes the page whenever the run has grown, until it is finished."""
    print(f"{target}: follows {place}; Ctrl-C ends it", file=sys.stderr, flush=True)
    changed, pause = True, LIVE_SECONDS
    while True:
        finished = (place / SUMMARY).exists()
        if run.read() or changed:
            began = time.monotonic()
            write_atomic(target, page(payload(run, tokenizer, policy, live=pause)))
            pause = max(LIVE_SECONDS, (time.monotonic() - began) / LIVE_SHARE)
        if finished:
            return
        changed = False
        time.sleep(pause)


def _tokenizer(name: str | None, required: bool) -> Any:
    """The tokenizer of a policy; None without one. Only of a policy that the user names must it be there."""
    if name is None:
        return None
    try:
        tokenizer = read_tokenizer(resolve(name))
    except CheckpointError:
        if required:
            raise
        return None
    if tokenizer is None and required:
        raise InvalidInput("policy", f"{name} has no tokenizer", "leave it out to see token ids, or name one that has")
    return tokenizer


def _check_text(samples: Sequence[InspectedSample], tokenizer: Any, some: int = 8) -> None:
    """Refuses a tokenizer that gives other texts than the run holds."""
    known = [sample for sample in samples if sample.text][:some]
    if tokenizer is None or not known:
        return
    if not any(_decoded(tokenizer, sample).startswith(sample.text or "") for sample in known):
        raise InvalidInput("policy", "its tokenizer gives other texts than the run's lines hold",
                           "name the policy that made the samples")  # fmt: skip


def _decoded(tokenizer: Any, sample: InspectedSample) -> str:
    try:
        return tokenizer.decode(sample.tokens.tolist(), skip_special_tokens=True)
    except (IndexError, KeyError, OverflowError, TypeError, ValueError):
        return ""
