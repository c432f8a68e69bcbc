"""A policy as a transformers model, so that trainers of transformers models train it.

Invariants:
- There is one network: `Policy.forward` over a token layout. What a trainer computes differs from what the engines recorded
  by rounding alone, for padded batches, packed rows and shared prefixes.
- Parameter names are the policy's own, so `push_weights` takes the state dict and a saved model is a policy's directory.
- Mask rows run in the same forward pass as the trainer's rows, so that one pass gives p and q (`PolicyModel.drafting`).

transformers' own ZAYA model is not used: TRL's AsyncGRPOTrainer refuses models with convolutions, because packed samples would
leak into one another there. In a token layout convolutions follow parents, so nothing leaks.

Legend: B sequences and N positions of the trainer's batch, T rows of the pack, D hidden.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from ...errors import InvalidInput
from ...files import make_directory
from ...model.checkpoint import load_policy, resolve, save_policy
from ...model.config import read_config
from ...model.conversion.config import DraftLoss
from ...model.conversion.objective import DraftLosses, draft_losses
from ...model.layout import CLEAN, TokenLayout, diffusion
from ...model.policy import Policy
from ..trainers.grpo.loss import mask_blocks

Places = list[list[int]]
"""Per document, where each of its tokens stands in the flattened batch."""


class PolicyConfig(PreTrainedConfig):
    """What trainers read of a policy's configuration, and the directory that the policy is loaded from."""

    model_type = "blockroll"
    auto_map: ClassVar[dict[str, str]] = {}  # TRL reads it; no code of a directory is ever run
    policy: str = ""
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def of(cls, name_or_dir: str | os.PathLike[str]) -> PolicyConfig:
        """The configuration of a shipped policy or of a directory."""
        directory = resolve(name_or_dir)
        own = read_config(directory)
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        found = cls(policy=str(directory.resolve()), intermediate_size=own.moe_intermediate_size, architectures=["PolicyModel"],
                    **{name: getattr(own, name) for name in same})
        found.name_or_path = found.policy
        return found


@dataclass
class Drafting:
    """Mask rows of one forward pass: what they are to be, then what came out.

    Attributes:
        trained_BN: bool, the positions whose next token is trained; mask blocks begin after the first one of a document.
        draw: where the blocks lie. share: share of the documents that carry mask rows.
        inside: the losses' form and temperature, to have them computed within the model's forward pass, as `found`: parameters in
            shards are whole there alone.
    """

    trained_BN: torch.Tensor
    draw: random.Random
    share: float
    policy: Policy
    inside: tuple[DraftLoss, float] | None = None
    found: DraftLosses | None = None
    hidden_TD: torch.Tensor | None = None
    layout: TokenLayout | None = None
    target_T: torch.Tensor | None = None
    prompts: tuple[int, ...] = ()

    def blocks(self, documents: Places) -> list[list[tuple[int, int]]]:
        """(start, length) of the mask blocks of each document."""
        trained = self.trained_BN.flatten().tolist()
        firsts = [next((i for i, place in enumerate(places) if trained[place]), None) for places in documents]
        self.prompts = tuple(len(p) if first is None else first + 1 for first, p in zip(firsts, documents, strict=True))
        able = [i for i, places in enumerate(documents) if self.prompts[i] < len(places)]
        chosen = set(self.draw.sample(able, round(self.share * len(able)) or 1)) if able else set[int]()
        return [mask_blocks(self.prompts[i], len(places), self.policy.block_size, self.draw) if i in chosen else []
                for i, places in enumerate(documents)]

    def losses(self, draft: DraftLoss, temperature: float) -> DraftLosses | None:
        """Losses of the mask rows of the pass; None where it had none."""
        if self.hidden_TD is None:
            return None
        assert self.layout is not None and self.target_T is not None
        return draft_losses(self.policy, self.hidden_TD, self.layout, self.target_T, self.prompts, draft, temperature)


