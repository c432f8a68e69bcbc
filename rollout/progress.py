"""Live display of long work on stderr; where that is no terminal, its last state once at the end."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Meter:
    """What is done, tokens per second and, where forwards are counted, tokens per forward, over a `with` block.

    Args:
        total: samples expected, or tokens.
    """

    def __init__(self, title: str, total: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(), console=Console(stderr=True),
        )
        self._task = self._progress.add_task(title, total=total, rates="")
        self._tokens = self._forwards = self._done = 0
        self._total = total
        self._start = time.perf_counter()

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, tokens: int, forwards: int, done: int = 1) -> None:
        """One more sample (or `done` of what is counted), with its tokens and the decode forwards it took."""
        self._tokens += tokens
        self._forwards += forwards
        rates = f"{self._tokens / max(time.perf_counter() - self._start, 1e-9):,.0f} tokens/s"
        if self._forwards:
            rates += f"  {self._tokens / self._forwards:.2f} tokens/forward"
        self._done = min(self._done + done, self._total)
        self._progress.update(self._task, completed=self._done, rates=rates)


class TrainingMeter:
    """The stages of a conversion, one bar each: tokens seen, speed, both losses (nats per token) and the mean chance that a
    draft is accepted at temperature 1. Call it with each reported row."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[seen]}"),
            TextColumn("{task.fields[figures]}"), TimeRemainingColumn(compact=True), console=Console(stderr=True), expand=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> TrainingMeter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, row: dict[str, Any]) -> None:
        name = row["stage"]
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=row["of"], seen="", figures="")
        seen = f"{_short(row['tokens'])}/{_short(row['of'])} tokens"
        figures = f"{_short(row['tokens_per_s'])}/s  AR {row['ar_loss']:.3f}"
        if row["draft_loss"]:
            figures += f"  draft {row['draft_loss']:.3f}  accepted {row['overlap']:.2f}"
        self._progress.update(self._tasks[name], completed=min(row["tokens"], row["of"]), seen=seen, figures=figures)


def _short(count: float) -> str:
    """Three digits and a thousand's letter: 60.2k, 12.0M, 600B."""
    for unit in ("", "k", "M", "B"):
        if count < 999.5 or unit == "B":
            break
        count /= 1000
    return f"{count:.0f}{unit}" if count >= 100 or not unit else f"{count:.{1 if count >= 9.95 else 2}f}{unit}"
