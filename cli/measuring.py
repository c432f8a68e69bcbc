"""Commands that measure a policy or a machine, or predict one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import LEVELS, DeviceOption, DtypeOption, PolicyOption, integers, numbers, words

TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
RoundsOption = Annotated[int, typer.Option(help="Measured rounds, 3 or more; figures are medians over them.")]


def evaluate(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="A shipped policy, or a directory.", show_default=False)],
    parent: Annotated[
        str | None, typer.Option(metavar="NAME_OR_DIR", help="The AR policy it was converted from, decoded beside it.")
    ] = None,
    tasks: Annotated[int, typer.Option(help="Held-out tasks.")] = 500,
    samples: Annotated[
        int | None, typer.Option(help="Of each task at the first temperature, elsewhere one; without it the largest k, or 4.")
    ] = None,
    samplers: Annotated[str, typer.Option(help="Beside ar, which is always measured.")] = "ar,lossless,mixed",
    mix_weights: Annotated[str, typer.Option(help="mixed: weights of p's logits.")] = "0.25,0.5,0.75",
    temperatures: Annotated[str, typer.Option(help="pass@k and acceptance are measured at the first.")] = "1.0,0.3",
    levels: Annotated[str, typer.Option(help="Acceptance lengths a step drafts for.")] = LEVELS,
    block_sizes: Annotated[str, typer.Option(help="Compared slot by slot; the rest is at the policy's own.")] = "8,16",
    draft_temperatures: Annotated[
        str | None, typer.Option(metavar="0.5,0.7,1", help="Temperatures of drafts, over the samples' own, to compare.")
    ] = None,
    k: Annotated[
        str | None, typer.Option("--k", metavar="1,2,4,...", help="For pass@k; without it the powers of 2 up to samples.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples decoded at once; tokens per forward do not depend on it.")] = 32,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Another one draws other held-out tasks.")] = 0,
    source: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Tasks of one's own: a file like the section tasks.source of a GRPO run.")
    ] = None,
    documents: Annotated[
        Path | None, typer.Option(metavar="YAML", help="Also the AR loss on one's own documents: a file with that section.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the figures there, a plot beside.")] = None,
    card: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the model card there, Markdown.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every table: pass@k, families, drafts.")] = False,
) -> None:
    """Measure what a policy is worth on held-out tasks.

    AR loss, entropy, tokens per forward by sampler and temperature, pass@k beside the AR parent, acceptance by slot, block
    size and kind of token. Ends with an error where a task is among what the recipe beside the policy trained on.

    \b
    Example:
      blockroll eval tiny-reasoner --json eval.json
      blockroll eval runs/tiny-reasoner/policy --parent runs/tiny-reasoner/policy.ar --k 1,2,4,8,16,32 --json eval.json
      blockroll eval runs/mine/policy --source my_tasks.yaml
    """
    from ..model.tasks.own_config import TaskSource
    from ..rollout.evaluation import report
    from ..rollout.evaluation.documents import Documents
    from ..rollout.evaluation.options import Options
    from ..settings import load_yaml

    groups = None if k is None else integers("k", k)
    options = Options(
        tasks=tasks, samples=samples if samples is not None else max(1, *(groups or (4,))), k=groups,
        samplers=tuple(words(samplers)),  # type: ignore[arg-type]  # validated by the class
        mix_weights=numbers("mix-weights", mix_weights), temperatures=numbers("temperatures", temperatures),
        levels=integers("levels", levels), block_sizes=integers("block-sizes", block_sizes),
        draft_temperatures=() if draft_temperatures is None else numbers("draft-temperatures", draft_temperatures), batch=batch,
        max_tokens=max_tokens, seed=seed, device=device, dtype=dtype,
    )
    own = None if source is None else load_yaml(source, TaskSource)
    files = None if documents is None else load_yaml(documents, Documents).documents
    report.evaluate_and_show(
        policy, options, everything, source=own, documents=files, parent_name=parent, json_path=json, card_path=card
    )


def plan(
    model: Annotated[str, typer.Option(help="zaya1-8b, a shipped policy, or a directory with a ZAYA model.")] = "zaya1-8b",
    hardware: Annotated[str, typer.Option(metavar="mi300x,mi355x,h200,h100", help="Devices.")] = "mi300x,mi355x,h200",
    batch: Annotated[str, typer.Option(help="Samples decoded at once.")] = "1,8,16,32,64,128",
    context: Annotated[str, typer.Option(help="Tokens before the step.")] = "2048,16384",
    tpf: Annotated[float, typer.Option(help="Tokens that a step with a whole block of drafts commits.")] = 4.6,
    survival: Annotated[str, typer.Option(help="Instead: P(at least k drafts accepted), k = 1, 2, ..")] = "",
    measured: Annotated[Path | None, typer.Option(metavar="PATH", help="JSON of `blockroll bench gpu`.")] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write everything there.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print the long tables too.")] = False,
) -> None:
    """Predict decoding speed from a policy's sizes and a device's data sheet.

    Bytes and FLOPs of a step by schedule, experts touched, proposals until attention is compute-bound, and the schedule
    that should pay most, by peak rates and by rates that kernels reach. --tpf defaults to the published figure of
    ZAYA1-8B-Diffusion-Preview's lossless sampler; its mixed sampler's is 7.7.

    \b
    Example:
      blockroll plan --model zaya1-8b --hardware mi300x,h200 --batch 1,16,64
    """
    from ..rollout.planning import plan as planning

    planning.plan(
        model, words(hardware), integers("batch", batch), integers("context", context), tokens_per_step=tpf,
        survival=numbers("survival", survival), measured=measured, output=json, everything=everything,
    )


def bench_decode(
    policy: PolicyOption,
    batch: Annotated[str, typer.Option(help="Samples decoded at once, one or several.")] = "1,8",
    samplers: Annotated[str, typer.Option(help="Samplers to measure; ar is always measured.")] = "ar,lossless",
    schedule: Annotated[
        str, typer.Option(metavar="auto|ar|two_pass|fused", help="What steps run, but for ar; auto: the planner chooses.")
    ] = "auto",
    peer: Annotated[
        str | None, typer.Option(metavar="transformers,..", help="Compare with transformers, transformers-lookup (its "
                                 "prompt-lookup decoding), transformers-continuous (its continuous batching).")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the rows there.")] = None,
    temperature: TemperatureOption = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per sample.")] = 128,
    rounds: RoundsOption = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Measure decoding: tokens per second, tokens per forward, and the ratio to autoregressive decoding.

    All are measured in turn within one run, prefill included, next to a check of what was decoded. Rows of the JSON:
    {"engine", "sampler", "schedule", "batch", "context", "temperature", "tokens_per_s" (median), "tokens_per_forward",
    "ratio_to_ar", ...}.

    \b
    Example:
      blockroll bench decode --policy tiny-reasoner --batch 1,8 --samplers ar,lossless --peer transformers \\
        --json decode.json
    """
    from ..rollout.bench import decode as benchmark

    benchmark.bench_decode(
        policy, batches=integers("batch", batch), samplers=tuple(words(samplers)), schedule=schedule, peer=peer,
        output=json, temperature=temperature, max_tokens=max_tokens, rounds=rounds, device=device, dtype=dtype,
    )


