"""Reads and checks a policy's config.json.

Invariants:
- Every number is checked before anything of its size is made, so a config takes neither memory nor time.
- Of the file only the keys of the architecture and the section `diffusion` are read. Others have no meaning to a policy.
- A config that was read makes a policy: its sizes fit each other, and its token ids lie in the vocabulary.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..errors import CheckpointError
from .arguments import is_number, is_whole, short
from .rotary import is_activation, rotary_embedding
from .zaya_config import ZayaConfig

MAX_CONFIG_BYTES = 1 << 20
"""Largest config.json. That of ZAYA1-8B has 2 kB, and a layer adds 20 bytes."""
MAX_MARKOV_RANK = 1024
"""Largest rank of a Markov head; conversion trains none above."""
BLOCK_SIZES = (2, 64)
"""Least and largest block of mask rows."""
DRAFT_TEMPERATURES = (0.1, 2.0)
"""Least and largest temperature of the drafts, as a multiple of the temperature of p."""
MAX_BACKWARD = 64
"""Largest convolution of CCA: the ring of cached tails is longer than what it looks back, for every sequence."""
MIN_EPS = 1e-30
"""Least epsilon of a norm: 1 / sqrt(epsilon) and its square are float32 numbers."""

_SIZES = {
    "vocab_size": (2, 1 << 22), "hidden_size": (1, 1 << 17), "num_hidden_layers": (1, 512), "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024), "head_dim": (2, 4096), "moe_intermediate_size": (1, 1 << 20), "num_experts": (1, 1024),
    "router_hidden_size": (1, 1 << 16), "max_position_embeddings": (2, 2**31 - 1), "cca_time0": (1, MAX_BACKWARD),
    "cca_time1": (1, MAX_BACKWARD), "num_experts_per_tok": (1, 1),
}  # fmt: skip
"""Least and largest size: an order of magnitude above the models of today. Each layer is an object of Python, so more layers than
these would take seconds before the first tensor is compared with them. Positions are int32 in kernels."""
_KEYS = frozenset(ZayaConfig.__annotations__)
_SIZES_OF_LISTS = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers")
_KINDS = ("hybrid", "hybrid_sliding")
_ROPES = ("default", "linear", "yarn", "llama3")
"""Kinds of rotary embeddings whose frequencies depend on the configuration alone. Where they depend on the length of a sequence,
cached keys would have to change with it."""
_DIFFUSION = {"block_size": BLOCK_SIZES, "mask_token_id": (0, (1 << 22) - 1), "markov_rank": (0, MAX_MARKOV_RANK)}
_DRAFT_TEMPERATURE = "draft_temperature"


def read_config(directory: Path) -> ZayaConfig:
    """The directory's `ZayaConfig`, with its section `diffusion`.

    Raises:
        CheckpointError: the file is not JSON, describes another architecture, or holds a value that makes no policy.
    """
    path = directory / "config.json"
    raw = read_json(path, MAX_CONFIG_BYTES)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind != "zaya":
        raise CheckpointError("policy", f"{path} describes a {short(kind)} model", "use a ZAYA checkpoint (model_type 'zaya')")
    check = _Checks(path)
    for name, (least, most) in _SIZES.items():
        if name in raw:
            check.within(name, raw[name], least, most)
    check.lists(raw)
    check.tokens(raw)
    try:
        with quiet_transformers():
            config = ZayaConfig(**{name: value for name, value in raw.items() if name in _KEYS})
    except Exception as error:  # transformers raises whatever its checks and ours of its defaults meet
        raise CheckpointError("policy", f"{path} is no ZAYA configuration ({_one_line(error)})", "restore the file") from error
    check.architecture(config)
    check.rotary(config)
    if (diffusion := check.diffusion(raw.get("diffusion"), config)) is not None:
        config.diffusion = diffusion
    return config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps the warnings of transformers from the user: what they are about is checked here, or is an error."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def read_json(path: Path, most: int) -> Any:
    """What a JSON file of at most `most` bytes holds. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise CheckpointError("policy", f"{path} has {size} bytes, more than {most}", "restore the file")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError("policy", f"{path} cannot be read ({error.strerror})", "make it readable") from error
    except RecursionError as error:
        raise CheckpointError("policy", f"{path} is nested too deeply", "restore the file") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError("policy", f"{path} is not JSON ({_one_line(error)})", "restore the file") from error


