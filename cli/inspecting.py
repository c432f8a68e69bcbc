"""The command that shows a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DeviceOption, DtypeOption


def inspect(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, or a file of samples.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The page; beside the run without it.", show_default=False)
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="NAME_OR_DIR", help="Gives tokens their text; without it the one that the "
                                 "run's configuration names.", show_default=False)
    ] = None,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Recompute the entropy of p with --policy, where log-probabilities agree.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="With --entropy: at which the samples were drawn; 0 scores at 1.")] = 1.0,
    most: Annotated[int, typer.Option(help="Trajectories on the page, the newest; its counts are of all.")] = 2000,
    live: Annotated[
        bool, typer.Option("--live", help="Write the page again while the run grows, until the run or Ctrl-C ends it.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Show a run's trajectories, token by token, as one HTML page.

    RUN is the directory of `blockroll grpo`, or the output of `blockroll generate` or `blockroll sample --candidates`. The
    page is one file that opens in a browser and asks the network for nothing: each token coloured by how it was made, block
    borders and levels, log-probabilities, weight versions, rewards and groups; acceptance by slot and position; curves of the
    run.

    \b
    Example:
      blockroll inspect runs/quickstart
      blockroll inspect out.jsonl --policy tiny-reasoner --entropy
    """
    from ..rollout.inspection import inspect as inspection

    inspection.inspect(run, output, policy=policy, entropy=entropy, temperature=temperature, most=most, live=live,
                       device=device, dtype=dtype)  # fmt: skip
