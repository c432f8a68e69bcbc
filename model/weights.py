"""Checks tensors from elsewhere against a policy: names and shapes have to match, or the first mismatch is an error.

Invariants: the policy is not changed; the returned tensors can be given to `Policy.load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..errors import InvalidInput
from .arguments import short
from .policy import Policy

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.", "model.module.")
"""What DDP, torch.compile, FSDP and PEFT put before or into a name."""


class Comparison:
    """Compares tensors with those of a policy.

    Args:
        error, field, where: what is raised, the field it names, and what it calls the tensors.
    """

    def __init__(self, policy: Policy, error: type[InvalidInput], field: str, where: str) -> None:
        self._error, self._field, self.where = error, field, where
        self._tied = policy.config.tie_word_embeddings
        self.wanted: dict[str, torch.Tensor] = policy.state_dict()
        if self._tied:
            del self.wanted[HEAD]

    def fail(self, problem: str, remedy: str) -> InvalidInput:
        """The error of a problem."""
        return self._error(self._field, problem, remedy)

    def names(self, given: Collection[str]) -> None:
        """All tensors of the policy are given, and no others. A tied head may be there."""
        unknown, missing = sorted(given - self.wanted.keys()), sorted(self.wanted.keys() - set(given))
        if self._tied and HEAD in unknown:
            unknown.remove(HEAD)
        if unknown and any(part in unknown[0] for part in _WRAPPERS):
            remedy = "take the state_dict of the bare model, without what wraps it (DDP, FSDP, torch.compile, PEFT)"
        else:
            remedy = "export the whole model again (save_pretrained, or state_dict)"
        said_of = {"lacks {} of the policy's tensors": missing, "has {} tensor{} that the policy has not": unknown}
        for problem, names in said_of.items():
            if names:
                said = problem.format(len(names), "s" if len(names) > 1 else "")
                raise self.fail(f"{self.where} {said}, first {', '.join(map(short, names[:3]))}", remedy)

    def form(self, name: str, dtype: torch.dtype | None, kind: str, shape: Collection[int]) -> None:
        """A tensor of this dtype, which messages call `kind`, and this shape can become the policy's."""
        if dtype not in DTYPES.values():
            raise self.fail(f"{name} in {self.where} is {kind}", f"use {', '.join(DTYPES)}")
        own = self.wanted[EMBEDDING if name == HEAD and self._tied else name].shape
        if tuple(shape) != tuple(own):
            raise self.fail(f"{name} in {self.where} has shape {tuple(shape)}, the policy's has {tuple(own)}",
                            "use the config.json that was saved with the weights")  # fmt: skip

    def finite(self, name: str, tensor: torch.Tensor, cast: torch.Tensor) -> None:
        """A tensor, or a part of it, holds numbers only, and so does what a cast to the policy's dtype made of it."""
        if all_finite(cast):
            return
        if all_finite(tensor):
            kind = str(cast.dtype).removeprefix("torch.")
            raise self.fail(f"{name} in {self.where} holds numbers that {kind} does not reach",
                            "use bfloat16 or float32, or a checkpoint from before the training went wrong")  # fmt: skip
        raise self.fail(f"{name} in {self.where} holds NaN or infinity", "use a checkpoint from before the training went wrong")

    def same_head(self, head: torch.Tensor, embedding: torch.Tensor) -> None:
        """A tied head, or a part of it, equals the embedding."""
        wide = torch.promote_types(head.dtype, embedding.dtype)
        if not torch.equal(head.to(embedding.device, wide), embedding.to(wide)):
            raise self.fail(f"{HEAD} in {self.where} differs from {EMBEDDING}, to which this policy's config.json ties it",
                            "leave it out and keep the two tied, or set tie_word_embeddings: false")  # fmt: skip


def fitting_tensors(
    policy: Policy, tensors: Mapping[str, torch.Tensor], error: type[InvalidInput], field: str, where: str,
    changed: Collection[str] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors, checked: every one of the policy's `state_dict`, no other, of the same shape, floating, and finite in the
    policy's dtype. The head of a policy that ties it to the embedding may be there, if it equals the embedding; it is left out.

    Args:
        error, field, where: as in `Comparison`.
        changed: names of the tensors that have to be here; None for every one. Others of the policy's may be missing.
    """
    compare = Comparison(policy, error, field, where)
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise compare.fail(f"{where} is {short(tensors)}", "give tensors by name, as state_dict() does")
    compare.names(tensors.keys() if changed is None else tensors.keys() | (compare.wanted.keys() - set(changed)))
    for name, tensor in tensors.items():
        dtype, kind = _dtype_of(tensor)
        compare.form(name, dtype, kind, getattr(tensor, "shape", ()))
    given = dict(tensors)
    for name, own in compare.wanted.items():
        if name in given:
            compare.finite(name, given[name], given[name].to(own.dtype))
    head = given.pop(HEAD, None) if policy.config.tie_word_embeddings else None
    if head is not None:
        compare.same_head(head, given.get(EMBEDDING, compare.wanted[EMBEDDING]))
    return given


def _dtype_of(tensor: Any) -> tuple[torch.dtype | None, str]:
    """The dtype of a tensor that holds numbers in memory, else None; and what messages call it."""
    if not isinstance(tensor, torch.Tensor):
        return None, type(tensor).__name__
    if tensor.layout != torch.strided or tensor.is_meta:
        return None, "a tensor on the device meta, without numbers" if tensor.is_meta else str(tensor.layout)
    return tensor.dtype, str(tensor.dtype)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity. The extremes tell: both are NaN where one number is. No copy is made."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())
