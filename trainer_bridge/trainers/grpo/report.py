"""Shows a GRPO run: a live display, and report.png from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ....files import whole_file
from .config import GrpoConfig
from .metrics import METRICS, SPAN, Row, read_rows

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # told apart by colour-blind eyes too


class Display:
    """A progress bar with the figures of the last step; plain lines when standard error is no terminal."""

    def __init__(self, config: GrpoConfig) -> None:
        self._console = Console(stderr=True)
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
                self.say(f"step {row['step']}  {text}")
        if "heldout_accuracy" in row:
            self.say(f"held-out after step {row['step']}: {row['heldout_accuracy']:.3f} at the training temperature, "
                     f"{row['heldout_greedy']:.3f} greedy ({row['heldout_tasks']} tasks)")


def draw_report(output: Path) -> None:
    """Writes report.png of the run in `output`: what was learned in the upper row, what it cost in the lower row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(output / METRICS)
    trained, measured = [r for r in rows if r["step"]], [r for r in rows if "heldout_accuracy" in r]
    steps = [r["step"] for r in trained]
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    (reward, heldout, length), (entropy, forward, seconds) = axes

    values = [r["reward"] for r in trained]
    reward.plot(steps, values, color=_GREY, marker=".", lw=0.8, label="step")
    reward.plot(steps, running_mean(values, SPAN), color=_BLUE, lw=2, label=f"mean of the last {SPAN} steps")
    reward.set(title=f"Mean reward: {values[0]:.2f} to {values[-1]:.2f}")
    reward.legend(loc="lower right")
    for name, label, color in (("accuracy", "training temperature", _BLUE), ("greedy", "greedy", _ORANGE)):
        shares = [r[f"heldout_{name}"] for r in measured]
        errors = [2 * r[f"heldout_{name}_standard_error"] for r in measured]
        heldout.errorbar([r["step"] for r in measured], shares, errors, color=color, marker="o", capsize=3, label=label)
        length.plot([r["step"] for r in measured], [r[f"heldout_{name}_tokens"] for r in measured], color=color, marker="o",
                    label=f"held-out, {label}")
    heldout.set(title=f"Held-out accuracy, {measured[-1]['heldout_tasks']} tasks, ± 2 standard errors")
    heldout.legend(loc="lower right")
    length.plot(steps, [r["answer_tokens"] for r in trained], color=_GREY, marker=".", lw=0.8, label="rollouts")
    length.set(title="Answer length, tokens")
    length.set_ylim(bottom=0)
    length.legend(loc="lower right")
    entropy.plot(steps, [r["entropy"] for r in trained], color=_BLUE, marker=".")
    entropy.set(title="Entropy of p (mean of -log p), nats per token")
    entropy.set_ylim(bottom=0)
    forward.plot(steps, [r["tokens_per_forward"] for r in trained], color=_GREEN, marker=".")
    forward.set(title="Tokens per forward")
    forward.set_ylim(bottom=0)
    parts = ("rollout", "train", "push")
    seconds.stackplot(steps, [[r["seconds"].get(part, 0.0) for r in trained] for part in parts], labels=parts,
                      colors=(_BLUE, _ORANGE, _GREEN))  # fmt: skip
    used, groups = (sum(r[key] for r in trained) for key in ("groups_used", "groups"))
    seconds.set(title=f"Seconds per step; {used} of {groups} groups trained on")
    seconds.legend(loc="upper right")
    for axis in (reward, heldout):  # rewards of one's own may lie outside 0..1
        low, high = axis.get_ylim()
        axis.set_ylim(min(0, low) if low < -0.1 else 0, max(1, high) if high > 1.1 else 1)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with whole_file(output / "report.png") as path:
        figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def running_mean(values: list[float], span: int) -> list[Any]:
    """Mean of each value and up to span - 1 before it."""
    return [float(np.mean(values[max(0, i + 1 - span) : i + 1])) for i in range(len(values))]
