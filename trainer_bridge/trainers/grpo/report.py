"""Shows a GRPO run: a live display, and report.png from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ....rollout.plot_style import BLUE, GREEN, GREY, ORANGE, at_least_zero, head, picture, series
from ....settings import load_yaml
from .config import GrpoConfig
from .metrics import METRICS, SPAN, Row, read_rows


class Display:
    """A progress bar with the figures of the last step; plain lines when standard error is no terminal."""

    def __init__(self, config: GrpoConfig) -> None:
        self._console = Console(stderr=True)
        self._steps = config.steps
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=config.steps)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def row(self, row: Row) -> None:
        """Show a line of metrics."""
        if row["step"]:
            text = (
                f"reward {row['reward']:.3f}  groups {row['groups_used']}/{row['groups']}  {row['tokens_per_s']:.0f} tokens/s  "
                f"{row['tokens_per_forward']:.2f} tokens/forward  version {row['weight_version']}"
            )
            self._progress.update(self._bar, completed=row["step"], description=text)
            if not self._console.is_terminal:
                self.say(f"step {row['step']}/{self._steps}  {text}")
        if "heldout_accuracy" in row:
            self.say(f"held-out after step {row['step']}: {row['heldout_accuracy']:.3f} at the training temperature, "
                     f"{row['heldout_greedy']:.3f} greedy ({row['heldout_tasks']} tasks)")


def draw_report(output: Path) -> None:
    """Writes report.png of the run in `output`: what was learned, and what it cost."""
    rows, config = read_rows(output / METRICS), load_yaml(output / "config.yaml", GrpoConfig)
    trained, measured = [r for r in rows if r["step"]], [r for r in rows if "heldout_accuracy" in r]
    steps, samples = [r["step"] for r in trained], config.tasks.prompts_per_step * config.tasks.samples_per_prompt
    detail = f"{config.policy}, {config.steps} steps of {samples} samples, sampler {config.rollouts.sampler}, seed {config.seed}."

    def curve(axes: Any, key: str, finding: str, what: str, colour: str) -> None:
        values = [r[key] for r in trained]
        axes.plot(steps, values, color=colour, marker="o", markersize=2.5)
        at_least_zero(axes, values)
        head(axes, finding.format(_between(values)), what)

    with picture(output / "report.png", 3, 2, 8.4, detail) as ((reward, heldout), (length, entropy), (forward, seconds)):
        values = [r["reward"] for r in trained]
        smooth = running_mean(values, SPAN)
        reward.plot(steps, values, color=GREY, marker=".", lw=0.8, label=f"step, {samples} samples")
        reward.plot(steps, smooth, color=BLUE, lw=2.2, label=f"mean of the last {SPAN} steps")
        head(reward, f"Reward: {_between(smooth)}", "mean reward of a step's samples")
        _around_shares(reward)
        reward.legend(loc="best")
        _draw_heldout(heldout, length, measured)
        lengths = [r["answer_tokens"] for r in trained]
        length.plot(steps, lengths, color=GREY, marker=".", lw=0.8, label="rollouts")
        at_least_zero(length, lengths + [r[f"heldout_{name}_tokens"] for r in measured for name, _, _ in _KINDS])
        length.legend(loc="best")
        curve(entropy, "entropy", "Surprise: {}", "mean of -log p of the rollouts, nats per token", BLUE)
        curve(forward, "tokens_per_forward", "Tokens per forward: {}", "of the rollouts, prefill left out", GREEN)
        _draw_seconds(seconds, steps, trained)
        for axis in (reward, heldout, length, entropy, forward, seconds):
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)


_KINDS = (("accuracy", "training temperature", series(0)), ("greedy", "greedy", series(1)))


def _around_shares(axes: Any) -> None:
    """From 0 to 1, and further where rewards of one's own lie outside."""
    low, high = axes.get_ylim()
    axes.set_ylim(low if low < -0.1 else 0, high if high > 1.1 else 1.02)


def _draw_heldout(accuracy: Any, length: Any, measured: list[Row]) -> None:
    """Accuracy and answer length on the held-out tasks."""
    tasks, steps = measured[-1]["heldout_tasks"], [r["step"] for r in measured]
    for name, label, style in _KINDS:
        shares = [r[f"heldout_{name}"] for r in measured]
        accuracy.errorbar(steps, shares, [2 * r[f"heldout_{name}_standard_error"] for r in measured], label=label, **style)
        length.plot(steps, [r[f"heldout_{name}_tokens"] for r in measured], label=f"held-out, {label}", **style)
    ends = [(r["heldout_accuracy"], r["heldout_greedy"]) for r in (measured[0], measured[-1])]
    head(accuracy, f"Held-out: {_between([end[0] for end in ends])}, greedy {_between([end[1] for end in ends])}",
         f"accuracy on {tasks} tasks, bars: 2 standard errors to each side")
    _around_shares(accuracy)
    accuracy.legend(loc="best")
    lengths = [r["heldout_accuracy_tokens"] for r in measured]
    head(length, f"Answer length: {_between(lengths)} tokens", "mean tokens of an answer; the title speaks of the held-out tasks")


def _draw_seconds(axes: Any, steps: list[int], trained: list[Row]) -> None:
    """Where the time of a step goes."""
    parts = ("rollout", "train", "push")
    seconds = [[r["seconds"].get(part, 0.0) for r in trained] for part in parts]
    axes.stackplot(steps, seconds, labels=parts, colors=(BLUE, ORANGE, GREEN), edgecolor="white", linewidth=0.5)
    sums = np.sum(seconds, axis=1)
    used, groups = (sum(r[key] for r in trained) for key in ("groups_used", "groups"))
    longest = int(sums.argmax())
    share = 100 * sums[longest] / max(sums.sum(), 1e-9)
    head(axes, f"{sums.sum() / len(trained):.1f} s per step, {share:.0f} % of it {parts[longest]}",
         f"seconds per step, stacked; {used} of {groups} groups trained on")
    at_least_zero(axes, np.sum(seconds, axis=0).tolist(), above=1.3)
    axes.legend(loc="upper center", ncols=3)


def _between(values: list[float]) -> str:
    """The first and the last value, with the digits that tell them apart."""
    digits = 0 if max(map(abs, values)) >= 20 else 2
    return f"{values[0]:.{digits}f} to {values[-1]:.{digits}f}"


def running_mean(values: list[float], span: int) -> list[Any]:
    """Mean of each value and up to span - 1 before it."""
    return [float(np.mean(values[max(0, i + 1 - span) : i + 1])) for i in range(len(values))]
