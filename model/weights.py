"""Checks tensors from elsewhere against a policy: names and shapes have to match, or the first mismatch is an error.

Invariants: the policy is not changed; the returned tensors can be given to `Policy.load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..errors import InvalidInput
from .policy import Policy

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.", "model.module.")
"""What DDP, torch.compile, FSDP and PEFT put before or into a name."""


class FittingTensors(dict[str, torch.Tensor]):
    """Tensors that were found to be a policy's."""


def fitting_tensors(
    policy: Policy, tensors: Mapping[str, torch.Tensor], error: type[InvalidInput], field: str, where: str
) -> FittingTensors:
    """The tensors, checked: every one of the policy's `state_dict`, no other, of the same shape, floating, and finite in the
    policy's dtype. The head of a policy that ties it to the embedding may be there, if it equals the embedding; it is left out.

    Args:
        error, field, where: what is raised, the field it names, and what it calls the tensors.
    """
    wanted, given = policy.state_dict(), FittingTensors(tensors)
    tied = policy.config.tie_word_embeddings
    head = given.pop(_HEAD, None) if tied else None
    if tied:
        wanted.pop(_HEAD)
    _check_names(wanted.keys(), given.keys(), error, field, where)
    for name, own in wanted.items():
        tensor = given[name]
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES.values():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise error(field, f"{name} in {where} is {kind}", f"use {', '.join(DTYPES)}")
        if tensor.shape != own.shape:
            raise error(field, f"{name} in {where} has shape {tuple(tensor.shape)}, the policy's has {tuple(own.shape)}",
                        "use the config.json that was saved with the weights")  # fmt: skip
        if not torch.isfinite(tensor.to(own.dtype)).all():
            raise error(field, f"{name} in {where} holds NaN or infinity", "use a checkpoint from before the training went wrong")
    embedding = given[_EMBEDDING]
    if head is not None and not (isinstance(head, torch.Tensor) and torch.equal(head.to(embedding), embedding)):
        raise error(field, f"{_HEAD} in {where} differs from {_EMBEDDING}, to which this policy's config.json ties it",
                    "leave it out, or train it tied")  # fmt: skip
    return given


def _check_names(wanted: Collection[str], given: Collection[str], error: type[InvalidInput], field: str, where: str) -> None:
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if unknown and any(part in unknown[0] for part in _WRAPPERS):
        remedy = "take the state_dict of the bare model, without what wraps it (DDP, FSDP, torch.compile, PEFT)"
    else:
        remedy = "export the whole model again (save_pretrained, or state_dict)"
    for names, problem in ((missing, "lacks {} of the policy's tensors"), (unknown, "has {} tensor{} that the policy has not")):
        if names:
            said = problem.format(len(names), "s" if len(names) > 1 else "")
            raise error(field, f"{where} {said}, first {', '.join(map(repr, names[:3]))}", remedy)