class Backbone(nn.Module):
    """The policy's trunk, called as transformers calls a backbone. It holds the trunk's own modules and parameters."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        for name, module in policy.model.named_children():
            self.add_module(name, module)
        for name, parameter in policy.model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        policy.model = self  # type: ignore[assignment]  # one owner, so that a trainer that replaces parameters is seen
        self.gradient_checkpointing = False
        self.drafting: Drafting | None = None
        self._policy = (policy,)  # in a tuple, so that its parameters are not registered a second time

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        tree_kv_index: torch.Tensor | None = None,
        tree_cu_seqlens_q: torch.Tensor | None = None,
        tree_cu_seqlens_k: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Hidden states [B, N, D]; zero where a position is padding.

        Args:
            input_ids: int64[B, N].
            attention_mask: [B, N], 0 for padding, anywhere.
            position_ids: int64[B, N]; read where there is no mask: each 0 begins a document of a packed row.
            tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k: a row of samples that share prefixes, as TRL's `TreeRow` packs
                it. Each sample becomes a document; a shared prefix is computed once per sample.
        """
        policy = self._policy[0]
        if tree_kv_index is not None:
            assert tree_cu_seqlens_q is not None and tree_cu_seqlens_k is not None
            documents = tree_documents(tree_kv_index, tree_cu_seqlens_q, tree_cu_seqlens_k)
        elif attention_mask is None and position_ids is not None:
            documents = packed_documents(position_ids)
        else:
            documents = padded_documents(input_ids, attention_mask)
        flat = input_ids.flatten().tolist()
        drafting = self.drafting if torch.is_grad_enabled() else None
        blocks = [[] for _ in documents] if drafting is None else drafting.blocks(documents)
        texts = [[flat[place] for place in places] for places in documents]
        layout, target_T = diffusion(texts, blocks, policy.mask_token_id)
        policy.recompute_layers = self.gradient_checkpointing and self.training
        hidden_TD = policy(layout.to(policy.device))
        if drafting is not None and any(blocks):
            drafting.hidden_TD = hidden_TD
            drafting.layout, drafting.target_T = layout.to(policy.device), target_T.to(policy.device)
        clean_T = torch.nonzero(layout.block_T == CLEAN)[:, 0].tolist()
        row_N, end = torch.full((len(flat),), -1), len(clean_T)
        for places in reversed(documents):  # of a shared prefix, the first document's rows stand
            row_N[places] = torch.tensor(clean_T[end - len(places) : end])
            end -= len(places)
        row_N = row_N.to(policy.device)
        hidden_ND = torch.where((row_N >= 0)[:, None], hidden_TD[row_N.clamp_min(0)], 0.0)
        return BaseModelOutput(last_hidden_state=hidden_ND.view(*input_ids.shape, -1))


