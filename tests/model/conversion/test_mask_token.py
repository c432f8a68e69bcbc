"""The token of mask rows is one that no text becomes, and no document holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conversion_parts import recipe
from random_zaya import randomise, zaya_config
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

import blockroll
from blockroll.errors import ConfigError, DataError
from blockroll.model.conversion.train import run, starting_policy
from blockroll.model.policy import Policy
from blockroll.model.tokenizer import BOS, EOS, MASK, PAD, train_tokenizer

STAGE = dict(name="diffusion", kind="diffusion", tokens=400)
SPARE = 4
"""Entries of the vocabulary that the tokenizer has no token for."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["what is it? user: 12 + 30 = 42"], 300)
    tokenizer.add_tokens([AddedToken("<unused7>"), AddedToken("<|turn|>", special=True), AddedToken("plain")])
    return tokenizer


@pytest.fixture(scope="module")
def parent(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoregressive parent."""
    policy = Policy(zaya_config(vocab_size=len(tokenizer) + SPARE, eos_token_id=EOS, max_position_embeddings=256))
    randomise(policy, 0, 0.3)
    policy.tokenizer = tokenizer
    return Path(blockroll.save_policy(policy.to(torch.float32), tmp_path_factory.mktemp("parent") / "policy"))


def test_the_tokenizer_s_own_and_unused_entries_are_taken(tokenizer, parent: Path, tmp_path: Path) -> None:
    ids = [tokenizer.convert_tokens_to_ids(name) for name in ("<unused7>", "<|turn|>")]
    last = len(tokenizer) + SPARE - 1
    for given, expected in [(None, MASK), *((i, i) for i in (MASK, PAD, *ids, len(tokenizer), last))]:
        assert starting_policy(recipe(tmp_path, STAGE, parent=str(parent), mask_token=given)).mask_token_id == expected


def test_tokens_of_ordinary_texts_are_refused(tokenizer, parent: Path, tmp_path: Path) -> None:
    plain = tokenizer.convert_tokens_to_ids("plain")
    for token, shown in ((20, r".+"), (BOS, "<bos>"), (EOS, "<eos>"), (plain, "plain")):
        with pytest.raises(ConfigError) as refused:
            run(recipe(tmp_path, STAGE, parent=str(parent), mask_token=token))
        assert str(refused.value).startswith(f"mask_token: {token} ('")
        assert str(refused.value).endswith("is a token of ordinary texts, which a mask row must not look like; "
                                           f"use {MASK}, the tokenizer's mask token")  # fmt: skip
        assert shown == ".+" or f"({shown!r})" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_without_a_mask_token_a_free_entry_is_named(parent: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    policy = blockroll.load_policy(parent)
    last = policy.config.vocab_size - 1
    blockroll.save_policy(policy, bare)
    saved = bare / "tokenizer_config.json"
    saved.write_text(json.dumps({**json.loads(saved.read_text()), "mask_token": None}))
    for token in (None, 20):
        with pytest.raises(ConfigError, match=f"^mask_token: .*; name an id that no text uses, such as {last}$"):
            starting_policy(recipe(tmp_path, STAGE, parent=str(bare), mask_token=token))


def test_data_that_hold_it_are_refused(tokenizer, parent: Path, tmp_path: Path) -> None:
    """Text that spells the token out, and rollouts, where no tokenizer tells."""
    texts, rollouts = tmp_path / "texts.jsonl", tmp_path / "rollouts.jsonl"
    texts.write_text('{"text": "what is it?"}\n{"text": "what is <mask>"}\n')
    rollouts.write_text(json.dumps({"prompt_tokens": [1, 30], "tokens": [31, 20, 2]}) + "\n")
    bare = tmp_path / "bare"
    policy = blockroll.load_policy(parent)
    policy.tokenizer = None
    blockroll.save_policy(policy, bare)
    for path, source, start, token, line in (
        (texts, dict(kind="jsonl"), parent, MASK, 2), (rollouts, dict(kind="rollouts"), bare, 20, 1),
    ):  # fmt: skip
        data = dict(pool=4, shuffle=0, sources=[dict(source, paths=[str(path)])])
        with pytest.raises(DataError) as refused:
            run(recipe(tmp_path, STAGE, parent=str(start), mask_token=token, data=data))
        assert str(refused.value) == (f"{path} line {line}: holds token {token}, the token of mask rows; remove the record, or "
                                      "choose a mask_token that no text becomes")  # fmt: skip
    with pytest.raises(ConfigError, match=f"^mask_token: {EOS} is a token of ordinary texts"):
        run(recipe(tmp_path, STAGE, parent=str(bare), mask_token=EOS))
