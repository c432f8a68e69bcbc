"""Files in, files out: completions for a file of prompts, and scores for a file of samples.

Invariants:
- Every input line is checked before any token is computed, and an error names the file, the line and the field. So a file is
  read twice, the second time while its samples are made: what is held in memory does not grow with the file.
- What is read is bounded before it is parsed, by what the policy's longest sequence can hold.
- Output lines come in the input's order, and the output appears under its name only when all of them are in it.
- A prompt's samples depend on its id, its seed and the command's options, not on its neighbours or on the batch. Only
  under `auto`, those of `lossless` and `mixed` also depend on what is decoded beside them, and on the machine's step times.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

from ..errors import InvalidInput
from ..files import check_output, whole_file
from ..model.checkpoint import load_policy
from ..model.device import placement
from ..model.packing import packs
from ..model.policy import Policy
from ..model.scoring import score
from ..seeds import MAX_SEED, derived_seed
from .cache import pages_for
from .engine import Engine, EngineConfig
from .failures import unless_failed
from .input_lines import PROMPT_BYTES, SAMPLE_BYTES, InputFile, Line, shown
from .kv_memory import most_pages
from .params import MAX_SAMPLES
from .progress import Meter
from .schedule import DEFAULT_LEVELS, Schedule, ScheduleKind
from .types import RolloutRequest, SamplingParams, Trajectory

SCHEDULES = ("auto", "ar", "two_pass", "fused")
_TOKENS_PER_SCORING_PASS = 4096
MAX_BATCH = 65_536
"""Samples decoded at once. The engine keeps arrays of so many rows."""


def generate_file(
    policy_name: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    params: SamplingParams,
    schedule: str = "fused",
    levels: Sequence[int] = DEFAULT_LEVELS,
    block_size: int | None = None,
    n: int = 1,
    seed: int = 0,
    batch: int = 32,
    device: str = "auto",
    dtype: str | None = None,
) -> None:
    """Samples `n` completions for each prompt of `input` and writes one line per sample to `output`.

    Args:
        schedule: `ar`, `two_pass`, `fused`, or `auto`: step by step what is fastest on this machine.
        levels: acceptance lengths that `fused` drafts for.
        block_size: mask rows of a block; None for the policy's own.
        seed: a line without a seed of its own gets one made from this number and its id.
        batch: most samples decoded at once.
        device, dtype: where and as what the policy runs (`model.device.placement`).

    Raises:
        InvalidInput: an option, or a line of the input, cannot be used.
        StorageError: the output could not be written whole.
    """
    if not 1 <= n <= MAX_SAMPLES:
        problem = f"{n} is less than 1" if n < 1 else f"{n} is more than {MAX_SAMPLES}"
        raise InvalidInput("n", problem, f"ask for 1 to {MAX_SAMPLES} samples of a prompt; give a line several times for more")
    if not 0 <= seed <= MAX_SEED:
        raise InvalidInput("seed", f"{seed} is outside 0..2**63-1", "use a 63-bit seed")
    config = _engine_config(schedule, tuple(levels), block_size, batch)
    check_output(output, input)
    policy = load_policy(policy_name, *placement(device, dtype))
    with InputFile(input, policy, PROMPT_BYTES) as file:
        count, longest, first = _check_prompts(file, policy, params, n, seed)
        config = replace(config, max_batch=min(batch, n * count))
        engine = Engine(policy, replace(config, pages=pool_size(longest, policy, config)))
        engine.check(first)
        names = deque[tuple[str | int, str]]()  # of requests whose samples are not all written: in the file, and in the engine

        def requests() -> Iterator[RolloutRequest]:
            number = 0
            for number, line in enumerate(islice(file, count), start=1):  # noqa: B007 - counted to the end
                request = _request(line, policy, params, n, seed)
                names.append((line.name(), request.id))
                yield request
            if number < count:
                raise file.shrunk()

        waiting: dict[tuple[str, int], Trajectory] = {}
        written = 0
        with _whole_text(output) as out, Meter("generate", n * count) as meter:
            for sample in serve(engine, requests(), 2 * batch):
                meter.advance(len(sample.tokens), sample.forwards)
                waiting[sample.key] = sample
                while names and (names[0][1], written) in waiting:
                    done = waiting.pop((names[0][1], written))
                    out.write(_dump(_sample_line(names[0][0], done, policy)))
                    written = (written + 1) % n
                    if not written:
                        names.popleft()
    assert not waiting and not names


def score_file(
    policy_name: str | os.PathLike[str],
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    temperature: float = 1.0,
    device: str = "auto",
    dtype: str | None = None,
) -> None:
    """Writes for each line of `input` the log-probabilities of its `tokens` after its `prompt_tokens`.

    Output lines hold `id` and `sample` where the input does, `prompt_tokens`, `tokens` and `logprobs`.

    Args:
        temperature: logits are divided by it; 0 scores at 1, as a trajectory's `logprobs` do.
        device, dtype: as of `generate_file`.

    Raises:
        InvalidInput: an option, or a line of the input, cannot be used.
        StorageError: the output could not be written whole.
    """
    SamplingParams(temperature=temperature)
    check_output(output, input)
    policy = load_policy(policy_name, *placement(device, dtype))
    with InputFile(input, policy, SAMPLE_BYTES) as file:
        samples = [_scored(line, policy) for line in file]
    with _whole_text(output) as out, Meter("score", len(samples)) as meter:
        sizes = [len(prompt) + len(tokens) for _, prompt, tokens in samples]
        for chunk in packs(range(len(samples)), sizes.__getitem__, _TOKENS_PER_SCORING_PASS):
            pairs = [(tuple(samples[i][1]), tuple(samples[i][2])) for i in chunk]
            for index, logprobs in zip(chunk, score(policy, pairs, temperature), strict=True):
                kept, prompt, tokens = samples[index]
                line = {**kept, "prompt_tokens": prompt.tolist(), "tokens": tokens.tolist(), "logprobs": logprobs.tolist()}
                out.write(_dump(line))
                meter.advance(len(tokens), 0)


def _scored(line: Line, policy: Policy) -> tuple[dict[str, Any], array[int], array[int]]:
    """What is kept of a line to score: its id and sample where it has them, its prompt, its tokens."""
    kept = {key: line.record[key] for key in ("id", "sample") if line.record.get(key) is not None}
    if "id" in kept:
        line.name()
    if "sample" in kept and type(kept["sample"]) is not int:
        raise line.error("sample", f"{shown(kept['sample'])} is no whole number", "number the samples, or leave it out")
    prompt, tokens = line.tokens("prompt_tokens", policy), line.tokens("tokens", policy)
    if not prompt:
        raise line.error("prompt_tokens", "empty", "give at least one token, to predict the first one from")
    longest, length = policy.config.max_position_embeddings, len(prompt) + len(tokens)
    if length > longest:
        raise line.error("tokens", f"{length} tokens with the prompt, and this policy's maximum is {longest}",
                         "score shorter samples, or use the policy that made them")
    return kept, prompt, tokens


def _engine_config(schedule: str, levels: tuple[int, ...], block_size: int | None, batch: int) -> EngineConfig:
    if schedule not in SCHEDULES:
        raise InvalidInput("schedule", f"unknown schedule {schedule!r}", f"use one of {', '.join(SCHEDULES)}")
    if batch < 1:
        raise InvalidInput("batch", f"{batch} is less than 1", "decode at least one sample at once")
    if batch > MAX_BATCH:
        raise InvalidInput("batch", f"{batch} is more than {MAX_BATCH}", "decode fewer samples at once")
    shape = Schedule(kind=cast(ScheduleKind, schedule), levels=levels)
    return EngineConfig(schedule=shape, block_size=block_size, max_batch=batch, repeatable=True)


def pool_size(longest: int, policy: Policy, config: EngineConfig) -> int:
    """Pages for `max_batch` samples of `longest` tokens, prompt included, and their shared prompts, so that none waits for
    another's; fewer where memory does not hold them."""
    longest = min(longest, policy.config.max_position_embeddings)
    wanted = (config.max_batch + 1) * pages_for(longest, config.page_size)
    return min(wanted, most_pages(policy, config, config.block_size or policy.block_size))


