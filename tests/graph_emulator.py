"""Graphs of a device that is not there: a capture records a list of operations at fixed addresses, and a replay runs the list.

    with EmulatedDevice() as device:
        engine = Engine(policy.to("cuda:0"))   # captures its steps
        engine.rollout(requests)               # each replay is audited

- A captured operation keeps the very memory of its arguments and results, and the numbers among its arguments. A replay runs the
  operations again on that memory, whatever the host has done since.
- Memory of a capture comes from a pool of fixed addresses. A block is free again when the last tensor on it dies, and the next
  tensor takes the lowest free block: a result that nobody holds is overwritten.
- An audit precedes each replay: the captured call runs again, from the state that the pool had at the capture. It must record the
  same list: kernels, grids, numbers, addresses. The replay must then give what that run gave, to the last bit.
- As on a real device a capture refuses what makes the host wait, copies from memory of the host, and work on other streams.
- Each `PinnedCopy.send` must leave the host's present values on the device, in every tensor of its tree.
- A stream must have waited for the stream that touched a tensor last.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from pretend_device import PretendDevice
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from blockroll.kernels.graphs import GraphPool
from blockroll.kernels.transfer import PinnedCopy, _unique
from blockroll.rollout.steps import shapes

_POOL_BYTES, _ALIGNMENT = 8 << 20, 64
_UNWRITTEN = "empty", "new_empty"
"""Operations whose results hold what the memory held before."""


class GraphFault(AssertionError):
    """A captured step that would go wrong on a device."""


class Refused(RuntimeError):
    """What a capture refuses; the same class of error as torch's."""


class Block:
    """Memory of a pool; free when it dies."""

    def __init__(self, holes: Holes, start: int, end: int) -> None:
        self.start, self.end = start, end
        weakref.finalize(self, holes.give_back, start, end).atexit = False


class Holes:
    """Free parts of a pool."""

    def __init__(self, free: list[tuple[int, int]]) -> None:
        self.free, self.blocks = free, dict[int, weakref.ref[Block]]()

    def copy(self) -> Holes:
        return Holes(list(self.free))

    def take(self, size: int) -> Block:
        size = max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT
        i = next(i for i, (start, end) in enumerate(self.free) if end - start >= size)
        start, end = self.free[i]
        self.free[i : i + 1] = [(start + size, end)] if start + size < end else []
        block = Block(self, start, start + size)
        self.blocks[start] = weakref.ref(block)
        return block

    def give_back(self, start: int, end: int) -> None:
        self.blocks.pop(start, None)
        bisect.insort(self.free, (start, end))
        merged: list[tuple[int, int]] = []
        for low, high in self.free:
            if merged and merged[-1][1] == low:
                merged[-1] = merged[-1][0], high
            else:
                merged.append((low, high))
        self.free[:] = merged

    def at(self, offset: int) -> Block | None:
        """The block that holds this byte."""
        for start, block in self.blocks.items():
            found = block()
            if found is not None and start <= offset < found.end:
                return found
        return None


class Pool:
    """What `torch.cuda.graph_pool_handle` gives: memory at fixed addresses."""

    def __init__(self) -> None:
        self.memory = torch.zeros(_POOL_BYTES, dtype=torch.uint8).untyped_storage()
        self.start, self.holes = self.memory.data_ptr(), Holes([(0, _POOL_BYTES)])

    def block_of(self, near: torch.Tensor) -> Block | None:
        offset = near.data_ptr() - self.start
        return self.holes.at(offset) if 0 <= offset < _POOL_BYTES else None


class Stream:
    """An order of work; `seen` says how far it has waited for others."""

    numbers = count()

    def __init__(self, device: Any = None) -> None:
        self.name, self.done, self.seen = f"stream {next(self.numbers)}", 0, dict[str, int]()

    def wait_stream(self, other: Stream) -> None:
        for name, at in (*other.seen.items(), (other.name, other.done)):
            self.seen[name] = max(self.seen.get(name, 0), at)


