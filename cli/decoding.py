"""Commands that decode and score files."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InvalidInput
from .options import (
    LEVELS,
    DeviceOption,
    DtypeOption,
    InputOption,
    NamedPolicy,
    OutputOption,
    PolicyArgument,
    PolicyOption,
    integers,
    one_policy,
)


def ask(
    text: Annotated[str, typer.Argument(metavar="QUESTION", help='Such as "47 + 85 - 12" or "gcd 75 12".', show_default=False)],
    policy: PolicyOption = "tiny-reasoner",
    n: Annotated[int, typer.Option("--n", help="Samples.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per sample.")] = 256,
    seed: Annotated[int, typer.Option(help="Other seeds give other samples at a temperature above 0.")] = 0,
    prompt: Annotated[bool, typer.Option("--prompt", help="The text is the whole prompt, not a question.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Print what a policy answers to one question.

    The shipped policies know sums and products, "gcd 75 12", "310 base 7 to 8" and "bits 3415". They know no English: other
    questions give nonsense.

    \b
    Example:
      blockroll ask "47 + 85 - 12"
    """
    from ..model.tasks import question
    from ..rollout.engine import Engine
    from ..rollout.types import SamplingParams

    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidInput("question", f"{text!r:.60} is not UTF-8 text", "check the encoding of the terminal")
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, n=n, seed=seed)
    engine = Engine(policy, device=device, dtype=dtype, max_batch=min(n, 32))
    (output,) = engine.generate([text if prompt else question(text)], params)
    for sample in output.samples:
        print(sample.text)


def generate(
    input: InputOption,
    output: OutputOption,
    policy: PolicyArgument = None,
    named: NamedPolicy = None,
    sampler: Annotated[
        str, typer.Option(metavar="ar|lossless|coupled|mixed", help="How tokens are drawn.")
    ] = "lossless",
    mix_weight: Annotated[float, typer.Option(help="mixed: weight of p's logits.")] = 0.5,
    schedule: Annotated[
        str,
        typer.Option(metavar="auto|ar|two_pass|fused", help="What a step runs; auto: what is fastest here, step by step. "
                     "Samples of lossless and mixed depend on it."),
    ] = "fused",
    levels: Annotated[str, typer.Option(help="fused: acceptance lengths drafted for, 0 among them.")] = LEVELS,
    block_size: Annotated[
        int | None, typer.Option(help="Mask rows of a block, 2 to 64; without it the policy's own.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1.0 keeps every token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 or -1 keeps every token.")] = 0,
    min_p: Annotated[float, typer.Option(help="0 keeps every token.")] = 0.0,
    n: Annotated[int, typer.Option("--n", help="Samples per prompt.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per sample.")] = 256,
    seed: Annotated[int, typer.Option(help="With a line's id, the seed of a line that has none of its own.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a sample where its text holds this; may be given several times.")
    ] = None,
    min_tokens: Annotated[int, typer.Option(help="No stop token or stop string ends a sample before.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="1.0 for none.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="-2 to 2.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="-2 to 2.")] = 0.0,
    logprobs: Annotated[
        int | None, typer.Option(help="Also write the most probable tokens at each token, this many.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Most samples decoded at once.")] = 32,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Sample completions for the prompts of a file.

    Input lines: {"id", "prompt" or "prompt_tokens", "seed" optional}. Output lines, one per sample, in the input's
    order: {"id", "sample", "prompt_tokens", "tokens", "text", "logprobs", "behavior_logprobs", "versions",
    "finish_reason", "forwards", "trace"}, and with --logprobs "top_tokens" and "top_logprobs". "trace" has a row per decode
    step: position of its anchor, drafts verified, drafts accepted, first position and length of the mask block they came from,
    forward passes. `blockroll inspect` shows the file.

    \b
    Example:
      echo '{"id": "a", "prompt_tokens": [1, 20, 30]}' > prompts.jsonl
      blockroll generate tiny-reasoner --input prompts.jsonl --output out.jsonl --n 4 --max-tokens 64
    """
    from ..rollout import offline
    from ..rollout.types import SamplingParams

    params = SamplingParams(
        sampler=sampler,  # type: ignore[arg-type]  # validated by the class
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, mix_weight=mix_weight, max_tokens=max_tokens,
        stop=tuple(stop or ()), min_tokens=min_tokens, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logprobs=logprobs,
    )
    offline.generate_file(
        one_policy(policy, named), input, output, params=params, schedule=schedule, levels=integers("levels", levels),
        block_size=block_size, n=n, seed=seed, batch=batch, device=device, dtype=dtype,
    )


def score(
    input: InputOption,
    output: OutputOption,
    policy: PolicyArgument = None,
    named: NamedPolicy = None,
    temperature: Annotated[float, typer.Option(help="The sampling temperature; 0 scores at 1.")] = 1.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
) -> None:
    """Recompute the log-probabilities of sampled tokens by one causal pass.

    Input lines hold "prompt_tokens" and "tokens", as `blockroll generate` writes them. Output lines repeat them, with
    "logprobs": log p of each token at the temperature, over the full vocabulary.

    \b
    Example:
      blockroll score tiny-reasoner --input out.jsonl --output scores.jsonl
    """
    from ..rollout import offline

    offline.score_file(one_policy(policy, named), input, output, temperature=temperature, device=device, dtype=dtype)
