"""What several commands take, and lists as they are written on a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidInput
from ..rollout.schedule import DEFAULT_LEVELS

PolicyOption = Annotated[
    str, typer.Option("--policy", metavar="NAME_OR_DIR", help="A shipped policy, or a directory with a ZAYA model.")
]
PolicyArgument = Annotated[
    str | None, typer.Argument(metavar="POLICY", help="A shipped policy, or a directory with a ZAYA model.", show_default=False)
]
NamedPolicy = Annotated[
    str | None, typer.Option("--policy", metavar="NAME_OR_DIR", help="In place of POLICY.", show_default=False)
]
InputOption = Annotated[Path, typer.Option("--input", metavar="FILE", help="One JSON object per line.")]
OutputOption = Annotated[Path, typer.Option("--output", metavar="FILE", help="Written whole, or not at all.")]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda|cuda:N", help="auto: a GPU if there is one; a ROCm GPU is cuda too.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(metavar="float32|bfloat16|float16|float64", help="Without it bfloat16 on a GPU and float32 on a CPU.",
                 show_default=False),
]
LEVELS = ",".join(map(str, DEFAULT_LEVELS))
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]


def one_policy(argument: str | None, named: str | None) -> str:
    """The policy of a command that takes it as POLICY, as `vllm serve` does, or by `--policy`. Raises InvalidInput."""
    if argument is not None and named is not None:
        raise InvalidInput("policy", f"{argument!r} and --policy {named!r} given", "give one of the two")
    if (given := argument if named is None else named) is None:
        raise InvalidInput("policy", "none given", "name a shipped policy, such as tiny-reasoner, or a directory")
    return given


def words(text: str) -> list[str]:
    """`a, b` as ["a", "b"]."""
    return [word.strip() for word in text.split(",") if word.strip()]


def integers(name: str, text: str) -> tuple[int, ...]:
    """`0,4,8` as numbers; `name` is what the error calls the option."""
    try:
        return tuple(int(word) for word in words(text))
    except ValueError:
        raise InvalidInput(name, f"{text!r} is not a list of whole numbers", "write them like 0,4,8") from None


def numbers(name: str, text: str) -> tuple[float, ...]:
    """`0.25,0.5` as numbers; `name` is what the error calls the option."""
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise InvalidInput(name, f"{text!r} is not a list of numbers", "write them like 0.25,0.5") from None
