"""Audits of kernels in Triton's interpreter: every address that every program reads or writes.

    with Audit() as audit:
        op(...)                      # under `using("triton")`; programs run in random order
    audit.check_races()

- An address outside the tensors of its launch is a fault, before it is touched: an offset that overflowed, a missing mask.
- Two programs of a launch race where both write to an address, or one reads what the other writes. Atomics do not race with each
  other, in kernels that are named.
- `Audit(programs=n)` runs n programs of each launch: the first, the last, and others drawn at random. With `vast` tensors, whose
  memory is not there until somebody writes to it, kernels then meet the addresses of production sizes.
- A line is what a device fetches at once: 128 bytes.
"""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

LINE = 128
_NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python does not name everywhere."""
_REPLACED = (
    (interpreter.GridExecutor, "__call__"), (interpreter.InterpreterBuilder, "create_masked_load"),
    (interpreter.InterpreterBuilder, "create_masked_store"), (interpreter.InterpreterBuilder, "create_atomic_rmw"),
    (interpreter.InterpreterBuilder, "create_atomic_cas"),
)  # fmt: skip


class AuditFault(AssertionError):
    """A kernel that would go wrong on a device."""


@dataclass
class Accesses:
    """What the programs of one launch touch. Each entry: program, addresses (sorted, each once), bytes of an element."""

    kernel: str
    programs: int
    tensors: dict[str, tuple[int, int]]
    reads: list[tuple[int, np.ndarray, int]] = field(default_factory=list)
    writes: list[tuple[int, np.ndarray, int]] = field(default_factory=list)
    atomics: list[tuple[int, np.ndarray, int]] = field(default_factory=list)

    def tensor_at(self, address: int) -> str:
        """The argument that an address lies in."""
        return next((name for name, (start, end) in self.tensors.items() if start <= address < end), "no tensor")

    def races(self) -> list[str]:
        """Pairs of programs that race, one line for each tensor; atomics count as writes."""
        written, writer = _flat(self.writes + self.atomics)
        found: dict[str, str] = {}
        twice = np.flatnonzero((written[1:] == written[:-1]) & (writer[1:] != writer[:-1]))
        for i in twice:
            name = self.tensor_at(int(written[i]))
            found.setdefault(name, f"{self.kernel}: programs {writer[i]} and {writer[i + 1]} both write to {name}")
        for program, addresses, _ in self.reads if len(written) else []:
            low, high = np.searchsorted(written, addresses), np.searchsorted(written, addresses, side="right")
            for at in np.flatnonzero(high > low):
                others = [other for other in writer[low[at] : high[at]] if other != program]
                if others:
                    name = self.tensor_at(int(addresses[at]))
                    found.setdefault(name, f"{self.kernel}: program {program} reads what program {others[0]} writes to {name}")
        return list(found.values())

    def extents(self, kind: list[tuple[int, np.ndarray, int]]) -> set[tuple[int, int]]:
        """The tensors that these accesses touch, as first and last address."""
        known, found = list(self.tensors.values()), set[tuple[int, int]]()
        for _, addresses, _ in kind:
            found |= {each for each in known if each not in found and ((addresses >= each[0]) & (addresses < each[1])).any()}
        return found

    def touched(self, without: Collection[tuple[int, int]] = ()) -> tuple[int, int]:
        """(bytes of the distinct elements, bytes of the distinct lines) that the launch reads or writes, outside `without`."""
        useful, lines = 0, 0
        for kind in (self.reads, self.writes + self.atomics):
            by_size: dict[int, list[np.ndarray]] = {}
            for _, addresses, size in kind:
                for start, end in without:
                    addresses = addresses[(addresses < start) | (addresses >= end)]
                by_size.setdefault(size, []).append(addresses)
            useful += sum(size * len(np.unique(np.concatenate(parts))) for size, parts in by_size.items())
            if by_size:
                lines += LINE * len(np.unique(np.concatenate([each for parts in by_size.values() for each in parts]) // LINE))
        return useful, lines


def _flat(parts: list[tuple[int, np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Addresses in order, and who touches each."""
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    addresses = np.concatenate([each for _, each, _ in parts])
    programs = np.concatenate([np.full(len(each), program) for program, each, _ in parts])
    order = np.lexsort((programs, addresses))
    addresses, programs = addresses[order], programs[order]
    first = np.append(True, (addresses[1:] != addresses[:-1]) | (programs[1:] != programs[:-1]))
    return addresses[first], programs[first]