def serve(engine: Engine, requests: Iterable[RolloutRequest], ahead: int) -> Iterator[Trajectory]:
    """Trajectories as they finish. The engine holds about `ahead` samples, however many requests there are; once the caller
    stops, none.

    Raises:
        RequestError: one of the requests cannot be served. Where they are a list, none of them was. Or a log-probability is not
            finite.
    """
    if isinstance(requests, Sequence):
        engine.check(*requests)
    left = iter(requests)
    held = 0
    try:
        while True:
            while held < ahead and (request := next(left, None)) is not None:
                engine.add(request)
                held += request.samples
            if not engine.has_work:
                return
            for sample in unless_failed(engine.step(), engine.failed):
                held -= 1
                yield sample
    except BaseException:
        engine.abort()
        raise


def _check_prompts(
    file: InputFile, policy: Policy, params: SamplingParams, n: int, seed: int
) -> tuple[int, int, RolloutRequest]:
    """Reads every line; returns how many there are, the tokens of the longest sample, and one of the requests."""
    names = set[str]()
    longest = 0
    for line in file:
        request = _request(line, policy, params, n, seed)
        if request.id in names:
            raise line.error("id", f"{shown(line.name())} stands on an earlier line too", "give each line an id of its own")
        names.add(request.id)
        longest = max(longest, len(request.prompt_tokens) + params.max_tokens)
    return len(names), longest, request


def _request(line: Line, policy: Policy, params: SamplingParams, n: int, seed: int) -> RolloutRequest:
    name, own = str(line.name()), line.record.get("seed")
    if own is None:
        own = derived_seed(seed, name)
    if type(own) is not int or not 0 <= own <= MAX_SEED:
        raise line.error("seed", f"{shown(own)} is not a seed", "use a whole number from 0 to 2**63-1")
    return RolloutRequest(name, line.prompt(policy), params=params, seed=own, samples=n)


def _sample_line(name: str | int, sample: Trajectory, policy: Policy) -> dict[str, Any]:
    alternatives = {}
    if sample.top_tokens is not None and sample.top_logprobs is not None:
        alternatives = {"top_tokens": sample.top_tokens.tolist(), "top_logprobs": sample.top_logprobs.tolist()}
    return {
        "id": name,
        "sample": sample.sample,
        "prompt_tokens": list(sample.prompt_tokens),
        "tokens": [int(token) for token in sample.tokens],
        "text": None if policy.tokenizer is None else sample.text(policy.tokenizer),
        "logprobs": sample.logprobs.tolist(),
        "behavior_logprobs": sample.behavior_logprobs.tolist(),
        "versions": sample.versions.tolist(),
        "finish_reason": sample.finish_reason,
        "forwards": sample.forwards,
        **alternatives,
    }


def _dump(record: dict[str, Any]) -> str:
    # Python writes the shortest digits that read back as the same number.
    return json.dumps(record, allow_nan=False) + "\n"


@contextmanager
def _whole_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    with whole_file(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file
