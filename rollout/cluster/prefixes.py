"""Which beginnings of prompts an engine was given, so that a request that begins alike goes there when that pays.

What is known here is a guess: the engine may have needed the pages for other samples. A wrong guess costs one prefill.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

PAGE = 32
"""Tokens of a page here. The pages of an engine may have another size."""
MOST = 1 << 15
"""Pages remembered of an engine, those last given: a million tokens, about 6 MB."""


def pages_of(tokens: Sequence[int]) -> tuple[int, ...]:
    """A number for every full page of a prompt, which stands for all tokens up to the page's end."""
    pages, before = [], 0
    for end in range(PAGE, len(tokens) + 1, PAGE):
        before = hash((before, tuple(tokens[end - PAGE : end])))
        pages.append(before)
    return tuple(pages)


class Prefixes:
    """The pages of one engine, the latest last."""

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()  # a dict finds its first key slowly once earlier ones were removed

    def note(self, pages: Sequence[int]) -> None:
        """The engine was given a prompt of these pages."""
        for page in reversed(pages):  # the beginning, which most prompts share, is forgotten last
            self._pages[page] = None
            self._pages.move_to_end(page)
        while len(self._pages) > MOST:
            self._pages.popitem(last=False)

    def known(self, pages: Sequence[int]) -> int:
        """How many tokens of such a prompt the engine has."""
        return PAGE * next((i for i, page in enumerate(pages) if page not in self._pages), len(pages))

    def clear(self) -> None:
        """The engine has a new weight version, or a new process."""
        self._pages.clear()
