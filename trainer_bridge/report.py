"""What a person sees of a GRPO run: the live display, and report.png from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..files import read_jsonl, whole_file
from .grpo_config import GrpoConfig


class Display:
    """A progress bar with the figures of the last step; plain lines where standard error is no terminal."""

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
        self._console.print(text, highlight=False)

    def step(self, row: dict[str, Any]) -> None:
        """Show a finished step."""
        text = (
            f"reward {row['reward']:.3f}  {row['tokens_per_s']:.0f} tokens/s  "
            f"{row['tokens_per_forward']:.2f} tokens/forward  version {row['weight_version']}"
        )
        self._progress.update(self._bar, advance=1, description=text)
        if not self._console.is_terminal:
            self.say(f"step {row['step']}  {text}")


def draw_report(output: Path) -> None:
    """Write report.png: reward, tokens per forward and where the time went, by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for _, row in read_jsonl(output / "metrics.jsonl")]
    steps = [row["step"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    axes[0].plot(steps, [row["reward"] for row in rows], color="tab:blue")
    axes[0].set(title="Mean reward of the step's trajectories", xlabel="step", ylim=(0, 1))
    axes[1].plot(steps, [row["tokens_per_forward"] for row in rows], color="tab:green")
    axes[1].set(title="Tokens per forward", xlabel="step")
    axes[1].set_ylim(bottom=0)
    parts = ("rollout", "train", "push")
    axes[2].stackplot(steps, [[row["seconds"][part] for row in rows] for part in parts], labels=parts)
    axes[2].set(title="Seconds per step", xlabel="step")
    axes[2].legend(loc="upper right")
    with whole_file(output / "report.png") as path:
        figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
