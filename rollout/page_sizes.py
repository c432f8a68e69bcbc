"""How many bytes a page of the K/V pool has. Imports no torch, so that a command can ask before anything is started."""

from __future__ import annotations


def tail_row(heads: int, groups: int, head_dim: int) -> int:
    """Numbers that the convolutions keep of one position in one layer: q and k before them, and half of a delayed value.

    Args: heads, groups: of queries, and of keys."""
    return (heads + groups) * head_dim + groups * head_dim // 2


def page_bytes(*, layers: int, heads: int, groups: int, head_dim: int, hops: int, page_size: int, itemsize: int) -> int:
    """One page in all layers: its keys and values, and the tail of the convolutions that lies with it (`PagedCache`).

    Args: hops: positions that the convolutions look back. itemsize: bytes of a number."""
    keys_and_values = 2 * groups * head_dim * page_size
    return layers * (keys_and_values + min(hops, page_size) * tail_row(heads, groups, head_dim)) * itemsize


def addressable_pages(*, heads: int, groups: int, head_dim: int, hops: int, page_size: int, ring_entries: int) -> int:
    """Pages whose tail the kernels of a GPU address: offsets into the tail of one layer have 32 bits.

    Args: ring_entries: tail entries of all slots, which come before those of the pages."""
    entries = (1 << 31) // ((heads + groups) * head_dim) - ring_entries
    return max(entries, 0) // max(min(hops, page_size), 1)
