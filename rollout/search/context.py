"""What a method is given: one question, its budget, and how to ask for samples.

A method is a generator. It yields lists of requests, receives the trajectories that came of them, and returns a `Verdict`;
whoever runs it (`driver`) may run many side by side. A method itself only says `found = yield from search.sample(prompts)`.

Invariant: sample j of a question, counted over the whole search, has the seed `derived_seed(config.seed, "id/j")`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from ...errors import RequestError
from ...model.arguments import short
from ...seeds import derived_seed
from ..params import SamplingParams
from ..types import RolloutRequest, Trajectory
from .candidates import Candidate, Question, Verdict
from .config import MAX_SAMPLES, SearchConfig
from .functions import AnswerFunction, ScoreFunction, checked_score
from .spending import Spending

LOGPROBS = ("logprob", "mean_logprob")
"""Scorers whose scores are log-probabilities."""
WAVE = 16
"""Samples that are begun together where the configuration gives no number."""
MAX_WEIGHT = 1e300
"""Largest weight of a vote: the sum of MAX_SAMPLES of them is a float."""
Waves = Generator[list[RolloutRequest], list[Trajectory], Any]
Method = Generator[list[RolloutRequest], list[Trajectory], Verdict]


def check_question(question: Question, config: SearchConfig) -> None:
    """Raise RequestError where the configuration needs what the question does not have."""
    if config.scores and config.scorer == "verifier" and question.verifier is None:
        raise RequestError("scorer", f"question {short(question.id)} has no verifier", "use logprob, or module:function")


class Search:
    """One search: a question under a configuration.

    Attributes:
        question, config, params, spending: as given.
        tokenizer: the policy's.
    """

    def __init__(
        self, question: Question, config: SearchConfig, params: SamplingParams, tokenizer: Any, max_positions: int,
        answer: AnswerFunction, scorer: ScoreFunction | None,
    ) -> None:  # fmt: skip
        self.question, self.config, self.params, self.tokenizer = question, config, params, tokenizer
        self.spending = Spending(config.budget_tokens, config.budget_seconds)
        self._positions, self._answer, self._scorer = max_positions, answer, scorer
        self._number, self._cut = 0, False
        check_question(question, config)

    def sample(
        self, prompts: Sequence[tuple[int, ...]], max_tokens: int | Sequence[int] | None = None, **changes: Any
    ) -> Generator[list[RolloutRequest], list[Trajectory], dict[int, Trajectory]]:
        """One sample of each prompt, as far as the budget goes.

        Args:
            max_tokens: most tokens of all, or of each, up to those of the parameters, which is the default.
            changes: other fields of the parameters.

        Returns: trajectories by the place of their prompt. Those that the budget cut off before they began, or cancelled, are
            missing.
        """
        found: dict[int, Trajectory] = {}
        given = self.params.max_tokens if max_tokens is None else max_tokens
        most = [given] * len(prompts) if isinstance(given, int) else given
        begun = 0
        while begun < len(prompts):
            longest = max(map(len, prompts[begun:]))
            if longest >= self._positions:
                name = short(self.question.id)
                raise RequestError("prompt_tokens", f"a prompt of question {name} has {longest} tokens and the policy's maximum "
                                   f"is {self._positions}", "shorten the question, or what is put into prompts")  # fmt: skip
            shortest = min(map(len, prompts[begun:]))
            count, each = self.spending.affords(len(prompts) - begun, min(max(most[begun:]), self._positions - shortest))
            if not count:
                self._cut = True
                break
            requests = [self._request(prompts[i], min(each, most[i]), changes) for i in range(begun, begun + count)]
            places = {request.id: begun + i for i, request in enumerate(requests)}
            for trajectory in (yield requests):
                found[places[trajectory.request_id]] = trajectory
            begun += count
            self._cut = self._cut or len(found) < begun
        return found

    def candidates(self, count: int | None) -> Generator[list[RolloutRequest], list[Trajectory], list[Candidate]]:
        """Independent samples of the question: `count` of them, or as many as the budget affords."""
        made: list[Candidate] = []
        most = MAX_SAMPLES if count is None else count
        while len(made) < most:
            wave = min(WAVE, most - len(made)) if count is None else count
            found = yield from self.sample([self.question.prompt_tokens] * wave)
            made += [self.candidate(found[place]) for place in sorted(found)]
            if len(found) < wave or count is not None:
                break
        return made

    def candidate(self, trajectory: Trajectory, before: Candidate | None = None) -> Candidate:
        """A sample as a candidate, behind the tokens of `before` where it goes on with one."""
        tokens = (*(() if before is None else before.tokens), *trajectory.tokens)
        finished = trajectory.finish_reason == "stop"
        text = trajectory.text(self.tokenizer) if before is None else self.decode(tokens)
        return Candidate(
            tokens, (0.0 if before is None else before.logprob) + float(trajectory.logprobs.sum(dtype=float)),
            (0 if before is None else before.count) + len(trajectory.tokens), finished, text,
            self._answer(text) if finished else None,
        )  # fmt: skip

    def scored(self, candidate: Candidate) -> Candidate:
        """The candidate with the score of the configuration's scorer."""
        name = self.config.scorer
        if self._scorer is not None:
            score = self._scorer(self.question.prompt, candidate.text)
        elif name == "verifier":
            assert self.question.verifier is not None
            score = checked_score(self.question.verifier(candidate.text), name)
        else:
            score = candidate.logprob if name == "logprob" else candidate.mean_logprob
        return replace(candidate, score=score)

    def weight(self, candidate: Candidate, best: float = 0.0) -> float:
        """The candidate's weight in a vote: its probability, or the geometric mean over its tokens, or what the scorer says.

        Args:
            best: a log-probability; probabilities are given as multiples of exp(best). exp of -746 is 0.

        Raises:
            RequestError: the scorer said a negative number, or one that is too large to be added up.
        """
        assert candidate.score is not None
        if self.config.scorer in LOGPROBS:
            return math.exp(candidate.score - best)
        if not 0 <= candidate.score <= MAX_WEIGHT:
            raise RequestError("scorer", f"{self.config.scorer} returned {candidate.score:g} as a weight",
                               f"return 0 to {MAX_WEIGHT:g}")
        return candidate.score

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text inside a sequence."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def reason(self) -> str:
        """Why sampling ended: `done`, which budget cut it short, or `aborted` where somebody else ended samples."""
        return (self.spending.reason or "aborted") if self._cut else "done"

    def _request(self, prompt: tuple[int, ...], max_tokens: int, changes: dict[str, Any]) -> RolloutRequest:
        name = f"{self.question.id}/{self._number}"
        self._number += 1
        params = replace(self.params, n=1, seed=None, max_tokens=max_tokens, **changes)
        self.spending.reserve(max_tokens)
        return RolloutRequest(name, prompt, params, derived_seed(self.config.seed, name), 1)
