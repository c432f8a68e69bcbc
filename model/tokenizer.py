"""A byte-level BPE tokenizer for policies trained here (Hugging Face `tokenizers`).

Invariants: any text round-trips; each decimal digit is a token of its own; the first four ids are the special tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..errors import RequestError
from .arguments import require, short

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")
PAD, BOS, EOS, MASK = range(4)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Learn merges from texts.

    Args:
        vocab_size: most tokens, at least 260 (256 bytes and four special tokens).
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of a prompt, after the beginning-of-sequence token where the tokenizer has one.

    Raises:
        RequestError: the text has halves of surrogate pairs, which no encoding takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("prompt", f"{short(text)} is no Unicode text ({error.reason})", "check how it was decoded") from error
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], field: str) -> tuple[int, ...]:
    """A conversation's token ids, up to where the assistant's next turn begins.

    Raises:
        RequestError: of `field`: the tokenizer has no chat template, or its template refuses the messages.
    """
    require(tokenizer is not None and getattr(tokenizer, "chat_template", None) is not None, field,
            "holds chat messages, and the policy's tokenizer has no chat template",
            "give text, or set the tokenizer's chat_template")
    try:
        ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template raises whatever its author chose
        raise RequestError(field, f"the chat template refuses the messages ({' '.join(str(error).split())})",
                           "give messages as the template wants them") from error  # fmt: skip
    return tuple(ids)
