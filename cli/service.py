"""Commands that start, watch and stop a rollout service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import ConfigArgument


def up(
    context: typer.Context,
    config: ConfigArgument,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once the service answers; it goes on in the background.")
    ] = False,
    log: Annotated[Path | None, typer.Option(metavar="FILE", help="Where standard error goes.", hidden=True)] = None,
) -> None:
    """Start a rollout service: Ray, engines, and the gateway that trainers connect to.

    Prints the address once the service answers, and serves until Ctrl-C, SIGTERM or `blockroll down`. The ledger keeps
    what is unfinished: the next `up` on it goes on, at the weight version it had.

    \b
    Example:
      blockroll up configs/cluster/local.yaml --detach
    """
    from ..service import commands

    commands.up(config, detach=detach, log=log, level=context.obj)


def status(
    config: ConfigArgument,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until Ctrl-C.")] = False,
) -> None:
    """Show a service's engines, samples and weight version.

    \b
    Example:
      blockroll status configs/cluster/local.yaml --watch
    """
    from ..service import commands

    commands.status(config, as_json=json, watch=watch)


def scale(
    config: ConfigArgument,
    engines: Annotated[int, typer.Argument(metavar="N", help="Engines from now on.", show_default=False)],
) -> None:
    """Change the number of a service's engines while it works.

    \b
    Example:
      blockroll scale configs/cluster/local.yaml 3
    """
    from ..service import commands

    commands.scale(config, engines)


def down(
    config: ConfigArgument,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for what the engines hold; the ledger keeps it.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Most time to wait for what the engines hold.")] = None,
) -> None:
    """Stop a service. Engines first end the work they hold; work that no engine has begun stays in the ledger.

    \b
    Example:
      blockroll down configs/cluster/local.yaml
    """
    from ..service import commands

    commands.down(config, drain=not now, seconds=timeout)


def logs(
    config: ConfigArgument,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what is added, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option(help="How many of the last lines.")] = 100,
) -> None:
    """Print the log of a service that was started with --detach.

    \b
    Example:
      blockroll logs configs/cluster/local.yaml --follow
    """
    from ..service import commands

    commands.show_logs(config, follow=follow, lines=lines)


def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Also check what this service needs.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check whether this machine can run engines and a service, and say what to fix.

    One line per check. Exit status 1 where a check fails.

    \b
    Example:
      blockroll doctor configs/cluster/local.yaml
    """
    from ..service import doctor as examination

    if not examination.examine(config, as_json=json):
        raise typer.Exit(1)
