"""PrefixCache: which pages hold the K/V of which beginnings of texts, and which of these pages no sequence uses.

Invariants:
- A page is found by its own tokens and by the page before it, so by every token from the first one on, and by the salt of the
  request. Keys hold the tokens themselves, so no text is ever taken for another.
- A page in the index is full, and no sequence writes to it.
- Of the unused pages the least recently used one is evicted first. Of one text the last page goes first: without the pages
  before it a page serves nobody.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

_ROOT = 0
"""Number of the node before the first page of every text."""

_Key = tuple[int, bytes]
"""The node of the page before, and the tokens of the page; the salt follows those of the first page."""


class PrefixCache:
    """The index, as numbers of pages. It holds no K/V."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._page: dict[_Key, int] = {}
        self._key: dict[int, _Key] = {}
        self._node: dict[int, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._nodes = _ROOT

    @property
    def unused(self) -> int:
        """Pages in the index that no sequence uses."""
        return len(self._unused)

    def __contains__(self, page: int) -> bool:
        return page in self._key

    def find(self, tokens: Sequence[int], most: int, salt: bytes = b"") -> list[int]:
        """The pages of the longest beginning of `tokens` that the index holds under this salt, at most `most` pages."""
        found, node = list[int](), _ROOT
        while len(found) < most and (page := self._page.get(self._key_of(node, tokens, len(found), salt))) is not None:
            found.append(page)
            node = self._node[page]
        return found

    def add(self, tokens: Sequence[int], pages: Sequence[int], salt: bytes = b"") -> None:
        """Index the pages that hold the first tokens. Where the index has another page with the same tokens, it keeps that one.

        Args:
            tokens: at least as many as the pages hold.
        """
        node = _ROOT
        for number, page in enumerate(pages):
            key = self._key_of(node, tokens, number, salt)
            known = self._page.setdefault(key, page)
            if known == page and self._key.get(page) != key:
                if page in self._key:  # The page before it, another one with the same tokens, was evicted.
                    del self._page[self._key[page]]
                else:
                    self._nodes += 1
                    self._node[page] = self._nodes
                self._key[page] = key
            node = self._node[known]

    def use(self, page: int) -> None:
        """Take note that a sequence uses the page."""
        self._unused.pop(page, None)

    def put_away(self, page: int) -> None:
        """Take note that no sequence uses the page. It is the most recently used one from now on."""
        self._unused[page] = None

    def evict(self) -> int:
        """Remove the least recently used page from the index; one must be unused."""
        page, _ = self._unused.popitem(last=False)
        del self._page[self._key.pop(page)], self._node[page]
        return page

    def clear(self) -> list[int]:
        """Remove every page from the index. Returns the unused ones."""
        unused = list(self._unused)
        for content in (self._page, self._key, self._node, self._unused):
            content.clear()
        return unused

    def _key_of(self, node: int, tokens: Sequence[int], number: int, salt: bytes) -> _Key:
        first = number * self._page_size
        page = array("q", tokens[first : first + self._page_size]).tobytes()
        return node, page if number else page + salt
