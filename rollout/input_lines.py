"""The lines of `blockroll generate` and `blockroll score`: what they hold, and how much of it is read.

Invariants:
- An error names the file, the line, the field, and what to do.
- A line is bounded before it is parsed, and a text before it becomes tokens, by what the policy's longest sequence can hold.
- A file is read as often as it is iterated over, so nobody needs to keep all of it.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, Protocol

from ..errors import DataError
from ..inputs import json_object, open_input, read_lines, unreadable
from ..model.tokenizer import encode_prompt

PROMPT_BYTES, SAMPLE_BYTES = 64, 1024
"""Bytes per position of the policy of a line with a prompt, and of one with a sample and its log-probabilities."""
LINE_BYTES = 1 << 20
"""Bytes that a line may hold beside those, whatever the policy."""
PIPE_BYTES = 1 << 30
"""Most bytes that are taken from a pipe. They are kept in a temporary file, because lines are read twice."""
MAX_ID = 1024
"""Characters of an id, which every sample repeats."""
TOKEN_CHARACTERS = 8
"""Characters that are taken for a token at first: a text with more per position is tokenised part by part. Texts of people have
three to five."""
TOKEN_MARGIN = 256
"""Tokens by which a part may have more than the same characters of the whole text have: those that its end cuts through."""


class TextPolicy(Protocol):
    """What lines are read for: the sizes and the tokenizer of a policy, whose weights may be elsewhere."""

    @property
    def config(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an input file: where it stands and what it holds."""

    place: str
    record: dict[str, Any]

    def error(self, field: str, problem: str, remedy: str) -> DataError:
        """The error of one of its fields."""
        return DataError(f"{self.place}: {field}", problem, remedy)

    def tokens(self, field: str, policy: TextPolicy) -> array[int]:
        """The token ids in `field`, each one of the policy's."""
        ids = self.record.get(field)
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise self.error(field, "not a list of whole numbers", "give token ids")
        vocabulary = policy.config.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                raise self.error(field, f"token id {shown(token)} is not in the policy's vocabulary",
                                 f"use ids from 0 to {vocabulary - 1}")
        return array("i", ids)

    def name(self) -> str | int:
        """Its id."""
        name = self.record.get("id")
        if name is None:
            raise self.error("id", "missing", "name each line; ids come back with the samples")
        if type(name) not in (str, int) or name == "":
            raise self.error("id", f"{shown(name)} is not a name", "use text or a whole number")
        if len(str(name)) > MAX_ID:
            raise self.error("id", f"{shown(name)} has {len(str(name))} characters", f"use at most {MAX_ID}")
        return name

    def prompt(self, policy: TextPolicy) -> tuple[int, ...]:
        """The tokens of its prompt, which leave room for one more."""
        given = [field for field in ("prompt", "prompt_tokens") if self.record.get(field) is not None]
        if len(given) != 1:
            raise self.error("prompt", "given twice, as text and as tokens" if given else "missing",
                             "give one of prompt and prompt_tokens")
        field, longest = given[0], policy.config.max_position_embeddings
        if field == "prompt_tokens":
            tokens = tuple(self.tokens(field, policy))
        else:
            text = self.record[field]
            if not isinstance(text, str):
                raise self.error(field, f"{shown(text)} is not text", "give text, or token ids as prompt_tokens")
            if policy.tokenizer is None:
                raise self.error(field, "this policy's directory has no tokenizer", "give token ids as prompt_tokens")
            found = bounded_prompt(policy.tokenizer, text, longest) if text else ()
            if found is None:
                raise self.error(field, f"{len(text)} characters, more than this policy's maximum of {longest} tokens, one to"
                                 " follow included", f"shorten it to {longest - 1}")  # fmt: skip
            tokens = tuple(found)
        if not tokens:
            raise self.error(field, "empty", "give at least one token")
        if len(tokens) >= longest:
            raise self.error(field, f"{len(tokens)} tokens, and this policy's maximum is {longest}, one to follow included",
                             f"shorten it to {longest - 1}")
        return tokens


def bounded_prompt(tokenizer: Any, text: str, longest: int) -> list[int] | None:
    """Token ids of a prompt; None where they are more than `longest`, which is found without tokenising much more than that."""
    length = TOKEN_CHARACTERS * longest
    while length < len(text):
        if len(encode_prompt(tokenizer, text[:length])) > longest + TOKEN_MARGIN:
            return None
        length *= 4
    return encode_prompt(tokenizer, text)


class InputFile(AbstractContextManager["InputFile"]):
    """A file of JSON lines, at least one. Each iteration reads it from its start; only what a pipe gives is kept, on disk.

    Args:
        policy: whose longest sequence bounds the lines.
        position_bytes: PROMPT_BYTES or SAMPLE_BYTES.

    Raises:
        DataError: it cannot be read, or has no lines (when it is iterated over: a line is no JSON object, or is too long).
    """

    def __init__(self, path: str | os.PathLike[str], policy: TextPolicy, position_bytes: int) -> None:
        self._name = os.fspath(path)
        self._most = LINE_BYTES + position_bytes * policy.config.max_position_embeddings
        try:
            self._file = open_input(path, pipes=True)
            if not self._file.seekable():
                self._file = self._kept(self._file)
        except OSError as error:
            raise unreadable(path, error) from error

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Line]:
        self._file.seek(0)
        empty = True
        for number, raw in read_lines(self._file, self._name, self._most):
            if raw.strip():
                empty = False
                place = f"{self._name} line {number}"
                yield Line(place, json_object(raw, place))
        if empty:
            raise DataError(self._name, "holds no lines", "write one JSON object per line")

    def shrunk(self) -> DataError:
        """The error of a file that lost lines between two iterations."""
        return DataError(self._name, "is shorter than when the run began", "leave input files as they are")

    def _kept(self, pipe: IO[bytes]) -> IO[bytes]:
        """A temporary file with what the pipe gives."""
        kept: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
        with pipe:
            for number, raw in read_lines(pipe, self._name, self._most):
                if kept.tell() + len(raw) > PIPE_BYTES:
                    raise DataError(f"{self._name} line {number}", f"more than {PIPE_BYTES:,} bytes came through this pipe",
                                    "write them to a file and give that")  # fmt: skip
                kept.write(raw)
        return kept


def shown(value: object) -> str:
    """A value as an error shows it."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."
