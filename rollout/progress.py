"""Progress of long work, on stderr: a bar on a terminal; elsewhere a plain line every few seconds and one at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

INTERVAL = 10.0
"""Seconds between two plain lines."""


class _Bars:
    """Tasks shown as bars, or as plain lines where stderr is no terminal.

    Args:
        columns: of a bar. plain: a task's fields -> its line, without its name.
    """

    def __init__(self, columns: list[ProgressColumn], plain: Callable[[Mapping[str, Any]], str], expand: bool = False) -> None:
        console = Console(stderr=True)
        self._shown = console.is_terminal
        self._progress = Progress(*columns, console=console, expand=expand, disable=not self._shown)
        self._console, self._plain = console, plain
        self._fields: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, Any] = {}
        self._written: dict[str, str] = {}
        self._next = time.monotonic() + INTERVAL

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()
        self._write()

    def update(self, name: str, total: float, completed: float, **fields: Any) -> None:
        """The state of a task; its first update shows it."""
        if name not in self._tasks and not self._shown:
            self._write()  # the last state of the task before
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, **fields)
        self._fields[name] = {"completed": completed, "total": total, **fields}
        self._progress.update(self._tasks[name], completed=completed, **fields)
        if time.monotonic() >= self._next:
            self._write()

    def _write(self) -> None:
        """One line per task that changed since its last one."""
        self._next = time.monotonic() + INTERVAL
        if self._shown:
            return
        for name, fields in self._fields.items():
            line = f"{name}: {self._plain(fields)}"
            if self._written.get(name) != line:
                self._written[name] = line
                print(line, file=self._console.file, flush=True)


class Meter:
    """What is done, tokens per second and, where forwards are counted, tokens per forward, over a `with` block.

    Args:
        total: samples expected, or tokens.
    """

    def __init__(self, title: str, total: int) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"),
                   TimeRemainingColumn()]  # fmt: skip
        self._bars = _Bars(columns, lambda f: f"{f['completed']}/{f['total']}  {f['rates']}".rstrip())
        self._title, self._total = title, total
        self._tokens = self._forwards = self._done = 0
        self._start = time.perf_counter()

    def __enter__(self) -> Meter:
        self._bars.start()
        self._bars.update(self._title, self._total, 0, rates="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, tokens: int, forwards: int, done: int = 1) -> None:
        """One more sample (or `done` of what is counted), with its tokens and the decode forwards it took."""
        self._tokens += tokens
        self._forwards += forwards
        rates = f"{self._tokens / max(time.perf_counter() - self._start, 1e-9):,.0f} tokens/s"
        if self._forwards:
            rates += f"  {self._tokens / self._forwards:.2f} tokens/forward"
        self._done = min(self._done + done, self._total)
        self._bars.update(self._title, self._total, self._done, rates=rates)


class _NoMeter(Meter):
    """Shows nothing."""

    def __init__(self) -> None:
        pass

    def advance(self, tokens: int, forwards: int, done: int = 1) -> None:
        """Nothing."""


def sample_meter(title: str, total: int, wanted: bool) -> AbstractContextManager[Meter]:
    """A Meter where one is wanted and stderr is a terminal; one that shows nothing elsewhere."""
    if wanted and total and Console(stderr=True).is_terminal:
        return Meter(title, total)
    return nullcontext(cast(Meter, _NoMeter()))


class ItemMeter:
    """How many items are done, and the name of the last one, over a `with` block.

    Args:
        total: items expected; None where the first `advance` says it. A bar that knows its total is shown at once.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[item]}"),
                   TimeRemainingColumn()]  # fmt: skip
        self._bars = _Bars(columns, lambda f: f"{f['completed']}/{f['total']}  {f['item']}".rstrip())
        self._title, self._total, self._done = title, total, 0

    def __enter__(self) -> ItemMeter:
        self._bars.start()
        if self._total is not None:
            self._bars.update(self._title, self._total, 0, item="")
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, item: str, total: int | None = None) -> None:
        """One more item."""
        self._total = total if self._total is None else self._total
        assert self._total is not None
        self._done += 1
        self._bars.update(self._title, self._total, self._done, item=item)


class TrainingMeter:
    """The stages of a conversion, one task each: tokens seen, speed, both losses (nats per token) and the mean chance that a
    draft is accepted at temperature 1. Call it with each reported row."""

    def __init__(self) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[seen]}"),
                   TextColumn("{task.fields[figures]}"), TimeRemainingColumn(compact=True)]  # fmt: skip
        self._bars = _Bars(columns, lambda f: f"{f['seen']}  {f['figures']}", expand=True)

    def __enter__(self) -> TrainingMeter:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        seen = f"{_short(row['tokens'])}/{_short(row['of'])} tokens"
        figures = f"{_short(row['tokens_per_s'])}/s  AR {row['ar_loss']:.3f}"
        if row["draft_loss"]:
            figures += f"  draft {row['draft_loss']:.3f}  accepted {row['overlap']:.2f}"
        self._bars.update(row["stage"], row["of"], min(row["tokens"], row["of"]), seen=seen, figures=figures)


def _short(count: float) -> str:
    """Three digits and a thousand's letter: 60.2k, 12.0M, 600B."""
    for unit in ("", "k", "M", "B"):
        if count < 999.5 or unit == "B":
            break
        count /= 1000
    return f"{count:.0f}{unit}" if count >= 100 or not unit else f"{count:.{1 if count >= 9.95 else 2}f}{unit}"
