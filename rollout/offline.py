"""Files in, files out: completions for a file of prompts, and scores for a file of samples.

Invariants:
- Every input line is checked before any token is computed, and an error names the file, the line and the field.
- Output lines come in the input's order, and the output appears under its name only when all of them are in it.
- A prompt's samples depend on its id, its seed and the command's options, not on its neighbours or on the batch. Only
  under `auto`, those of `lossless` and `mixed` also depend on what is decoded beside them, and on the machine's step times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO, cast

from ..errors import DataError, InvalidInput
from ..files import read_jsonl, whole_file
from ..model.checkpoint import load_policy
from ..model.device import placement
from ..model.packing import packs
from ..model.policy import Policy
from ..model.scoring import score
from ..model.tokenizer import encode_prompt
from ..seeds import MAX_SEED, derived_seed
from .cache import pages_for
from .engine import Engine, EngineConfig
from .failures import unless_failed
from .kv_memory import most_pages
from .progress import Meter
from .schedule import DEFAULT_LEVELS, Schedule, ScheduleKind
from .types import RolloutRequest, SamplingParams, Trajectory

SCHEDULES = ("auto", "ar", "two_pass", "fused")
_TOKENS_PER_SCORING_PASS = 4096


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of an input file: where it stands and what it holds."""

    place: str
    record: dict[str, Any]

    def error(self, field: str, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.place}: {field}", problem, remedy)

    def tokens(self, field: str, policy: Policy) -> tuple[int, ...]:
        """The token ids in `field`, each one of the policy's."""
        ids = self.record.get(field)
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise self.error(field, "not a list of whole numbers", "give token ids")
        vocabulary = policy.config.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                raise self.error(field, f"token id {token} is not in the policy's vocabulary",
                                 f"use ids from 0 to {vocabulary - 1}")
        return tuple(ids)


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
    if n < 1:
        raise InvalidInput("n", f"{n} is less than 1", "ask for at least one sample")
    if not 0 <= seed <= MAX_SEED:
        raise InvalidInput("seed", f"{seed} is outside 0..2**63-1", "use a 63-bit seed")
    config = _engine_config(schedule, tuple(levels), block_size, batch)
    policy = load_policy(policy_name, *placement(device, dtype))
    ids, requests = _requests(input, policy, params, n, seed)
    config = replace(config, max_batch=min(batch, n * len(requests)))
    engine = Engine(policy, replace(config, pages=pool_size(requests, policy, config)))
    order = [(request.id, sample) for request in requests for sample in range(n)]
    waiting: dict[tuple[str, int], Trajectory] = {}
    written = 0
    with _whole_text(output) as file, Meter("generate", len(order)) as meter:
        for sample in serve(engine, requests, 2 * batch):
            meter.advance(len(sample.tokens), sample.forwards)
            waiting[sample.key] = sample
            while written < len(order) and order[written] in waiting:
                done = waiting.pop(order[written])
                file.write(_dump(_sample_line(ids[done.request_id], done, policy)))
                written += 1
    assert not waiting and written == len(order)


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
    policy = load_policy(policy_name, *placement(device, dtype))
    lines = list(_lines(input))
    sequences = []
    for line in lines:
        prompt, tokens = line.tokens("prompt_tokens", policy), line.tokens("tokens", policy)
        if not prompt:
            raise line.error("prompt_tokens", "empty", "give at least one token, to predict the first one from")
        longest, length = policy.config.max_position_embeddings, len(prompt) + len(tokens)
        if length > longest:
            raise line.error("tokens", f"{length} tokens with the prompt, and this policy's maximum is {longest}",
                             "score shorter samples, or use the policy that made them")
        sequences.append((prompt, tokens))

    with _whole_text(output) as file, Meter("score", len(lines)) as meter:
        sizes = [len(prompt) + len(tokens) for prompt, tokens in sequences]
        for chunk in packs(range(len(sequences)), sizes.__getitem__, _TOKENS_PER_SCORING_PASS):
            for index, logprobs in zip(chunk, score(policy, [sequences[i] for i in chunk], temperature), strict=True):
                record = lines[index].record
                kept = {key: record[key] for key in ("id", "sample", "prompt_tokens", "tokens") if key in record}
                file.write(_dump(kept | {"logprobs": logprobs.tolist()}))
                meter.advance(len(sequences[index][1]), 0)


