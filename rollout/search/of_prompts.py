"""`blockroll.search`: searches for prompts given as texts or token ids, in an engine of this process or through a service."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import RequestError
from ...model.arguments import token_ids
from ...model.tokenizer import encode_prompt
from ..engine import Engine
from ..params import SamplingParams
from .candidates import Question, SearchResult
from .config import SearchConfig
from .driver import search as search_questions
from .engine_source import EngineSource
from .source import SampleSource


def search(
    source: Engine | SampleSource, prompts: Sequence[str | Sequence[int] | Question], config: SearchConfig | None = None,
    params: SamplingParams | None = None,
) -> list[SearchResult]:  # fmt: skip
    """One answer per prompt, made of many samples.

    Args:
        source: an engine without work, or another `SampleSource`.
        prompts: texts, lists of token ids, or questions with ids of their own. The others are named by their place, "0", "1", ...
        config: the method and its budget; None for a majority vote over 16 samples.
        params: how tokens are drawn; `n` and `seed` have no meaning here.

    Raises:
        RequestError: a prompt cannot be served, a function failed, or a text is given and the policy has no tokenizer.
    """
    made = EngineSource(source) if isinstance(source, Engine) else source
    questions = [_question(made, place, prompt) for place, prompt in enumerate(prompts)]
    return search_questions(made, questions, config or SearchConfig(), params)


def _question(source: SampleSource, place: int, prompt: str | Sequence[int] | Question) -> Question:
    if isinstance(prompt, Question):
        return prompt
    tokenizer = source.tokenizer
    if not isinstance(prompt, str):
        tokens = token_ids(prompt, "prompts")
        return Question(str(place), tokens, "" if tokenizer is None else tokenizer.decode(list(tokens)))
    if tokenizer is None:
        raise RequestError("prompts", "a text, and the policy has no tokenizer", "give lists of token ids")
    return Question(str(place), tuple(encode_prompt(tokenizer, prompt)), prompt)
