"""What is learned of a document, and what becomes of one that is too long."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conversion_parts import packs

from blockroll.errors import DataError
from blockroll.model.conversion.config import Data, Rollouts, Stage
from blockroll.model.conversion.data import Document
from blockroll.model.conversion.data.documents import answer_document, chat_document, fitted, text_document
from blockroll.model.conversion.stage import Pack
from blockroll.model.layout import CLEAN
from blockroll.model.tokenizer import BOS, EOS, train_tokenizer

STAGE = Stage(name="s", kind="diffusion", tokens=1, pack_tokens=16, block_length=(4, 4), random_offset=False)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it? user: assistant: content 12"], 300)


def learned(tokenizer, document: Document) -> list[str]:
    return [tokenizer.decode(document.tokens[start:end]) for start, end in document.spans]


def test_text_and_completions(tokenizer) -> None:
    text = text_document(tokenizer, "what is it?")
    assert text.tokens[0] == BOS and text.tokens[-1] == EOS
    assert learned(tokenizer, text) == ["what is it?<eos>"]
    answer = answer_document(tokenizer, "what is it?", "12")
    assert learned(tokenizer, answer) == ["12<eos>"]
    assert list(answer.tokens[: answer.prompt]) == list(text.tokens[:-1])


MESSAGES = [
    {"role": "system", "content": "be short"}, {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "12"},
    {"role": "user", "content": "it?"}, {"role": "assistant", "content": "is it"},
]  # fmt: skip


def test_answers_of_a_conversation_are_learned_and_nothing_else(tokenizer) -> None:
    plain = chat_document(tokenizer, MESSAGES, "x")
    assert learned(tokenizer, plain) == ["12<eos>", "is it<eos>"]
    tokenizer.chat_template = TEMPLATE
    try:
        templated = chat_document(tokenizer, MESSAGES, "x")
        whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
        assert tokenizer.decode(templated.tokens) == whole[: whole.rindex("|") + 1]
        # What the template writes after the end of a turn is not the answer's.
        assert learned(tokenizer, templated) == ["12<eos>", "is it<eos>"]
        tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
        with pytest.raises(DataError, match="x message 2: the chat template writes earlier turns anew"):
            chat_document(tokenizer, MESSAGES, "x")
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_targets_lie_in_the_answers(kind: str) -> None:
    """A conversation's questions, between its answers, carry no loss in either kind of stage."""
    document = Document(tuple(range(10, 24)), 3, ((3, 6), (9, 14)))
    other = Document(tuple(range(30, 36)), 2)
    stage = STAGE.model_copy(update={"kind": kind, "masked_copies": 2})
    pack = Pack.of([document, other], stage, 39, random.Random(0))
    layout, target_T = pack.layout, pack.target_T
    wanted = {0: {13, 14, 15, *range(19, 24)}, 1: set(range(32, 36))}
    for clean in (True, False) if kind == "diffusion" else (True,):
        for sequence, tokens in wanted.items():
            rows = (layout.sequence_T == sequence) & ((layout.block_T == CLEAN) == clean) & (target_T >= 0)
            found = set(target_T[rows].tolist())
            # A document without spans of its own keeps its prompt's targets; `prompts` leaves them out of the loss.
            assert found == tokens or (sequence == 1 and tokens <= found and pack.prompts[1] == 2)
    assert (pack.ar_rows, pack.draft_rows) == (12, 0 if kind == "ar" else 24)


def test_too_long_documents(tokenizer) -> None:
    document = Document(tuple(range(40)), 4, ((4, 10), (20, 40)))
    with pytest.raises(DataError, match=r"a\.jsonl line 3: a document of 40 tokens, more than the 16 of stage 's'; raise"):
        list(fitted(document, STAGE, "a.jsonl line 3"))
    assert list(fitted(document, STAGE.model_copy(update={"too_long": "drop"}), "x")) == []
    parts = list(fitted(document, STAGE.model_copy(update={"too_long": "split"}), "x"))
    assert [list(part.tokens) for part in parts] == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    # The first token of a part is not learned: nothing predicts it.
    assert [part.spans for part in parts] == [((4, 10),), ((4, 16),), ((1, 8),)]
    assert document.part(10, 20) is None


def rollouts(folder: Path, *records: dict) -> Data:
    path = folder / "rollouts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return Data(sources=(Rollouts(kind="rollouts", paths=(str(path),), epochs=1, finish_reasons=("eos",)),), pool=4)


def test_rollouts_are_learned_as_they_were_sampled(tokenizer, tmp_path: Path) -> None:
    good = {"id": "a", "prompt_tokens": [1, 9], "tokens": [5, 6, 2], "finish_reason": "eos"}
    data = rollouts(tmp_path, good, {**good, "tokens": [7] * 3, "finish_reason": "length"})
    ((document,),) = list(packs(data, tokenizer, STAGE))
    assert list(document.tokens) == [1, 9, 5, 6, 2] and document.spans == ((2, 5),)
    for bad, problem in {"tokens": ([], "an empty document"), "prompt_tokens": ([1, 10**6], "no token id below")}.items():
        with pytest.raises(DataError, match=f"line 1 field '{bad}': .*{problem[1]}"):
            next(packs(rollouts(tmp_path, {**good, bad: problem[0]}), tokenizer, STAGE))
