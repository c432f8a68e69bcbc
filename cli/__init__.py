"""`blockroll COMMAND`: arguments in, one call into the package, one line out when something is wrong.

Invariants:
- What a user can cause ends as one line on stderr and exit status 2; a full disk too, wherever it is met. What is a
  bug of ours keeps its traceback and exits with 1.
- Ctrl-C, SIGTERM and SIGHUP end every command alike: what it started is stopped, what it had not finished is removed, one
  line is printed, and the exit status is 128 + the signal's number.
- Nothing heavy is imported before a command runs, so `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from ..errors import BlockrollError
from ..files import storage_error
from ..service import logs
from . import decoding, inspecting, measuring, searching, service, training

app = typer.Typer(
    name="blockroll",
    help="Rollouts for reinforcement learning of language models, decoded block by block, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")
kernels = typer.Typer(help="The Triton kernels.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(kernels, name="kernels")

_COMMANDS: tuple[Callable[..., None], ...] = (
    service.up, service.status, service.scale, service.down, service.logs, service.doctor,
    training.grpo, training.convert, training.ablate,
    decoding.ask, decoding.generate, decoding.score, searching.sample, searching.tradeoff, inspecting.inspect, measuring.plan,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)
app.command("eval")(measuring.evaluate)
for _name, _command in (("decode", measuring.bench_decode), ("gpu", measuring.bench_gpu), ("planner", measuring.bench_planner)):
    bench.command(_name)(_command)
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


LONGEST_LINE = 1000
"""Characters of an error; some hold a value that a user gave."""


def main() -> None:
    """Runs the command line; does not return."""
    with _stopped_by_signals() as received:
        try:
            status = app(standalone_mode=False) or 0
        except KeyboardInterrupt:
            status = 130
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]  # typer brings its own copy of click, or takes click's
                sys.exit(2)
            line = _explained(error)
            if line is None:
                raise
            _say(f"error: {line}")
            sys.exit(2)
        if status == 130:  # what typer makes of a KeyboardInterrupt
            number = signal.Signals(received[0] if received else signal.SIGINT)
            _say(f"stopped by {number.name}")
            status = 128 + number
        sys.exit(status)


@contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does; yields the numbers of those received. A second one changes
    nothing, but for Ctrl-C. A signal that the caller ignores, as nohup does, stays ignored."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if _compiles(frame):
            again = threading.Timer(0.05, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        received.append(number)
        if len(received) == 1 or number == signal.SIGINT:
            raise KeyboardInterrupt

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {n: handler for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _compiles(frame: FrameType | None) -> bool:
    """Whether this is inside LLVM's callbacks: an exception there is lost, and LLVM reads what was not returned."""
    while frame is not None:
        if f"{os.sep}llvmlite{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def _explained(error: Exception) -> str | None:
    """What a user is told of an error; None where it is a bug of ours."""
    # An error raised inside a Ray task arrives wrapped, with the task's traceback in its text.
    cause = getattr(error, "cause", None)
    known = next((e for e in (error, cause) if isinstance(e, BlockrollError)), None) or storage_error(error)
    if known is not None:
        return str(known)
    if hasattr(error, "format_message"):  # of the command line itself
        context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
        given = "" if parameter is None else _given(parameter.opts)
        return f"{error.format_message().rstrip('.')}{given}; see {context.command_path if context else 'blockroll'} --help"
    if isinstance(error, MemoryError):
        return f"memory: there is not enough for this ({error}); lower batch, n or max_tokens, or take a smaller policy"
    return None


def _given(names: list[str]) -> str:
    """What the command line gives for an option, in brackets; nothing where it is not there."""
    words = sys.argv[1:]
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word in names and following is not None:
            return f" ({following!r})"
        if any(word.startswith(f"{name}=") for name in names):
            return f" ({word.partition('=')[2]!r})"
    return ""


def _say(text: str) -> None:
    """One line, whatever the text holds."""
    line = " ".join(text.split())
    if len(line) > LONGEST_LINE:  # the field stands at the beginning, the remedy at the end
        line = f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"
    print(line, file=sys.stderr)
