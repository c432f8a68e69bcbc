"""The field `search` of a request: many samples of each prompt, and one answer made of them.

Invariants:
- A wave of samples is a request to the dispatch as any other. The event loop is free while it is made, and a client that
  disconnects has the wave cancelled.
- What a method computes, before its first wave and between two, runs in a thread (`search_threads`).
- A search that was admitted goes on: its waves are refused neither for a pause nor for requests that came meanwhile. While it
  waits or computes, as many samples count as unfinished as it may have at once.
- The result is that of `blockroll.search` for the same prompts, configuration and parameters.
- A request names no code. It may name functions that the service's configuration lists.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request

from ...errors import RequestError
from ...model.arguments import short
from ...rollout.params import SamplingParams
from ...rollout.search.candidates import Question, SearchResult
from ...rollout.search.config import ANSWERS, SCORERS, SearchConfig
from ...rollout.search.context import WAVE, Search
from ...rollout.search.driver import RunningSearch, functions_of
from ...rollout.search.functions import is_reference
from ...rollout.types import RolloutRequest, Trajectory
from ...seeds import derived_seed
from .dispatch import Dispatch
from .http_errors import HttpError
from .limits import MAX_ENTRIES
from .request_fields import GenerationBody
from .sample_streams import unless_disconnected
from .state import HttpState
from .text import need_tokenizer

_OF_ONE_SAMPLE = ("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids", "return_weight_versions", "routed_experts",
                  "behavior_logprobs", "tokens_per_forward", "echo")  # fmt: skip
"""Fields of an answer that is one sample. A search's answer may be several pieces, or the end of many."""


async def search_prompts(
    request: Request, state: HttpState, body: GenerationBody, prompts: Sequence[tuple[tuple[int, ...], str | None]],
    params: SamplingParams,
) -> tuple[SearchConfig, list[SearchResult]]:  # fmt: skip
    """One result per prompt.

    Args: prompts: token ids, and the text where the client gave one.

    Raises HttpError or RequestError for a search that cannot be served.
    """
    tokenizer = need_tokenizer(state, "search")
    config = _config(body, state, [tokens for tokens, _ in prompts], params)
    places = [_Place(state.dispatch, config) for _ in prompts]
    state.dispatch.admit(sum(each.samples for each in places))

    def make() -> list[Search]:
        questions = [Question(str(place), tokens, tokenizer.decode(list(tokens)) if text is None else text)
                     for place, (tokens, text) in enumerate(prompts)]  # fmt: skip
        answer, scorer = functions_of(config, params)
        return [Search(each, config, params, tokenizer, state.sizes.positions, answer, scorer) for each in questions]

    async def all_results() -> list[SearchResult]:
        try:
            made = await state.search_threads.run(make)
        except RequestError as error:
            raise _named(error) from error
        running = [asyncio.ensure_future(_run(state, RunningSearch(each), body, place))
                   for each, place in zip(made, places, strict=True)]  # fmt: skip
        try:
            return await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()

    try:
        return config, await unless_disconnected(request, all_results())
    finally:
        for each in places:
            each.leave()


class _Place:
    """What a search counts as while it waits or computes: the samples that it may have at once. Admitted when it is made."""

    def __init__(self, dispatch: Dispatch, config: SearchConfig) -> None:
        few = config.method == "self_consistency" or config.samples is None
        self.samples = min(_side_by_side(config)[0], WAVE) if few else _side_by_side(config)[0]
        self._dispatch, self._held = dispatch, True

    def leave(self) -> None:
        """Its samples are open and count themselves, or it has ended."""
        if self._held:
            self._held = False
            self._dispatch.hold(-self.samples)

    def enter(self) -> None:
        """It has none open."""
        self._held = True
        self._dispatch.hold(self.samples)


async def _run(state: HttpState, running: RunningSearch, body: GenerationBody, place: _Place) -> SearchResult:
    """A search, wave by wave."""
    config = running.search.config
    functions = " or ".join(name for name in (config.answer, config.scorer) if is_reference(name))
    following = await state.search_threads.run(running.begin, functions, config.budget_seconds)
    while not isinstance(following, SearchResult):
        await _wave(state, running, following, body, place)
        following = await state.search_threads.run(running.go_on, functions, config.budget_seconds)
    place.leave()
    return following