class _Checks:
    """Checks of the values in one file; each raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def need(self, condition: bool, name: str, value: object, problem: str, remedy: str) -> None:
        if not condition:
            name = name if name.isprintable() else short(name)
            raise CheckpointError("policy", f"{name} in {self._path} is {short(value)}, {problem}", remedy)

    def within(self, name: str, value: Any, least: int, most: int) -> None:
        """The value is a whole number in least..most."""
        self.need(is_whole(value) and least <= value <= most, name, value, f"no whole number in {least}..{most}",
                  "use the config.json that was saved with the weights")

    def lists(self, raw: Mapping[str, Any]) -> None:
        """Values that are no single numbers have the size and types that the architecture expects."""
        heads, kv_heads, layers = (raw.get(name, getattr(ZayaConfig, name)) for name in _SIZES_OF_LISTS)
        self.need(heads % kv_heads == 0, "num_attention_heads", heads, f"no multiple of num_key_value_heads ({kv_heads})",
                  "restore the file")
        kinds, remedy = raw.get("layer_types"), "use the config.json that was saved with the weights"
        self.need(kinds is None or (isinstance(kinds, list) and len(kinds) <= _SIZES["num_hidden_layers"][1]), "layer_types",
                  kinds, "no list of one kind per layer", remedy)
        self.need(kinds is None or len(kinds) == layers, "layer_types", kinds, f"not {layers} kinds, one for each layer", remedy)
        ropes = raw.get("rope_parameters")
        self.need(ropes is None or isinstance(ropes, dict), "rope_parameters", ropes, "no section", remedy)
        for kind, rope in (ropes or {}).items():
            if kind == "rope_type":  # of files on the Hugging Face Hub, beside the sections
                continue
            name = f"rope_parameters.{kind}"
            self.need(kind in _KINDS and isinstance(rope, dict), name, rope, f"no section of {' or '.join(_KINDS)}", remedy)
            self.need(rope.get("rope_type", "default") in _ROPES, f"{name}.rope_type", rope.get("rope_type"),
                      "a kind that is not supported", f"use {', '.join(_ROPES)}")
            factor = rope.get("factor", 1.0)
            self.need(is_number(factor) and 1 <= factor < math.inf, f"{name}.factor", factor, "no number from 1", remedy)
        self.need(raw.get("hidden_act") is None or (isinstance(raw["hidden_act"], str) and is_activation(raw["hidden_act"])),
                  "hidden_act", raw.get("hidden_act"), "an activation that transformers does not know", remedy)

    def architecture(self, config: ZayaConfig) -> None:
        """The sizes fit each other, and numbers are in the range of float32."""
        kv_heads, remedy = config.num_key_value_heads, "restore the file"
        self.need(kv_heads * config.head_dim % 2 == 0, "head_dim", config.head_dim,
                  f"and {kv_heads} key heads of it do not split into two halves", remedy)
        kinds: list[str] = config.layer_types or []
        self.need(all(kind in _KINDS for kind in kinds), "layer_types", kinds, f"not of {' and '.join(_KINDS)} alone", remedy)
        window = config.sliding_window
        self.need(window is None or (is_whole(window) and 1 <= window < 2**31), "sliding_window", window,
                  "no positive number of positions", remedy)
        self.need(window is not None or "hybrid_sliding" not in kinds, "sliding_window", window,
                  "and there are layers of the kind hybrid_sliding", remedy)
        eps = config.rms_norm_eps
        self.need(is_number(eps) and MIN_EPS <= eps <= 1, "rms_norm_eps", eps, f"outside {MIN_EPS}..1", remedy)
        spread = config.initializer_range
        self.need(is_number(spread) and 0 <= spread <= 100, "initializer_range", spread, "outside 0..100", remedy)

    def tokens(self, raw: Mapping[str, Any]) -> None:
        """Token ids lie in the vocabulary, those too that the file leaves to their defaults."""
        vocabulary = raw.get("vocab_size", ZayaConfig.vocab_size)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            ids = raw.get(name, getattr(ZayaConfig, name))
            for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
                self._token(name, token, vocabulary)

    def _token(self, name: str, token: Any, vocabulary: int) -> None:
        self.need(is_whole(token) and 0 <= token < vocabulary, name, token, f"no token of a vocabulary of {vocabulary}",
                  "use the config.json that was saved with the weights")

    def rotary(self, config: ZayaConfig) -> None:
        """The rotary embedding can be made, and its frequencies are numbers that fit a head."""
        for kind in sorted(set(config.layer_types or [])):
            name = f"rope_parameters.{kind}"
            rope: Any = (config.rope_parameters or {}).get(kind)
            self.need(isinstance(rope, dict), name, rope, "no section, and layers of this kind exist", "restore the file")
            theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor", 1.0)
            self.need(is_number(theta) and 0 < theta < math.inf, f"{name}.rope_theta", theta, "no positive number",
                      "restore the file")
            self.need(is_number(share) and 0 < share <= 1, f"{name}.partial_rotary_factor", share, "outside 0..1",
                      "restore the file")
        try:
            with quiet_transformers():
                rotary = rotary_embedding(config)
        except Exception as error:  # transformers raises KeyError, TypeError, ZeroDivisionError, ... for lacking values
            raise CheckpointError("policy", f"rope_parameters in {self._path} make no rotary embedding ({_one_line(error)})",
                                  "restore the file") from error  # fmt: skip
        for name, frequency in rotary.named_buffers():
            fits = 0 < 2 * len(frequency) <= config.head_dim and bool(torch.isfinite(frequency).all())
            scaling = getattr(rotary, name.removesuffix("original_inv_freq").removesuffix("inv_freq") + "attention_scaling")
            self.need(fits and is_number(scaling) and math.isfinite(scaling), "rope_parameters", config.rope_parameters,
                      "which gives no frequencies for a head", "restore the file")

    def diffusion(self, section: Any, config: ZayaConfig) -> dict[str, Any] | None:
        """The section `diffusion`, None where the policy was not converted."""
        if section is None or section == {}:
            return None
        remedy = "give block_size and mask_token_id as whole numbers"
        self.need(isinstance(section, dict), "diffusion", section, "no section", remedy)
        known = [*_DIFFUSION, _DRAFT_TEMPERATURE]
        for name, value in section.items():
            close = difflib.get_close_matches(name[:40], known, 1)
            self.need(name in known, f"diffusion.{name[:40]}", value, "and there is no such key",
                      f"did you mean {close[0]}?" if close else f"use {', '.join(known)}")
            if name == _DRAFT_TEMPERATURE:
                coldest, hottest = DRAFT_TEMPERATURES
                self.need(is_number(value) and coldest <= value <= hottest, f"diffusion.{name}", value,
                          f"no number in {coldest}..{hottest}", "leave it out, which means 1")
                continue
            least, most = _DIFFUSION[name]
            self.need(is_whole(value) and least <= value <= most, f"diffusion.{name}", value,
                      f"no whole number in {least}..{most}", remedy)
        if (mask := section.get("mask_token_id")) is not None:
            self._token("diffusion.mask_token_id", mask, config.vocab_size)
            eos = config.eos_token_id
            self.need(mask not in (eos if isinstance(eos, list) else [eos]), "diffusion.mask_token_id", mask,
                      "which is an end-of-sequence token too", "give mask rows a token of their own")
        return section


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
