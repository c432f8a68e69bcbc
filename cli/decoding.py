"""Commands that decode and score files."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import LEVELS, DtypeOption, InputOption, OutputOption, PolicyOption, integers


def generate(
    policy: PolicyOption,
    input: InputOption,
    output: OutputOption,
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
    batch: Annotated[int, typer.Option(help="Most samples decoded at once.")] = 32,
    dtype: DtypeOption = "float32",
) -> None:
    """Sample completions for the prompts of a file.

    Input lines: {"id", "prompt" or "prompt_tokens", "seed" optional}. Output lines, one per sample, in the input's
    order: {"id", "sample", "prompt_tokens", "tokens", "text", "logprobs", "behavior_logprobs", "versions",
    "finish_reason", "forwards"}.

    \b
    Example:
      echo '{"id": "a", "prompt_tokens": [1, 20, 30]}' > prompts.jsonl
      blockroll generate --policy tiny-reasoner --input prompts.jsonl --output out.jsonl --n 4 --max-tokens 64
    """
    from ..rollout import offline
    from ..rollout.types import SamplingParams

    params = SamplingParams(
        sampler=sampler,  # type: ignore[arg-type]  # validated by the class
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, mix_weight=mix_weight, max_tokens=max_tokens,
    )
    offline.generate_file(
        policy, input, output, params=params, schedule=schedule, levels=integers("levels", levels),
        block_size=block_size, n=n, seed=seed, batch=batch, dtype=dtype,
    )


def score(
    policy: PolicyOption,
    input: InputOption,
    output: OutputOption,
    temperature: Annotated[float, typer.Option(help="The sampling temperature; 0 scores at 1.")] = 1.0,
    dtype: DtypeOption = "float32",
) -> None:
    """Recompute the log-probabilities of sampled tokens by one causal pass.

    Input lines hold "prompt_tokens" and "tokens", as `blockroll generate` writes them. Output lines repeat them, with
    "logprobs": log p of each token at the temperature, over the full vocabulary.

    \b
    Example:
      blockroll score --policy tiny-reasoner --input out.jsonl --output scores.jsonl
    """
    from ..rollout import offline

    offline.score_file(policy, input, output, temperature=temperature, dtype=dtype)