async def _wave(
    state: HttpState, running: RunningSearch, wanted: Sequence[RolloutRequest], body: GenerationBody, place: _Place
) -> None:  # fmt: skip
    """Settles these requests; those that are unfinished when the seconds are out are cancelled."""
    names = {state.dispatch.new_id(): each.id for each in wanted}
    sent = [replace(each, id=name, priority=body.priority, cache_salt=body.cache_salt or "")
            for name, each in zip(names, wanted, strict=True)]  # fmt: skip
    async with state.dispatch.open(sent, admitted=True) as answers:
        place.leave()
        try:
            async with asyncio.timeout(running.search.spending.seconds_left):
                async for item in answers:
                    if isinstance(item, Trajectory):
                        item.request_id = names[item.request_id]
                        running.settle(item)
        except TimeoutError:
            pass
    place.enter()
    running.drop_outstanding()


def search_field(config: SearchConfig, result: SearchResult) -> dict[str, Any]:
    """The field `search` of a choice."""
    found = {name: value for name, value in result.as_dict().items() if name not in ("id", "text")}
    found |= {name: _finite(found[name]) for name in ("logprob", "score")}
    found["votes"] = {answer: _finite(weight) for answer, weight in found["votes"].items()}
    return {"seed": config.seed, **found}


def _finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


def finish_reason(result: SearchResult) -> str:
    """`stop` for an answer that ended by itself."""
    chosen = result.verdict.chosen
    if chosen is not None and chosen.finished:
        return "stop"
    return "abort" if result.verdict.reason == "aborted" else "length"


def _config(body: GenerationBody, state: HttpState, prompts: Sequence[Sequence[int]], params: SamplingParams) -> SearchConfig:
    """What the field says, within the service's limits."""
    assert body.search is not None
    if body.stream:
        raise HttpError(400, "stream: a search has no text before it ends; leave stream out", "stream")
    if body.n != 1:
        raise HttpError(400, f"n: {body.n} given beside search, which has one answer; give search.samples", "n")
    for field in _OF_ONE_SAMPLE:
        if (value := getattr(body, field, None)) is not None and value is not False:
            raise HttpError(400, f"{field}: given beside search; its answer is not one sample", field)
    if not body.skip_special_tokens:
        raise HttpError(400, "skip_special_tokens: false, and a search reads texts without them", "skip_special_tokens")
    values = dict(body.search)
    for field, known in (("answer", ANSWERS), ("scorer", SCORERS)):
        if is_reference(value := values.get(field)) and value not in state.options.search_functions:
            raise HttpError(400, f"search.{field}: {short(value)} is not among the functions that the service's configuration "
                            f"lists (http.search_functions), and no other is loaded; use {', '.join(known)}", f"search.{field}")
    seed = values.setdefault("seed", derived_seed(0, state.dispatch.new_id()) if body.seed is None else body.seed)
    if body.seed is not None and seed != body.seed:
        raise HttpError(400, "seed: differs from search.seed; give one of the two", "seed")
    try:
        config = SearchConfig.from_mapping(values, functions=True)
    except RequestError as error:
        raise _named(error) from error
    return _bounded(config, state, prompts, params)


def _bounded(
    config: SearchConfig, state: HttpState, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> SearchConfig:  # fmt: skip
    """The configuration with a budget of tokens: all of them are kept until the search ends."""
    side_by_side, field = _side_by_side(config)
    if side_by_side * len(prompts) > state.options.max_samples:
        raise HttpError(400, f"{field}: {len(prompts)} prompts of {side_by_side} samples are more than "
                        f"{state.options.max_samples} (http.max_samples)", field)
    more = params.max_tokens
    if config.method == "markovian_rsa":
        more += config.aggregate * (config.tail or max(params.max_tokens // 2, 1))
    if side_by_side * sum(min(len(prompt) + more, state.sizes.positions) for prompt in prompts) > MAX_ENTRIES:
        raise HttpError(400, f"{field}: {side_by_side} samples per prompt may have more than {MAX_ENTRIES} tokens at once, "
                        f"prompts included; lower {field} or max_tokens", field, "answer_too_large")
    most = MAX_ENTRIES // len(prompts)
    if config.budget_tokens is not None and config.budget_tokens > most:
        raise HttpError(400, f"search.budget_tokens: {config.budget_tokens} is more than {most}, which one request of "
                        f"{len(prompts)} prompts may have for each", "search.budget_tokens")
    return replace(config, budget_tokens=config.budget_tokens or most)


def _side_by_side(config: SearchConfig) -> tuple[int, str]:
    """Most samples at once of one prompt, and the field that says so."""
    side_by_side = 1 if config.method == "budget_forcing" else config.samples or WAVE
    if config.method == "beam" and config.width > side_by_side:  # one text is always kept, and has so many next steps
        return config.width, "search.width"
    return side_by_side, "search.samples"


def _named(error: RequestError) -> HttpError:
    """An error of the search's own fields under the name that the client gave them."""
    field = error.field if error.field == "search" else f"search.{error.field}"
    return HttpError(400, f"{field}: {error.problem}; {error.remedy}", field)
