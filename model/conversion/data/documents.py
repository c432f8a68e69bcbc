"""Documents: token ids, and which of them are to be learned.

Invariants:
- A prompt and its answer are encoded apart, as in decoding, where the prompt is all there is.
- An answer ends with an end-of-sequence token. A document's first token is never learned: nothing predicts it.
- A record that cannot become a document is an error that names the record; no record is left out silently.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from ....errors import DataError
from ...layout import CLEAN, TokenLayout
from ...tokenizer import encode_prompt
from ..config import Stage


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first `prompt` carry no loss.

    Attributes:
        answers: (start, end) of what is learned, where that is not everything after the prompt.
    """

    tokens: Sequence[int]
    prompt: int
    answers: tuple[tuple[int, int], ...] = ()

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of everything that is learned."""
        return self.answers or ((self.prompt, len(self.tokens)),)

    def part(self, start: int, end: int) -> Document | None:
        """The tokens start..end - 1 as a document; None where nothing of them is learned."""
        inside = [(max(a, start + 1) - start, min(b, end) - start) for a, b in self.spans]
        kept = tuple((a, b) for a, b in inside if a < b)
        return Document(self.tokens[start:end], kept[0][0], kept) if kept else None


def text_document(tokenizer: PreTrainedTokenizerFast, text: str) -> Document:
    """Plain text, all of it learned."""
    ids = array("i", encode_prompt(tokenizer, text))
    ids.append(_end_token(tokenizer))
    return Document(ids, 1)


def answer_document(tokenizer: PreTrainedTokenizerFast, prompt: str, completion: str) -> Document:
    """A prompt and the completion that is learned."""
    ids = array("i", encode_prompt(tokenizer, prompt))
    start = len(ids)
    ids.extend(tokenizer.encode(completion, add_special_tokens=False))
    ids.append(_end_token(tokenizer))
    return Document(ids, max(start, 1))


def chat_document(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], where: str) -> Document:
    """A conversation in the tokenizer's chat template, or as `role: content` lines where it has none; the assistant's
    answers are learned."""
    ids, answers, done = array("i"), [], ""
    end = _end_token(tokenizer)
    plain = tokenizer.chat_template is None
    if plain and tokenizer.bos_token_id is not None:
        ids.append(tokenizer.bos_token_id)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, messages[:turn], True)
        told = f"{asked}{message['content']}" if plain else _render(tokenizer, messages[: turn + 1], False)
        if not asked.startswith(done) or not told.startswith(asked):
            raise DataError(f"{where} message {turn}", "the chat template writes earlier turns anew when later ones follow",
                            "give conversations of one answer, or a template that keeps its turns")  # fmt: skip
        ids.extend(tokenizer.encode(asked[len(done) :], add_special_tokens=False))
        start = max(len(ids), 1)
        answer = tokenizer.encode(told[len(asked) :], add_special_tokens=False)
        if plain:
            answer.append(end)
        ids.extend(answer)
        # What a template writes after the end of a turn is not the answer's.
        length = answer.index(end) + 1 if end in answer else len(answer)
        answers.append((start, start + length))
        done = f"{told}\n" if plain else told
    return Document(ids, answers[0][0], tuple(answers))


def _render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, Any]], asks: bool) -> str:
    if tokenizer.chat_template is None:
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + ("assistant: " if asks else "")
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)


def _end_token(tokenizer: PreTrainedTokenizerFast) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("data", "the tokenizer has no end-of-sequence token",
                        "set `eos_token` in its tokenizer_config.json")  # fmt: skip
    return tokenizer.eos_token_id


def fitted(document: Document, stage: Stage, where: str) -> Iterator[Document]:
    """The document, or what the stage wants of one that is too long for it.

    Raises:
        DataError: it is too long, and the stage says `error`.
    """
    length, most = len(document.tokens), stage.longest
    if length <= most:
        yield document
    elif stage.too_long == "error":
        raise DataError(where, f"a document of {length} tokens, more than the {most} of stage {stage.name!r}",
                        "raise sequence_tokens, or set too_long to split or drop")  # fmt: skip
    elif stage.too_long == "split":
        for start in range(0, length, most):
            part = document.part(start, min(start + most, length))
            if part is not None:
                yield part


def cut_blocks(document: Document, stage: Stage, draw: random.Random) -> list[tuple[int, int]]:
    """Mask blocks (start, length) over everything that is learned, once per masked copy; the last block of a copy runs past
    the end of what is learned."""
    low, high = stage.block_length
    blocks = []
    for _ in range(stage.masked_copies):
        for begin, end in document.spans:
            start, first = begin, True
            while start < end:
                length = draw.randint(low, high)
                blocks.append((start, length))
                # A first block that is left early shifts every later one, so that no alignment is special.
                start += draw.randint(1, length) if stage.random_offset and first else length
                first = False
    return blocks


def learned_targets(target_T: torch.Tensor, layout: TokenLayout, documents: Sequence[Document]) -> torch.Tensor:
    """target_T with -100 where the token to predict is no part of its document's answers."""
    if not any(document.answers for document in documents):
        return target_T
    lengths = [len(document.tokens) for document in documents]
    longest = max(lengths)
    learned_SP = torch.zeros(len(documents), longest + 1, dtype=torch.bool)
    for line_P, document in zip(learned_SP, documents, strict=True):
        for start, end in document.spans:
            line_P[start:end] = True
    predicted_T = layout.position_T + (layout.block_T == CLEAN)
    return target_T.where(learned_SP[layout.sequence_T, predicted_T.clamp_max(longest)], -100)
