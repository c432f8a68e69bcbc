"""How many pages the K/V pool has: from the memory that is free when the policy is loaded, less what a step needs beside it.

What is set aside, in bytes, for max_batch B, V vocabulary entries, L layers, hidden size D, H query and G key heads of size d,
C = (H + G) d, F expert features, i bytes of the policy's dtype, and the largest step of the schedule: R verify or drafted rows of
a sequence, T rows of all (prefill_rows, and every row of B sequences):

    logits        16 * 4 * B * R * V: p, q, and what cut-offs make of them
    activations   T * (24 D + i * (8 D + 4 C + 4 F) + 8 * router states + L * (8 + 4 * (experts + 1))); and 16 C where a CPU
                  attends in float64 (`score_dtype`)
    attention     partial results of tiles whose keys programs share: 4 (d + 1) per query row and head; three times the rows that
                  fill the largest device; with batch_invariant those of the tiles that T fills and of one more per sequence,
                  B rounded up, once per 1024 keys of the widest table of pages, at most 32 times
    tails         2 B slots of the convolutions' past, in every layer
    drafts        4 * B * m * V, B rounded up: q of the m drafts that wait between two captured steps
    graphs        1/32 of the device, where passes are captured
    libraries     512 MB: workspaces of two streams, compiled kernels

Invariants: nothing is allocated before the pool is known to fit. A GPU has no more pages than its kernels address. One line in
the log says what was decided.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import RequestError
from ..kernels.attention import score_dtype
from ..kernels.attention.splits import INVARIANT_KEYS, MOST_SPLITS, WAVES
from ..kernels.attention.tiles import INVARIANT_QUERIES, MOST_QUERIES
from ..model.policy import Policy
from . import page_sizes
from .cache import pages_for
from .host_memory import host_memory
from .planning.planner import candidates
from .planning.step_costs import rows
from .schedule import Schedule
from .steps.recurring import bucket
from .steps.shapes import GRAPH_SHARE, power_of_two

DEFAULT_SHARE = 0.9
"""Of what is free on a GPU; the rest is for what torch's allocator cannot use between blocks."""
_DEFAULT_POSITIONS = 512
"""Of each sample of a full batch, on a CPU."""
_LOGIT_COPIES = 16
"""float32 values per row and token; measured, see the tests."""
_LIBRARIES = 512 << 20
_UNITS = {"GB": 10**9, "GiB": 1 << 30, "MB": 10**6, "MiB": 1 << 20}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")
_log = logging.getLogger(__name__)


