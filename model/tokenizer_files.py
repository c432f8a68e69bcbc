"""Reads the tokenizer in a policy's directory.

Invariants:
- No code of the directory runs, and nothing is fetched.
- The steps before tokens are looked up lengthen a text by a bounded factor, so a text's length bounds what encoding it costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..errors import CheckpointError
from .arguments import short
from .config import quiet_transformers, read_json

MAX_TOKENIZER_BYTES = 128 << 20
"""Largest tokenizer.json. That of a vocabulary of 262,144 tokens with its merges has 33 MB."""
MAX_GROWTH = 256
"""How many times longer than a text its normalised form may be. SentencePiece's tokenizers put a character before a text and
another one in place of each blank."""
MAX_NODES = 100_000
"""Values in the steps around the vocabulary, all together: a few hundred are usual."""
MAX_STRING = 8192
"""Characters of one of them, expressions included; tables that are compiled into text (`precompiled_charsmap`) have no limit."""
_VOCABULARIES = ("vocab.*", "*.model", "*.tiktoken")
"""Files in place of tokenizer.json, of older tokenizers."""
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer; None where the directory has none.

    Raises:
        CheckpointError: a file is too large or corrupt, or a step of the tokenizer makes texts too long.
    """
    path, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not (path.is_file() or settings.is_file()):
        return None
    for file in (settings, path):
        if file.is_file():
            held = read_json(file, MAX_TOKENIZER_BYTES)
            if not isinstance(held, dict):
                raise CheckpointError("policy", f"the tokenizer in {directory} cannot be read ({file.name} holds no section)",
                                      "copy tokenizer.json and tokenizer_config.json again")  # fmt: skip
            if file is path:
                _check_steps({name: held.get(name) for name in _STEPS}, path)
            del held
    if not path.is_file() and not any(next(directory.glob(pattern), None) for pattern in _VOCABULARIES):
        raise CheckpointError("policy", f"the tokenizer in {directory} has no vocabulary", "copy tokenizer.json too")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more precise
        said = short(" ".join(str(error).split()))
        raise CheckpointError("policy", f"the tokenizer in {directory} cannot be read ({said})",
                              "copy tokenizer.json and tokenizer_config.json again") from error  # fmt: skip


def _check_steps(steps: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where the steps are too many or make texts too long."""
    growth = nodes = 1
    for name, value in _values(steps):
        nodes += 1
        if isinstance(value, dict):
            growth *= _growth(value)
        elif isinstance(value, str) and len(value) > MAX_STRING and name not in ("content", "prepend", "precompiled_charsmap"):
            raise CheckpointError("policy", f"{short(name)} in {path} has {len(value)} characters", f"use at most {MAX_STRING}")
        if growth > MAX_GROWTH or nodes > MAX_NODES:
            what = "replacements that lengthen a text without bound" if growth > MAX_GROWTH else f"more than {MAX_NODES} values"
            raise CheckpointError("policy", f"{path} has {what}", "copy tokenizer.json and tokenizer_config.json again")


def _growth(step: dict[str, Any]) -> int:
    """How many times longer a step may make a text, from above."""
    put = step.get("content", step.get("prepend"))
    if not isinstance(put, str):
        return 1
    pattern = step.get("pattern")
    taken = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1, -(-len(put) // max(len(taken), 1)) if isinstance(taken, str) else len(put))


def _values(section: Any) -> Iterator[tuple[str, Any]]:
    """Everything below a section that is no list, with the key it stands under."""
    left: list[tuple[str, Any]] = [("", section)]
    while left:
        name, value = left.pop()
        if isinstance(value, list):
            left += ((name, item) for item in value)
            continue
        yield name, value
        if isinstance(value, dict):
            left += ((str(key), item) for key, item in value.items())