def bench_planner(
    policy: PolicyOption,
    batch: Annotated[int, typer.Option(help="Requests at the start; the batch falls from this to 1.")] = 32,
    sampler: Annotated[
        str, typer.Option(metavar="coupled|lossless|mixed", help="coupled: everyone makes the same tokens.")
    ] = "coupled",
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the figures there.")] = None,
    temperature: TemperatureOption = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the longest request.")] = 128,
    rounds: RoundsOption = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every schedule, not the fastest ones alone.")] = False,
) -> None:
    """Measure what the planner chooses against every fixed schedule in hindsight.

    A fixed list of requests that end one after another, served by each schedule in turn and by the planner: total time
    and tokens per second of each, and per range of batches the best schedule and what the planner chose.

    \b
    Example:
      blockroll bench planner --policy tiny-reasoner --json planner.json
    """
    from ..rollout.bench import planner as benchmark

    benchmark.bench_planner(
        policy, batch=batch, sampler=sampler, temperature=temperature, max_tokens=max_tokens, rounds=rounds, output=json,
        device=device, dtype=dtype, everything=everything,
    )


def bench_gpu(
    json: Annotated[Path, typer.Option("--json", metavar="PATH", help="Written as it goes, with a plot.")] = Path("gpu.json"),
    minutes: Annotated[float, typer.Option(help="Time limit; what no longer fits is skipped, and said so.")] = 9.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same code on a CPU, on a few numbers, through Triton's interpreter.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Print every kernel and every forced acceptance.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what the JSON holds of this machine; run what it lacks.")
    ] = False,
) -> None:
    """Measure this accelerator: correctness, kernels, and decode steps of a ZAYA1-8B with random weights.

    Every op against its reference on the device; bytes and FLOPs per second of each kernel as fractions of a copy and a
    matrix product measured in the same run; seconds and tokens/s of an engine's steps by the clock, by schedule, batch and
    context, with acceptance forced to stated curves. Exit status 1 where a check fails. `blockroll plan --measured PATH`
    reads the JSON.

    \b
    Example:
      blockroll bench gpu --json gpu.json
      python -m blockroll.rollout.bench.gpu --json gpu.json
    """
    from ..rollout.bench.gpu import runner

    if not runner.bench_gpu(json, minutes, dry_run, everything=everything, resume=resume):
        raise typer.Exit(1)


def kernels_check(
    target: Annotated[str, typer.Option(metavar="gfx942,gfx950,sm_90", help="Devices; all by default.")] = "",
    op: Annotated[str, typer.Option(help="Folders of kernels/; all by default.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Of each kernel only the variant with the largest tile.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that compile.")] = 2,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the table there.")] = None,
) -> None:
    """Compile every kernel in every shape the engine launches, for accelerators this machine need not have.

    Fails (exit status 1) on spilled registers, stack, more shared memory than the device has, a matrix product without
    matrix instructions, or assembly that is worse than its bound: fewer waves, narrower loads, more cycles of vector
    instructions or barriers, fewer matrix instructions between a load and its wait.

    \b
    Example:
      blockroll kernels check --target gfx942,sm_90
    """
    from ..rollout.bench import kernel_check

    if not kernel_check.check_kernels(words(target), words(op), quick=quick, workers=workers, output=json):
        raise typer.Exit(1)