def _engine_config(schedule: str, levels: tuple[int, ...], block_size: int | None, batch: int) -> EngineConfig:
    if schedule not in SCHEDULES:
        raise InvalidInput("schedule", f"unknown schedule {schedule!r}", f"use one of {', '.join(SCHEDULES)}")
    if batch < 1:
        raise InvalidInput("batch", f"{batch} is less than 1", "decode at least one sample at once")
    shape = Schedule(kind=cast(ScheduleKind, schedule), levels=levels)
    return EngineConfig(schedule=shape, block_size=block_size, max_batch=batch, repeatable=True)


def pool_size(requests: Sequence[RolloutRequest], policy: Policy, config: EngineConfig) -> int:
    """Pages for `max_batch` of the longest samples, and their shared prompts, so that none waits for another's; fewer where
    memory does not hold them."""
    longest = max(len(request.prompt_tokens) + request.params.max_tokens for request in requests)
    longest = min(longest, policy.config.max_position_embeddings)
    wanted = (config.max_batch + 1) * pages_for(longest, config.page_size)
    return min(wanted, most_pages(policy, config, config.block_size or policy.block_size))


def serve(engine: Engine, requests: Sequence[RolloutRequest], ahead: int) -> Iterator[Trajectory]:
    """Trajectories as they finish. The engine holds about `ahead` samples, however long the file is; once the caller stops, none.

    Raises:
        RequestError: one of the requests cannot be served; none was. Or a log-probability is not finite.
    """
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


def _requests(
    path: str | os.PathLike[str], policy: Policy, params: SamplingParams, n: int, seed: int
) -> tuple[dict[str, str | int], list[RolloutRequest]]:
    """The requests of a file, and each one's id as the file has it (text or a number)."""
    ids: dict[str, str | int] = {}
    requests = []
    for line in _lines(path):
        name = line.record.get("id")
        if name is None:
            raise line.error("id", "missing", "name each line; ids come back with the samples")
        if type(name) not in (str, int) or name == "":
            raise line.error("id", f"{json.dumps(name)} is not a name", "use text or a whole number")
        if str(name) in ids:
            raise line.error("id", f"{name!r} stands on an earlier line too", "give each line an id of its own")
        own = line.record.get("seed")
        if own is None:
            own = derived_seed(seed, str(name))
        if type(own) is not int or not 0 <= own <= MAX_SEED:
            raise line.error("seed", f"{json.dumps(own)} is not a seed", "use a whole number from 0 to 2**63-1")
        ids[str(name)] = name
        tokens = _prompt_tokens(line, policy)
        requests.append(RolloutRequest(str(name), tokens, params=params, seed=own, samples=n))
    return ids, requests


def _prompt_tokens(line: _Line, policy: Policy) -> tuple[int, ...]:
    given = [field for field in ("prompt", "prompt_tokens") if line.record.get(field) is not None]
    if len(given) != 1:
        raise line.error("prompt", "given twice, as text and as tokens" if given else "missing",
                         "give one of prompt and prompt_tokens")
    field = given[0]
    if field == "prompt_tokens":
        tokens = line.tokens(field, policy)
    else:
        text = line.record[field]
        if not isinstance(text, str):
            raise line.error(field, f"{json.dumps(text)[:40]} is not text", "give text, or token ids as prompt_tokens")
        if policy.tokenizer is None:
            raise line.error(field, "this policy's directory has no tokenizer", "give token ids as prompt_tokens")
        tokens = tuple(encode_prompt(policy.tokenizer, text)) if text else ()
    if not tokens:
        raise line.error(field, "empty", "give at least one token")
    longest = policy.config.max_position_embeddings
    if len(tokens) >= longest:
        raise line.error(field, f"{len(tokens)} tokens, and this policy's maximum is {longest}, one to follow included",
                         f"shorten it to {longest - 1}")
    return tokens


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


def _lines(path: str | os.PathLike[str]) -> Iterator[_Line]:
    empty = True
    for number, record in read_jsonl(path):
        empty = False
        yield _Line(f"{os.fspath(path)} line {number}", record)
    if empty:
        raise DataError(os.fspath(path), "holds no lines", "write one JSON object per line")


def _dump(record: dict[str, Any]) -> str:
    # Python writes the shortest digits that read back as the same number.
    return json.dumps(record, allow_nan=False) + "\n"


@contextmanager
def _whole_text(path: str | os.PathLike[str]) -> Iterator[TextIO]:
    with whole_file(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file
