"""Runs searches over a source of samples: one, or many side by side, so that their samples share batches.

This module imports neither torch nor Ray.

Invariants:
- What a search returns depends on the question, the configuration and the parameters, not on what runs beside it, unless its
  budget is in seconds. For the samplers `lossless` and `mixed` the same holds of the schedule.
- Whatever ends a run early, no request of it is left behind in the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ...errors import RequestError
from ...model.arguments import require, short
from ..params import SamplingParams
from ..types import RolloutRequest, Trajectory
from .beam import beam
from .best_of_n import best_of_n
from .budget_forcing import budget_forcing, most_steps
from .candidates import Question, SearchResult
from .config import SearchConfig
from .context import Method, Search
from .functions import AnswerFunction, ScoreFunction, answer_function, score_function
from .markovian_rsa import markovian_rsa
from .self_consistency import self_consistency
from .source import SampleSource
from .votes import majority, weighted_vote

_METHODS: Mapping[str, Callable[[Search], Method]] = {
    "best_of_n": best_of_n, "majority": majority, "weighted_vote": weighted_vote, "self_consistency": self_consistency,
    "beam": beam, "markovian_rsa": markovian_rsa, "budget_forcing": budget_forcing,
}  # fmt: skip
_AHEAD = 32


class RunningSearch:
    """A search between two waves of its requests."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.method = _METHODS[search.config.method](search)
        self.outstanding: dict[str, RolloutRequest] = {}
        self.done: dict[str, Trajectory] = {}

    def begin(self) -> list[RolloutRequest] | SearchResult:
        """Its first requests, or the result of a search that needs none."""
        self.search.spending.begin()
        return self._advance(lambda: next(self.method))

    def go_on(self) -> list[RolloutRequest] | SearchResult:
        """Its next requests, or its result, once no request is outstanding."""
        done, self.done = list(self.done.values()), {}
        return self._advance(lambda: self.method.send(done))

    def settle(self, trajectory: Trajectory) -> None:
        """One of its requests has ended."""
        request = self.outstanding.pop(trajectory.request_id)
        aborted = trajectory.finish_reason == "abort"
        self.search.spending.settle(request.params.max_tokens, len(trajectory.tokens), trajectory.forwards, aborted)
        if not aborted:
            self.done[request.id] = trajectory

    def drop_outstanding(self) -> None:
        """What is outstanding was cancelled, and nothing is known of it."""
        for request in self.outstanding.values():
            self.search.spending.settle(request.params.max_tokens, 0, 0, cancelled=True)
        self.outstanding.clear()

    def _advance(self, step: Callable[[], list[RolloutRequest]]) -> list[RolloutRequest] | SearchResult:
        try:
            requests = step()
        except StopIteration as end:
            search = self.search
            search.spending.spent.seconds = search.spending.elapsed
            return SearchResult(search.question.id, search.config.method, end.value, search.spending.spent)
        self.outstanding = {request.id: request for request in requests}
        self.done = {}
        return requests


def search(
    source: SampleSource, questions: Sequence[Question], config: SearchConfig, params: SamplingParams | None = None
) -> list[SearchResult]:
    """Search for each question. Returns the results in the order of the questions.

    Args:
        source: makes the samples.
        params: how tokens are drawn; `n` and `seed` have no meaning here.

    Raises:
        RequestError: a question cannot be served, a function failed, or ids are not unique.
    """
    names = [question.id for question in questions]
    require(len(set(names)) == len(names), "id", "two questions share one", "give each question its own")
    found = {result.id: result for result in run_searches(source, questions, config, params)}
    return [found[name] for name in names]


def functions_of(config: SearchConfig, params: SamplingParams) -> tuple[AnswerFunction, ScoreFunction | None]:
    """The functions that find and score answers.

    Raises:
        InvalidInput: there is no such function, or the configuration does not go with the parameters.
    """
    if config.method == "budget_forcing":
        most_steps(config, params)
    return answer_function(config.answer), score_function(config.scorer) if config.scores else None


def run_searches(
    source: SampleSource, questions: Iterable[Question], config: SearchConfig, params: SamplingParams | None = None, *,
    ahead: int = _AHEAD,
) -> Iterator[SearchResult]:  # fmt: skip
    """`search` for any number of questions, whose ids are unique. Results come as they are found.

    Args:
        ahead: another search begins while fewer requests than this are outstanding.
    """
    require(source.tokenizer is not None, "policy", "has no tokenizer",
            "searches read texts; save the tokenizer beside the weights")
    params = params or SamplingParams()
    answer, scorer = functions_of(config, params)
    left = iter(questions)
    owners: dict[str, RunningSearch] = {}
    try:
        while True:
            while len(owners) < ahead and (question := next(left, None)) is not None:
                made = Search(question, config, params, source.tokenizer, source.max_positions, answer, scorer)
                running = RunningSearch(made)
                yield from _submitted(source, owners, running, running.begin())
            if not owners:
                return
            searches = list(dict.fromkeys(owners.values()))
            times = [t for each in searches if (t := each.search.spending.seconds_left) is not None]
            for trajectory in source.take(min(times, default=None)):
                if trajectory.request_id in owners:  # else it was cancelled
                    owners.pop(trajectory.request_id).settle(trajectory)
            for each in searches:
                if each.search.spending.seconds_left == 0.0:
                    _cancel(source, owners, each)
                if not each.outstanding:
                    yield from _submitted(source, owners, each, each.go_on())
    finally:
        if owners:
            source.cancel(list(owners))


def _submitted(
    source: SampleSource, owners: dict[str, RunningSearch], running: RunningSearch, following: list[RolloutRequest] | SearchResult
) -> Iterator[SearchResult]:
    """Submits a search's next requests, or yields its result."""
    if isinstance(following, SearchResult):
        yield following
        return
    for request in following:
        if request.id in owners:
            raise RequestError("id", f"two questions share {short(running.search.question.id)}", "give each question its own")
    source.submit(following)
    owners.update((request.id, running) for request in following)


def _cancel(source: SampleSource, owners: dict[str, RunningSearch], running: RunningSearch) -> None:
    """Ends what a search has outstanding."""
    names = list(running.outstanding)
    if not names:
        return
    for name in names:
        owners.pop(name)
    for trajectory in source.cancel(names):
        running.settle(trajectory)
    running.drop_outstanding()