def padded_documents(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Places:
    """The documents of a padded batch: a row each, without its padding."""
    size = input_ids.shape[1]
    masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = ([row * size + i for i, kept in enumerate(mask) if kept] for row, mask in enumerate(masks.tolist()))
    return [places for places in rows if places]


def packed_documents(position_ids: torch.Tensor) -> Places:
    """The documents of rows of samples one after another, whose positions begin at 0."""
    size = position_ids.shape[1]
    found: Places = []
    for row, positions in enumerate(position_ids.tolist()):
        for i, position in enumerate(positions):
            if position == 0 or i == 0:
                found.append([])
            found[-1].append(row * size + i)
    return found


def tree_documents(kv_index: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Places:
    """The documents of a packed row of samples that share prefixes: the path from the root to each leaf."""
    index, ends_q, ends_k = kv_index.tolist(), cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    paths = [index[start:end] for start, end in pairwise(ends_k)]
    lengths = [end - start for start, end in pairwise(ends_q)]
    continued = {path[-length - 1] for path, length in zip(paths, lengths, strict=True) if length < len(path)}
    return [path for path in paths if path[-1] not in continued]


class PolicyModel(PreTrainedModel):
    """A policy as a causal language model of transformers: its own parameters, names and forward pass.

    Attributes:
        policy: the policy; training changes it in place.
    """

    config_class = PolicyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: PolicyConfig, policy: Policy | None = None) -> None:
        super().__init__(config)
        policy = load_policy(config.policy) if policy is None else policy
        self.model, self.lm_head = Backbone(policy), policy.lm_head
        if policy.markov is not None:
            self.markov = policy.markov
        self._policy = (policy,)
        self.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        self.requires_grad_(True)

    @property
    def policy(self) -> Policy:
        """The policy whose parameters these are."""
        return self._policy[0]

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike[str], *_: Any, dtype: Any = None, **__: Any) -> PolicyModel:
        """A shipped policy, a policy's directory, or a directory that `model_directory` wrote."""
        path = Path(name_or_dir)
        config = PolicyConfig.from_pretrained(path) if _is_reference(path) else PolicyConfig.of(name_or_dir)
        kept = "float32" if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
        return cls(config, load_policy(config.policy, kept))

    def save_pretrained(self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **_: Any) -> None:
        """Writes the policy: a directory that blockroll and transformers load."""
        if is_main_process:
            save_policy(self.policy, save_directory)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.policy.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> CausalLMOutput:
        """Logits [B, N, V]. Trainers with a fused head call `model` and use the head themselves."""
        hidden_BND = self.model(input_ids, attention_mask, **options).last_hidden_state
        if (drafting := self.model.drafting) is not None and drafting.inside is not None:
            drafting.found = drafting.losses(*drafting.inside)
        return CausalLMOutput(logits=self.policy.head(hidden_BND))

    @contextmanager
    def drafting(self, trained_BN: torch.Tensor, draw: random.Random, share: float = 1.0,
                 inside: tuple[DraftLoss, float] | None = None) -> Iterator[Drafting]:
        """Forward passes with gradients also run mask rows for the batch of this shape; see `Drafting`."""
        self.model.drafting = Drafting(trained_BN, draw, share, self.policy, inside)
        try:
            yield self.model.drafting
        finally:
            self.model.drafting = None


AutoConfig.register(PolicyConfig.model_type, PolicyConfig)
AutoModelForCausalLM.register(PolicyConfig, PolicyModel)


def load_model(name_or_dir: str | os.PathLike[str], dtype: str = "float32", device: str | torch.device = "cpu") -> PolicyModel:
    """The model to give to a trainer: a shipped policy or a policy's directory, with its tokenizer at `model.policy.tokenizer`.

    Raises CheckpointError as `load_policy` does.
    """
    return PolicyModel(PolicyConfig.of(name_or_dir), load_policy(name_or_dir, dtype, device))


def model_directory(name_or_dir: str | os.PathLike[str], output: str | os.PathLike[str]) -> Path:
    """Writes a directory that trainers load as this policy, for those that take a path alone. It holds a configuration that names
    the policy's directory, and its tokenizer; the weights stay where they are."""
    config = PolicyConfig.of(name_or_dir)
    target = make_directory(output)
    if _is_policy(target):
        raise InvalidInput("output", f"{target} holds a policy", "give a directory of its own")
    config.save_pretrained(target)
    tokenizer = load_tokenizer(config.policy)
    tokenizer.save_pretrained(target)
    return target


def load_tokenizer(name_or_dir: str | os.PathLike[str]) -> Any:
    """A policy's tokenizer."""
    from ...model.tokenizer_files import read_tokenizer

    if (tokenizer := read_tokenizer(resolve(name_or_dir))) is None:
        raise InvalidInput("policy", f"{name_or_dir} has no tokenizer", "use a policy that was saved with its tokenizer")
    return tokenizer


def _is_reference(path: Path) -> bool:
    return (path / "config.json").is_file() and f'"{PolicyConfig.model_type}"' in (path / "config.json").read_text()


def _is_policy(path: Path) -> bool:
    return any(path.glob("*.safetensors"))


def trained_positions(completion_mask: torch.Tensor, prompt_size: int) -> torch.Tensor:
    """bool[B, N]: positions whose next token is trained, of a batch whose prompts take `prompt_size` positions."""
    before = torch.zeros(len(completion_mask), prompt_size, dtype=torch.bool, device=completion_mask.device)
    trained = torch.cat([before, completion_mask.bool()], dim=1)
    return torch.cat([trained[:, 1:], torch.zeros_like(trained[:, :1])], dim=1)
