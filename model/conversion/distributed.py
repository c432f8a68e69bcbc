"""The processes of a run: their ranks, how they share a policy, and how they sum figures.

Invariants:
- A run of one process and a run of many do the same arithmetic: losses are normalised over the packs of all processes,
  gradients are summed, and a parameter that no row used has a zero gradient everywhere.
- Which process this is comes from the environment that torchrun and Ray Train set; nothing else knows about launchers.
- Every process of a group makes the same sequence of calls here. When one process is lost, the others end.

FSDP2 (`torch.distributed.fsdp.fully_shard`) holds parameters, gradients and optimiser states in shards, gathered layer by
layer; embedding and heads, which share a matrix, stay gathered from the forward pass to the end of the backward pass. So
`Policy.head` may be called between the two as often as a process likes. It must not become an FSDP forward method: its calls
would then take part in the order in which layers are gathered, and processes that cut their rows into different numbers of
chunks would wait for each other for ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ...errors import ClusterError, InvalidInput
from ..device import resolved
from ..policy import MarkovHead, Policy

_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout", "TCPStore")


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64."""
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64)).tolist()

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the processes, on the tensor's device; of one process, the tensor itself."""
        if self.size == 1:
            return value
        total = value.to(self.device)
        total = total.clone() if total is value else total
        dist.all_reduce(total)
        return total.to(value.device)

    def barrier(self) -> None:
        """Return when all processes have come here."""
        if self.size > 1:
            self.sum([0.0])


@contextmanager
def joined(timeout_s: float = 600.0, device_name: str = "auto") -> Iterator[Group]:
    """The group this process belongs to: of `WORLD_SIZE` processes where a launcher set it, else of one.

    A process group that exists (Ray Train makes one) is used and left; one made here is closed at the end.

    Args:
        timeout_s: how long a collective waits for a process that does not answer, seconds.
        device_name: as of `model.device.resolved`; `auto` and `cuda` give each process of this machine a GPU of its own.

    Raises:
        InvalidInput: no such device, or fewer GPUs than processes.
        ClusterError: another process of the group was lost.
    """
    own = not dist.is_initialized() and "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    device = device_of(device_name, int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if own:
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else Group(device=device)
    except RuntimeError as error:
        if dist.is_initialized() and not isinstance(error, ClusterError) and any(w in str(error) for w in _LOST):
            raise ClusterError(
                f"training: process {dist.get_rank()} lost another one ({str(error).splitlines()[0]}); run the command "
                "again to go on from the last checkpoint"
            ) from error
        raise
    else:
        if own:
            dist.destroy_process_group()


def device_of(name: str, local_rank: int, processes: int) -> torch.device:
    """The device of this machine's process number `local_rank`, of `processes` over all machines.

    A process that sees one GPU has that one, whatever its number: launchers such as Ray Train show each process its own.

    Raises:
        InvalidInput: no such device, or a process without a GPU of its own.
    """
    device = resolved(name)
    if device.type == "cpu" or processes == 1:
        return device
    if name not in ("auto", "cuda"):
        raise InvalidInput("device", f"{name} for {processes} processes", "use cuda, which gives each process a GPU of its own")
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise InvalidInput("launcher.workers", f"process {local_rank} here has no GPU of its own: {visible} are visible",
                           "start as many processes per machine as it has GPUs")  # fmt: skip
    return torch.device("cuda", local_rank if visible > 1 else 0)


def shard(policy: Policy, group: Group, compute: torch.dtype) -> Policy:
    """Move a policy to the group's device and, in a group of several processes, hold it in shards. In place.

    Args:
        compute: dtype the gathered weights have; shards, gradients and the residual stream stay float32.

    Raises:
        InvalidInput: torch is too old to shard experts that no row of a process may have chosen.
    """
    if group.size == 1:
        return policy.to(group.device)
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise InvalidInput("launcher.workers", f"torch {torch.__version__} cannot train experts on several processes",
                           "install torch 2.13 or newer, or use one worker")  # fmt: skip
    mesh = init_device_mesh(group.device.type, (group.size,), mesh_dim_names=("shard",))
    # A layer's inputs keep their dtype: the residual stream is wider than the weights.
    mixed = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False) \
        if compute != torch.float32 else MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh, mp_policy=mixed)
    whole = cast(FSDPModule, policy)
    whole.set_reduce_scatter_unused_params(True)
    for module in (whole, *(cast(FSDPModule, layer) for layer in policy.model.layers)):
        # Losses are normalised over all processes already: gradients are added up, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return policy.to(group.device)


def clip_gradients(policy: nn.Module, most: float) -> float:
    """Scale gradients down to a norm of `most` over the whole policy; returns the norm before.

    A parameter without a gradient gets a zero one, so that weight decay does not depend on the number of processes.
    """
    for parameter in policy.parameters():
        if parameter.grad is None and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), most, foreach=True)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def whole_policy(policy: Policy, group: Group) -> Policy | None:
    """A plain copy of a sharded policy on the CPU of the first process; None on the others. The policy itself, where it
    is not sharded."""
    if group.size == 1:
        return policy
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in policy.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if group.first:
            tensors[name] = whole.detach().cpu()
        del whole
    if not group.first:
        return None
    with torch.device("meta"):
        plain = Policy(policy.config)
        if policy.markov is not None:
            plain.markov = MarkovHead(policy.config.vocab_size, policy.markov.rank)
    plain.load_state_dict(tensors, assign=True)
    for name in ("block_size", "mask_token_id", "draft_temperature", "converted"):
        setattr(plain, name, getattr(policy, name))
    plain.tokenizer = policy.tokenizer
    return plain
