"""Commands that make or train a policy."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import ConfigArgument


def grpo(
    config: ConfigArgument,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the output directory.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output directory.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT|CONFIG", help="A service that is up, by its address or by the "
                                 "configuration it was started with; the run starts none.")
    ] = None,
    keys: Annotated[
        str | None, typer.Option(metavar="DIR", help="With --address: the directory of that service's keys.")
    ] = None,
) -> None:
    """Train a policy with GRPO.

    Starts a rollout service, or uses the one at --address, and a trainer that talks to it over the bridge; writes
    metrics.jsonl, summary.json and report.png to the run's directory. A run that was killed goes on with --resume, to the
    same trajectories.

    \b
    Example:
      blockroll grpo configs/grpo/quickstart.yaml
      blockroll grpo configs/grpo/quickstart.yaml --resume
      blockroll grpo configs/grpo/quickstart.yaml --address configs/cluster/local.yaml
    """
    from functools import partial

    from ..service.of_run import service_of
    from ..trainer_bridge.trainers.grpo import run

    run.run(config, partial(service_of, address=address, keys=keys), resume, overwrite)


def convert(config: ConfigArgument) -> None:
    """Convert an autoregressive ZAYA policy to block diffusion.

    Trains through the stages of CONFIG (an autoregressive parent first, where none is given) and writes a policy
    directory with its recipe, training log, the figures measured on held-out tasks and a card. An interrupted run goes
    on from where it was; a finished one is only measured again. Several processes share the work under torchrun, or
    where CONFIG names Ray as its launcher.

    \b
    Example:
      blockroll convert configs/conversion/tiny-reasoner.yaml
      torchrun --nproc-per-node 8 -m blockroll.cli convert CONFIG
    """
    from ..rollout.conversion import convert as conversion

    conversion.convert(config)


def ablate(
    config: ConfigArgument,
    workers: Annotated[int, typer.Option(help="Processes that train and measure.")] = 1,
) -> None:
    """Measure what each part of a conversion recipe is worth.

    From one autoregressive parent, trains every variant of CONFIG with every seed, decodes each
    with the engine, and writes a JSON, a Markdown table and a plot beside CONFIG, under its name. A finished cell is not
    run again.

    \b
    Example:
      blockroll ablate configs/conversion/ablation.yaml
    """
    from ..rollout.conversion import ablation

    ablation.ablate(config, workers)
