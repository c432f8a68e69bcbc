"""`blockroll COMMAND`: arguments in, one call into the package, one line out when something is wrong.

Invariants:
- What a user can cause ends as one line on stderr and exit status 2; a full disk too, wherever it is met. What is a
  bug of ours keeps its traceback and exits with 1. Ctrl-C exits with 130.
- Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import BlockrollError
from ..files import storage_error
from ..service import logs
from . import decoding, measuring, service, training

app = typer.Typer(
    name="blockroll",
    help="Rollouts for reinforcement learning of language models, decoded block by block, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")
kernels = typer.Typer(help="The Triton kernels.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(kernels, name="kernels")

for _command in (service.up, service.status, service.scale, service.down, service.logs, service.doctor):
    app.command()(_command)
app.command("grpo")(training.grpo)
app.command("convert")(training.convert)
app.command("ablate")(training.ablate)
app.command("eval")(measuring.evaluate)
app.command("ask")(decoding.ask)
app.command("generate")(decoding.generate)
app.command("score")(decoding.score)
app.command("plan")(measuring.plan)
bench.command("decode")(measuring.bench_decode)
bench.command("gpu")(measuring.bench_gpu)
bench.command("planner")(measuring.bench_planner)
kernels.command("check")(measuring.kernels_check)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"blockroll {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    log_level: Annotated[
        str | None, typer.Option(metavar="debug|info|warning|error", help="Log lines of at least this level go to standard "
                                 "error; without it warnings, and for `up` what its configuration says.")
    ] = None,
) -> None:
    logs.configure(log_level or "warning")
    context.obj = log_level


def main() -> None:
    """Runs the command line; does not return."""
    try:
        app()
    except Exception as error:
        # An error raised inside a Ray task arrives wrapped, with the task's traceback in its text.
        cause = getattr(error, "cause", None)
        known = next((e for e in (error, cause) if isinstance(e, BlockrollError)), None) or storage_error(error)
        if known is None:
            raise
        print(f"error: {' '.join(str(known).split())}", file=sys.stderr)
        sys.exit(2)
