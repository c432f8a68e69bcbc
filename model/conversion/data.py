"""Documents and packs for training.

Invariants: the order is a function of the seed and the step alone; documents never share a row; memory does not grow with
the number of tokens seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from ..tasks import make_tasks
from ..tokenizer import encode_prompt
from .config import Data, Stage


@dataclass(frozen=True)
class Document:
    """Token ids, of which the first `prompt` carry no loss."""

    tokens: tuple[int, ...]
    prompt: int


def documents(data: Data, tokenizer: PreTrainedTokenizerFast, stage: str) -> Iterator[list[Document]]:
    """Endless pools of documents, each pool sorted by length."""
    pool = 0
    while True:
        tasks = make_tasks("train", data.pool, seed=_seed(data.seed, stage, pool), only=data.families or None)
        made = []
        for task in tasks:
            prompt = encode_prompt(tokenizer, task.prompt)
            completion = tokenizer.encode(task.completion, add_special_tokens=False)
            made.append(Document((*prompt, *completion, tokenizer.eos_token_id), len(prompt)))
        yield sorted(made, key=lambda d: len(d.tokens))
        pool += 1


def packs(data: Data, tokenizer: PreTrainedTokenizerFast, stage: Stage) -> Iterator[list[Document]]:
    """Endless packs of about `stage.pack_tokens` tokens; documents of a pack have similar lengths."""
    for number, pool in enumerate(documents(data, tokenizer, stage.name)):
        ready: list[list[Document]] = [[]]
        held = 0
        for document in pool:
            if held + len(document.tokens) > stage.pack_tokens and ready[-1]:
                ready.append([])
                held = 0
            ready[-1].append(document)
            held += len(document.tokens)
        random.Random(_seed(data.seed, stage.name, number)).shuffle(ready)
        yield from ready


def cut_blocks(document: Document, stage: Stage, draw: random.Random) -> list[tuple[int, int]]:
    """Mask blocks (start, length) over everything after the prompt, once per masked copy; the last block of a copy runs
    past the document's end."""
    low, high = stage.block_length
    blocks = []
    for _ in range(stage.masked_copies):
        start, first = document.prompt, True
        while start < len(document.tokens):
            length = draw.randint(low, high)
            blocks.append((start, length))
            # A first block that is left early shifts every later one, so that no alignment is special.
            start += draw.randint(1, length) if stage.random_offset and first else length
            first = False
    return blocks


def _seed(seed: int, stage: str, number: int) -> int:
    return random.Random(f"{seed}/{stage}/{number}").getrandbits(48)