@dataclass
class Node:
    """One operation of a graph; `fresh` are the results that have memory of their own, and where it lies."""

    name: str
    call: Callable[..., Any]
    args: Any
    kwargs: Any
    fresh: list[tuple[int, torch.Tensor]]

    @property
    def signature(self) -> tuple[Any, ...]:
        """Kernel or operation, grid, numbers and addresses, by argument."""

        def seen(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return f"{x.dtype} {tuple(x.shape)} {tuple(x.stride())} at {x.data_ptr():x}"
            plain = isinstance(x, int | float | str | bool | torch.dtype | torch.device) or x is None
            return repr(x) if plain else type(x).__name__

        given = [seen(x) for x in tree_flatten((self.args, self.kwargs))[0]]
        return self.name, *given, "->", *(seen(x) for _, x in self.fresh)


@dataclass
class Graph:
    """What `torch.cuda.CUDAGraph` is. `call` is what was captured."""

    device: EmulatedDevice = field(default_factory=lambda: EmulatedDevice.entered)
    nodes: list[Node] = field(default_factory=list)
    pool: Pool | None = None
    before: Holes | None = None
    stream: Stream | None = None
    call: Callable[[], object] | None = None
    held: list[Block | None] = field(default_factory=list)
    replays: int = 0

    @property
    def launches(self) -> int:
        """Operations that run something on the device: not views, not fresh memory."""
        return sum(
            bool(node.fresh or node.name.endswith("_") or node.name in ("paged", "setitem") or node.name.endswith("_kernel"))
            and not node.name.startswith(_UNWRITTEN)
            for node in self.nodes
        )

    def replay(self) -> None:
        self.replays += 1
        expected = self.device.audit(self) if self.device.audits else []
        with _disable_current_modes():
            for node in self.nodes:
                self.device.touch(node)
                out = node.call(*node.args, **node.kwargs)
                if not node.name.startswith(_UNWRITTEN):
                    given = tree_flatten(out)[0]
                    for i, memory in node.fresh:
                        memory.copy_(given[i])
            for name, memory, value in expected:
                if not torch.equal(memory, value):
                    raise GraphFault(f"a replay gives other numbers than the call, of {name}")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class EmulatedDevice(PretendDevice):
    """A `PretendDevice` with streams and graphs. `audits`: run the captured call before each replay and compare."""

    entered: EmulatedDevice

    def __init__(self, *args: Any, audits: bool = True, **options: Any) -> None:
        super().__init__(*args, **options)
        self.audits, self.graphs, self.stream = audits, list[Graph](), Stream()
        self._capturing: Graph | None = None
        self._fresh: list[Block] = []
        self._touched: dict[int, tuple[Stream, int]] = {}

    def __enter__(self) -> EmulatedDevice:
        EmulatedDevice.entered = self
        super().__enter__()
        cuda, capture, make, send = torch.cuda, GraphPool.capture, PinnedCopy.__init__, PinnedCopy.send

        def remembered(pool: GraphPool, call: Callable[[], object]) -> Graph:
            graph = capture(pool, call)
            graph.call = call
            self.graphs.append(graph)
            return graph

        def made(copy: Any, tree: Any, device: torch.device, moving: Any = ()) -> None:
            make(copy, tree, device, moving)
            copy.host = _unique(tree)

        def sent(copy: Any) -> None:
            send(copy)
            for i, (here, there) in enumerate(zip(copy.host, _unique(copy.tree), strict=True)):
                if not torch.equal(here, there.near):
                    raise GraphFault(f"tensor {i} of a tree is not sent again: {tuple(here.shape)} {here.dtype}")

        new = {
            (PinnedCopy, "__init__"): made, (PinnedCopy, "send"): sent, (cuda, "Stream"): Stream, (cuda, "stream"): self._on,
            (cuda, "current_stream"): lambda device=None: self.stream,
            (cuda, "graph"): self._captured, (cuda, "CUDAGraph"): Graph, (cuda, "graph_pool_handle"): Pool,
            (cuda, "synchronize"): lambda device=None: None, (GraphPool, "capture"): remembered,
            (shapes, "can_capture"): lambda device: device.type == "cuda",
        }  # fmt: skip
        self._replaced = {(owner, name): getattr(owner, name) for owner, name in new}
        for (owner, name), value in new.items():
            setattr(owner, name, value)
        return self

    def __exit__(self, *error: Any) -> None:
        for (owner, name), value in self._replaced.items():
            setattr(owner, name, value)
        super().__exit__(*error)

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def _captured(self, graph: Graph, pool: Pool, stream: Stream, capture_error_mode: str = "global") -> Iterator[None]:
        assert self._capturing is None, "captures do not nest"
        graph.pool, graph.stream, graph.before = pool, stream, pool.holes.copy()
        self._capturing = graph
        try:
            with self._on(stream):
                yield
        finally:
            self._capturing, self._fresh = None, []

    def wait(self, what: str) -> None:
        if self._capturing is not None:
            raise Refused(f"operation not permitted when stream is capturing: {what}")
        super().wait(what)

    def execute(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        graph = self._capturing
        with _disable_current_modes():
            if graph is None:
                out = call(*args, **kwargs)
                known = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
                made = [(0, x) for x in _tensors(out) if x.untyped_storage().data_ptr() not in known]
                self.touch(Node(name, call, args, kwargs, made))
                return out
            if self.stream is not graph.stream:
                raise GraphFault(f"{name} is launched on {self.stream.name} during a capture of {graph.stream.name}")
            given = _tensors((args, kwargs))
            if name in ("copy_", "_to_copy", "to") and any(self._is_pinned(x) for x in given):
                raise Refused("operation not permitted when stream is capturing: a copy from memory of the host, which will move")
            out = call(*args, **kwargs)
            known = {x.untyped_storage().data_ptr() for x in given}
            self._fresh, fresh = [], list[tuple[int, torch.Tensor]]()
            places = count()

            def placed(x: Any) -> Any:
                i = next(places)
                if not isinstance(x, torch.Tensor) or x.untyped_storage().data_ptr() in known or not x.numel():
                    return x
                there = self._place(graph, x, not name.startswith(_UNWRITTEN))
                fresh.append((i, there))
                return there

            out = tree_map(placed, out)
            graph.nodes.append(Node(name, call, args, kwargs, fresh))
            return out

    def _place(self, graph: Graph, x: torch.Tensor, written: bool) -> torch.Tensor:
        """A result in the pool's memory."""
        assert graph.pool is not None
        length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
        block = graph.pool.holes.take(length * x.itemsize)
        self._fresh.append(block)
        there = torch.empty(0, dtype=x.dtype).set_(graph.pool.memory, block.start // x.itemsize, x.shape, x.stride())
        return there.copy_(x) if written else there

    def memory_of(self, near: torch.Tensor) -> object:
        pools = {id(graph.pool): graph.pool for graph in (*self.graphs, self._capturing) if graph is not None}
        return next((block for pool in pools.values() if pool and (block := pool.block_of(near)) is not None), None)

    def touch(self, node: Node) -> None:
        """Check that this stream has waited for whoever touched the tensors last, and note that it has them now."""
        stream = self.stream
        stream.done += 1
        for x in _tensors((node.args, node.kwargs)):
            last, at = self._touched.get(x.untyped_storage().data_ptr(), (stream, 0))
            if last is not stream and stream.seen.get(last.name, 0) < at:
                raise GraphFault(f"{node.name} on {stream.name} does not wait for {last.name}, which has touched its tensors")
        for x in _tensors((node.args, node.kwargs, [x for _, x in node.fresh])):
            self._touched[x.untyped_storage().data_ptr()] = stream, stream.done

    def audit(self, graph: Graph) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Run the captured call again from the pool's state at its capture; (name, memory, value) of what it leaves."""
        pool, call, stream = graph.pool, graph.call, graph.stream
        assert pool is not None and call is not None and stream is not None and graph.before is not None
        # The call replaces the results of the capture, whose memory must stay taken in the pool's present state.
        graph.held = graph.held or [block() for block in pool.holes.blocks.values()]
        now, again = pool.holes, Graph(self)
        stream.wait_stream(self.stream)
        pool.holes = graph.before.copy()
        with self._captured(again, pool, stream):
            call()
        names = {x.data_ptr() - pool.start: f"{node.name} {tuple(x.shape)}" for node in again.nodes for _, x in node.fresh}
        blocks = [block for ref in pool.holes.blocks.values() if (block := ref()) is not None]
        left = [(names[block.start], block.start, block.end) for block in blocks]
        self.stream.wait_stream(stream)
        pool.holes = now
        for i, (mine, its) in enumerate(zip(graph.nodes, again.nodes)):
            if mine.signature != its.signature:
                changed = "; ".join(f"{a} -> {b}" for a, b in zip(mine.signature, its.signature) if a != b)
                raise GraphFault(f"operation {i} of a graph would be recorded otherwise now, {mine.name}: {changed[:400]}")
        if len(graph.nodes) != len(again.nodes):
            raise GraphFault(f"a graph of {len(graph.nodes)} operations would now record {len(again.nodes)}")
        with _disable_current_modes():
            memory = torch.empty(0, dtype=torch.uint8).set_(pool.memory)
            return [(name, memory[start:end], memory[start:end].clone()) for name, start, end in left]