class PoolConfig(Protocol):
    """The fields of EngineConfig that a pool depends on."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def max_batch(self) -> int: ...
    @property
    def pages(self) -> int | None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def prefill_rows(self) -> int | None: ...
    @property
    def captured(self) -> bool: ...
    @property
    def batch_invariant(self) -> bool: ...
    @property
    def kv_memory(self) -> float | str | None: ...


def check_kv_memory(kv_memory: float | str | None, pages: int | None) -> None:
    """Raise RequestError where the two do not say how large a pool is."""
    if pages is not None and pages < 1:
        raise RequestError("pages", f"{pages} is less than 1", "use a positive number, or leave it out")
    remedy = 'use a fraction of what is free, such as 0.9, or a size, such as "20GB"'
    if isinstance(kv_memory, str):
        if _SIZE.fullmatch(kv_memory) is None or not _bytes_of(kv_memory):
            raise RequestError("kv_memory", f"{kv_memory!r} is no size of memory", remedy)
    elif kv_memory is not None and (isinstance(kv_memory, bool) or not 0 < kv_memory <= 1):
        raise RequestError("kv_memory", f"{kv_memory!r} is outside 0..1", remedy)
    if kv_memory is not None and pages is not None:
        raise RequestError("kv_memory", f"{kv_memory!r} is given beside {pages} pages", "give one of kv_memory and pages")


@dataclass(frozen=True)
class Room:
    """What a pool may take.

    Attributes:
        free: bytes that are free with the policy loaded. aside: bytes that are set aside, by what for.
        page: bytes of a page in all layers, the tail that lies with it included.
        most: pages that kernels address; None for any number.
    """

    free: int
    aside: Mapping[str, int]
    page: int
    most: int | None

    @classmethod
    def of(cls, policy: Policy, config: PoolConfig, block_size: int) -> Room:
        """Beside a loaded policy."""
        free, total = memory(policy.device)
        z, most = policy.config, None
        if policy.device.type != "cpu":
            most = page_sizes.addressable_pages(
                heads=z.num_attention_heads, groups=z.num_key_value_heads, head_dim=z.head_dim, hops=policy.hops,
                page_size=config.page_size, ring_entries=2 * config.max_batch * _ring(policy, block_size),
            )  # fmt: skip
        return cls(free, set_aside(policy, config, block_size, total), page_bytes(policy, config.page_size), most)

    @property
    def usable(self) -> int:
        """Bytes for the pool and what lies beside it unused."""
        return max(self.free - sum(self.aside.values()), 0)

    def pages(self, share: float) -> int:
        """Pages that fit into this share of what is usable."""
        return self.within(int(share * self.usable))

    def within(self, size: int) -> int:
        """Pages that so many bytes hold, at most `most`."""
        pages = size // self.page
        return pages if self.most is None else min(pages, self.most)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_gb(size)}" for name, size in self.aside.items() if size >= 5 * 10**6)
        return f"of {_gb(self.free)} that are free, {_gb(sum(self.aside.values()))} are set aside ({parts or 'little'})"


def pool_pages(policy: Policy, config: PoolConfig, block_size: int) -> int:
    """Pages of the pool: those of `pages`, or of `kv_memory`; by default 0.9 of what is free on a GPU, and 512 positions for each
    of `max_batch` samples on a CPU.

    Raises:
        RequestError: they do not fit, or none does.
    """
    room, size = Room.of(policy, config, block_size), config.page_size
    wanted, asked = config.kv_memory, config.pages
    if wanted is None and asked is None and policy.device.type != "cpu":
        wanted = DEFAULT_SHARE
    if isinstance(wanted, str):
        pages, field, value = room.within(_bytes_of(wanted)), "kv_memory", repr(wanted)
    elif wanted is not None:
        pages, field, value = room.pages(wanted), "kv_memory", f"{wanted:g} of what is left"
    elif asked is not None:
        pages, field, value = asked, "pages", f"{asked} of {size} positions, {_gb(asked * room.page)}"
    else:
        longest = min(_DEFAULT_POSITIONS, policy.config.max_position_embeddings)
        pages, field = config.max_batch * pages_for(longest, size), "max_batch"
        value = f"{config.max_batch} samples of {longest} positions, {_gb(pages * room.page)} of K/V"
    if pages > room.pages(1.0):
        raise RequestError(field, f"{value}, and {room}", f"use at most {room.pages(1.0)} pages ({_gb(room.usable)}), or lower "
                           "max_batch and prefill_rows")  # fmt: skip
    least = pages_for(block_size + 2, size)
    if pages < least and field == "kv_memory":
        raise RequestError(field, f"{value} is {pages} pages, and a sample needs {least}: {room}",
                           "raise it, lower max_batch and prefill_rows, or use a device with more memory")  # fmt: skip
    _log.info("K/V pool on %s: %d pages of %d = %d tokens, %s; %s", policy.device, pages, size, pages * size,
              _gb(pages * room.page), room)  # fmt: skip
    return pages


def most_pages(policy: Policy, config: PoolConfig, block_size: int) -> int:
    """Pages that the default share of what is free holds: where more would be welcome, but are not needed."""
    return max(Room.of(policy, config, block_size).pages(DEFAULT_SHARE), 1)


def schedules_of(schedule: Schedule, block_size: int) -> tuple[Schedule, ...]:
    """The schedules, with sizes, that an engine of this schedule runs."""
    return candidates(block_size) if schedule.kind == "auto" else (schedule.within(block_size),)


def prefill_rows(config: PoolConfig, policy: Policy) -> int:
    """Most prompt rows of a step. A step that prefills runs eagerly: the host launches each of its kernels, which on a GPU takes
    as long for 2048 rows as for 512."""
    return config.prefill_rows or (512 if policy.device.type == "cpu" else 2048)


def page_bytes(policy: Policy, page_size: int) -> int:
    """One page in all layers: its keys and values, and the tail of the convolutions that lies with it (`PagedCache`)."""
    z = policy.config
    return page_sizes.page_bytes(
        layers=z.num_hidden_layers, heads=z.num_attention_heads, groups=z.num_key_value_heads, head_dim=z.head_dim,
        hops=policy.hops, page_size=page_size, itemsize=policy.dtype.itemsize)


def set_aside(policy: Policy, config: PoolConfig, block_size: int, device_memory: int) -> dict[str, int]:
    """Bytes that a step needs beside weights and pool, by what for; the formulas stand above.

    Args:
        device_memory: all bytes of the device.
    """
    z, item, batch = policy.config, policy.dtype.itemsize, config.max_batch
    known = schedules_of(config.schedule, block_size)
    row = max(map(rows, known))
    prefilled = prefill_rows(config, policy)
    step = prefilled + batch * row
    logit_rows = batch * max(max((s.drafts or 0) + 1, s.block or 1) for s in known)
    channels = (z.num_attention_heads + z.num_key_value_heads) * z.head_dim
    each = 24 * z.hidden_size + item * (8 * z.hidden_size + 4 * channels + 4 * z.moe_intermediate_size)
    each += 8 * z.router_hidden_size + z.num_hidden_layers * (8 + 4 * (z.num_experts + 1))
    away = policy.device.type != "cpu"
    if score_dtype(policy.lm_head.weight) != policy.dtype:
        each += 16 * channels
    split_rows = (WAVES + 1) * MOST_QUERIES
    if config.batch_invariant:
        # A captured step has padding: more sequences, and a table of pages that is wider than the longest one.
        cached = power_of_two(pages_for(z.max_position_embeddings, config.page_size)) * config.page_size
        most = min(pages_for(cached, INVARIANT_KEYS) + pages_for(prefilled + row, INVARIANT_KEYS), MOST_SPLITS)
        per_tile = max(INVARIANT_QUERIES // (z.num_attention_heads // z.num_key_value_heads), 1)
        tiles = pages_for(prefilled + bucket(batch) * row, per_tile) + bucket(batch)
        split_rows = most * tiles * INVARIANT_QUERIES * z.num_key_value_heads
    ring = _ring(policy, block_size)
    tail = page_sizes.tail_row(z.num_attention_heads, z.num_key_value_heads, z.head_dim)
    return {
        "logits": _LOGIT_COPIES * 4 * logit_rows * z.vocab_size,
        "activations": step * each,
        "attention": 4 * (z.head_dim + 1) * split_rows if away else 0,
        "tails": 2 * batch * ring * tail * z.num_hidden_layers * item,
        "drafts": 4 * bucket(batch) * max(s.drafts or 0 for s in known) * z.vocab_size if away and config.captured else 0,
        "graphs": device_memory // GRAPH_SHARE if away and config.captured else 0,
        "libraries": _LIBRARIES if away else 0,
    }


def _ring(policy: Policy, block_size: int) -> int:
    """Tail entries of a slot (`PagedCache.ring`)."""
    return block_size + 1 + policy.hops


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process may still take there, and all bytes of the device. What torch holds but does not use is free."""
    if device.type != "cpu":
        free, total = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    return host_memory()


def _bytes_of(size: str) -> int:
    found = _SIZE.fullmatch(size)
    assert found is not None, "checked before"
    return int(float(found[1]) * _UNITS[found[2]])


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