class Audit:
    """The audit of all launches within the context.

    Args:
        seed: of the order of programs.
        programs: most of a launch; None for all. every: kernels all of whose programs run, because later launches find their
            indices in what these write. rows: kernels of which `programs` rows of the grid run whole.

    Attributes:
        launches: in order.
    """

    def __init__(
        self, seed: int = 0, programs: int | None = None, every: Collection[str] = (), rows: Collection[str] = ()
    ) -> None:
        self.launches: list[Accesses] = []
        self._draw, self._most, self._every, self._rows = np.random.default_rng(seed), programs, every, rows
        self._program = 0

    def __enter__(self) -> Audit:
        self._before = [(owner, name, getattr(owner, name)) for owner, name in _REPLACED]
        load, store, rmw, cas = (real for _, _, real in self._before[1:])
        audit = self

        def masked_load(builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
            audit._note("reads", ptrs, mask)
            return load(builder, ptrs, mask, other, *rest)

        def masked_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            audit._note("writes", ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        def atomic_rmw(builder: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
            audit._note("atomics", ptr, mask)
            return rmw(builder, op, ptr, value, mask, *rest)

        def atomic_cas(builder: Any, ptr: Any, *rest: Any) -> Any:
            audit._note("atomics", ptr, None)
            return cas(builder, ptr, *rest)

        new: tuple[Callable[..., Any], ...] = (_run_grid(self), masked_load, masked_store, atomic_rmw, atomic_cas)
        for (owner, name, _), value in zip(self._before, new, strict=True):
            setattr(owner, name, value)
        return self

    def __exit__(self, *error: Any) -> None:
        for owner, name, value in self._before:
            setattr(owner, name, value)

    def check_races(self, atomics: Collection[str] = ()) -> None:
        """Raise AuditFault where programs race.

        Args:
            atomics: kernels whose atomics may meet each other.
        """
        found = []
        for launch in self.launches:
            if launch.kernel in atomics:
                launch.atomics = []
            found += launch.races()
        if found:
            raise AuditFault("\n".join(dict.fromkeys(found)))

    def line_use(self) -> dict[str, float]:
        """By kernel, the bytes that its launches touch over those of the lines that these lie in."""
        sums: dict[str, list[int]] = {}
        for launch in self.launches:
            for i, part in enumerate(launch.touched()):
                sums.setdefault(launch.kernel, [0, 0])[i] += part
        return {kernel: useful / lines for kernel, (useful, lines) in sums.items()}

    def line_bytes(self) -> int:
        """Bytes of the lines that all launches touch, without what they hand on to each other: what one writes and a later one
        reads."""
        handed, written = set[tuple[int, int]](), set[tuple[int, int]]()
        for launch in self.launches:
            handed |= launch.extents(launch.reads) & written
            written |= launch.extents(launch.writes + launch.atomics)
        return sum(launch.touched(handed)[1] for launch in self.launches)

    def _order(self, kernel: str, grid: tuple[int, ...]) -> list[int]:
        """The programs that run, in order."""
        count = grid[0] * grid[1] * grid[2]
        if kernel in self._rows:
            each = count // grid[0]
            return [row * each + i for row in self._some(grid[0]) for i in self._draw.permutation(each).tolist()]
        return self._draw.permutation(count).tolist() if kernel in self._every else self._some(count)

    def _some(self, count: int) -> list[int]:
        if self._most is None or count <= self._most:
            return self._draw.permutation(count).tolist()
        others = self._draw.choice(count, self._most - 2, replace=False).tolist()
        return list(dict.fromkeys([count - 1, 0, *others]))

    def _note(self, kind: str, ptrs: Any, mask: Any) -> None:
        launch, size = self.launches[-1], max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        data = np.asarray(ptrs.data).ravel()
        if mask is not None:
            data = data[np.broadcast_to(np.asarray(mask.data, bool), np.shape(ptrs.data)).ravel()]
        if not len(data):
            return
        addresses = np.unique(data.astype(np.uint64))
        inside = np.zeros(len(addresses), bool)
        for start, end in launch.tensors.values():
            inside |= (addresses >= start) & (addresses + np.uint64(size) <= end)
        if not inside.all():
            at = int(addresses[~inside][0])
            near = min(launch.tensors, key=lambda name: abs(launch.tensors[name][0] - at))
            raise AuditFault(f"{launch.kernel}: program {self._program} {kind} {at - launch.tensors[near][0]} bytes from the "
                             f"start of {near}, in no tensor of the launch")  # fmt: skip
        getattr(launch, kind).append((self._program, addresses, size))


def _run_grid(audit: Audit) -> Callable[..., Any]:
    """What runs a launch: as the interpreter does it, on the tensors themselves, in the audit's order."""

    def run(executor: Any, *given: Any, **options: Any) -> None:
        options = {key: value for key, value in options.items() if key in inspect.getfullargspec(executor.fn).args}
        arguments = inspect.getcallargs(executor.fn, *given, **options)
        grid = executor.grid(arguments) if callable(executor.grid) else executor.grid
        grid = (*grid, 1, 1)[:3]
        name = executor.fn.__name__
        tensors = {each: _extent(x) for each, x in arguments.items() if isinstance(x, torch.Tensor) and x.numel()}
        audit.launches.append(Accesses(name, int(np.prod(grid)), tensors))
        scope = interpreter._patch_lang(executor.fn)
        try:
            values = {
                each: x if each in executor.constexprs else interpreter._implicit_cvt(x) for each, x in arguments.items()
            }
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for program in audit._order(name, grid):
                audit._program = program
                x, rest = divmod(program, grid[1] * grid[2])
                interpreter.interpreter_builder.set_grid_idx(x, *divmod(rest, grid[2]))
                executor.fn(**values)
        finally:
            if scope is not None:
                scope.restore()

    return run


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First address of a tensor, and the one behind its last element."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize


def vast(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that take no memory until they are written."""
    count = int(np.prod(shape))
    size = count * torch.empty(0, dtype=dtype).itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
