"""A kernel's instructions in their order, its loops, and how far a load is ahead of the wait for it.

Invariants:
- A loop is what a backward branch encloses. Nothing is known of how often it runs.
- Global memory operations finish in the order in which they were started: a wait leaves the newest `limit` groups of them
  running. A load into registers of NVIDIA's has no such wait; whoever reads its registers first waits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["matrix", "vector", "load", "store", "barrier", "other"]

_ROUNDS = 9
"""Passes through a loop that are followed after a load. No pipeline has as many stages."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        cycles: of the matrix or vector unit.
        bytes: that a load takes per thread from global memory; 0 for all others.
        commits: closes a group of memory operations. limit: groups that may still run after it; None where it waits for none.
        writes: registers that a load fills. reads: registers that it reads. Both only where these tell who waits.
    """

    kind: Kind
    cycles: float = 0.0
    bytes: int = 0
    commits: bool = False
    limit: int | None = None
    writes: frozenset[int] = field(default=frozenset())
    reads: frozenset[int] = field(default=frozenset())


@dataclass(frozen=True)
class Program:
    """A kernel. `loops`: ranges of instructions, one per place that is branched back to."""

    instructions: tuple[Instruction, ...]
    loops: tuple[range, ...]

    @classmethod
    def read(
        cls, text: str, label: re.Pattern[str], line: re.Pattern[str], target_of: Callable[[str, str], str | None],
        instruction: Callable[[str, str], Instruction],
    ) -> Program:  # fmt: skip
        """Reads assembly, a line at a time.

        Args:
            label: a line that names a place, as its first group. line: an instruction, with groups `name` and `operands`.
            target_of: the label that an instruction may branch to; None where it does not branch.
            instruction: what an instruction does.
        """
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        branches: list[tuple[int, str]] = []
        for each in text.splitlines():
            if place := label.match(each):
                labels[place[1]] = len(instructions)
            elif found := line.match(each):
                name, operands = found["name"], found["operands"] or ""
                if (target := target_of(name, operands)) is not None:
                    branches.append((len(instructions), target))
                instructions.append(instruction(name, operands))
        ends: dict[int, int] = {}
        for at, aim in branches:
            begin = labels.get(aim, at + 1)
            if begin < at:
                ends[begin] = max(ends.get(begin, 0), at + 1)
        return cls(tuple(instructions), tuple(range(begin, end) for begin, end in sorted(ends.items())))

    def innermost(self, kind: Kind) -> list[Sequence[Instruction]]:
        """Bodies of the loops that hold such an instruction, and no smaller loop that holds one."""
        holding = [each for each in self.loops if any(self.instructions[i].kind == kind for i in each)]
        return [
            self.instructions[each.start : each.stop] for each in holding
            if not any(each != other and each.start <= other.start and other.stop <= each.stop for other in holding)
        ]  # fmt: skip


def ahead(body: Sequence[Instruction], loops: bool) -> list[tuple[int, int]]:
    """(bytes, matrix instructions between it and the wait for it) of every load of `body` that is waited for.

    Args:
        loops: the body runs again and again.
    """
    found = []
    for at, load in enumerate(body):
        if load.kind == "load":
            products = _products_until_wait(body, at, _ROUNDS if loops else 1)
            if products is not None:
                found.append((load.bytes, products))
    return found


def _products_until_wait(body: Sequence[Instruction], at: int, rounds: int) -> int | None:
    load, products = body[at], 0
    # Groups begun after the load's own; -1 while its own is open.
    newer = 0 if load.commits else -1
    for step in range(at + 1, len(body) * rounds):
        each = body[step % len(body)]
        if load.writes:
            if load.writes & each.reads:
                return products
        elif each.limit is not None and newer >= 0 and each.limit <= newer:
            return products
        products += each.kind == "matrix"
        newer += each.commits
    return None
