"""The samples of an engine whose tokens are reported while they are made, and how much of each was reported."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..backend import Progress
from ..sequence import Sample


class WatchedSamples:
    """Used by the thread that owns the engine."""

    def __init__(self) -> None:
        self._reported: dict[str, dict[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self._reported)

    def add(self, request_id: str, numbers: Iterable[int]) -> None:
        """These samples are watched from now on."""
        self._reported.setdefault(request_id, {}).update(dict.fromkeys(numbers, 0))

    def end(self, request_id: str, number: int) -> None:
        """The sample has ended, or is with another engine."""
        numbers = self._reported.get(request_id)
        if numbers is not None:
            numbers.pop(number, None)
            if not numbers:
                del self._reported[request_id]

    def drop(self, request_ids: Collection[str]) -> None:
        """No sample of these requests is here any more."""
        for name in request_ids:
            self._reported.pop(name, None)

    def take(self, running: Iterable[Sample]) -> list[Progress]:
        """What the running samples have committed since the last call."""
        found = []
        for sample in running:
            numbers = self._reported.get(sample.request.id)
            if numbers is None or sample.number not in numbers:
                continue
            start, prompt = numbers[sample.number], len(sample.request.prompt_tokens)
            if len(sample.tokens) - prompt > start:
                numbers[sample.number], log = len(sample.tokens) - prompt, sample.log.settle()
                logprobs, behavior, _ = log.numbers_3N[:, start:].tolist()
                found.append(Progress(sample.request.id, sample.number, start, sample.tokens[prompt + start :],
                                      logprobs, behavior, log.versions[start:],
                                      sample.top[start:], sample.forwards))  # fmt: skip
        return found
