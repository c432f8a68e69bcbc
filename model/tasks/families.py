"""One class per reasoning-gym family: how its question is written, and which steps compute its answer.

Invariants:
- The question holds all the task's information; the steps are computed from the task's metadata alone.
- Every step is a computation the next one needs. There is no filler: a text that says nothing is easy to draft.
- Sums, differences and products by a digit are worked in columns, from the units up: `47+85:12,13=132` says 7+5=12, then
  4+8+1=13, hence 132. A column below zero borrows: `42-17:-5,2=25`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Protocol

Metadata = Mapping[str, Any]


class Family(Protocol):
    """A reasoning-gym data set and its way of working."""

    @property
    def name(self) -> str:
        """The data set's name in reasoning-gym."""

    @property
    def difficulty(self) -> Mapping[str, int]:
        """Options of the data set."""

    def question(self, metadata: Metadata) -> str:
        """The question in few words."""

    def steps(self, metadata: Metadata) -> list[str]:
        """The worked steps."""


def carry(columns: Iterable[int]) -> str:
    """The columns' values, units first, each with what the one before it carried or borrowed."""
    written, carried = [], 0
    for column in columns:
        written.append(column + carried)
        carried = written[-1] // 10
    return ",".join(map(str, written))


def add(total: int, term: int) -> tuple[str, int]:
    """The step that adds two signed numbers, and their sum. The larger magnitude stands first; the result has the sign."""
    large, small = sorted((abs(total), abs(term)), reverse=True)
    sign = 1 if (total < 0) == (term < 0) or not total or not term else -1
    pairs = zip_longest(reversed(str(large)), reversed(str(small)), fillvalue="0")
    columns = carry(int(a) + sign * int(b) for a, b in pairs)
    return f"{large}{'+' if sign > 0 else '-'}{small}:{columns}={total + term}", total + term


class _Expression:
    """A family whose question is an expression."""

    def question(self, metadata: Metadata) -> str:
        expression: str = metadata["expression"]
        return expression.replace(" ", "")


@dataclass(frozen=True)
class ChainSum(_Expression):
    """Sums and differences from left to right, one partial result per step, in columns."""

    name: str = "chain_sum"
    difficulty: Mapping[str, int] = field(default_factory=lambda: dict(min_terms=3, max_terms=5, min_digits=2, max_digits=2))

    def steps(self, metadata: Metadata) -> list[str]:
        first, *rest = metadata["expression"].split()
        total, steps = int(first), []
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            step, total = add(total, int(term) if sign == "+" else -int(term))
            steps.append(step)
        return steps


@dataclass(frozen=True)
class Gcd:
    """Greatest common divisor by Euclid's algorithm."""

    name: str = "gcd"
    difficulty: Mapping[str, int] = field(default_factory=lambda: dict(min_value=10, max_value=150))

    def question(self, metadata: Metadata) -> str:
        return "gcd " + " ".join(map(str, metadata["numbers"]))

    def steps(self, metadata: Metadata) -> list[str]:
        a, b = metadata["numbers"]
        steps = []
        while b:
            steps.append(f"{a}%{b}={a % b}")
            a, b = b, a % b
        return steps


@dataclass(frozen=True)
class Products(_Expression):
    """A product by partial products of the second factor's digits, in columns."""

    name: str = "products"
    difficulty: Mapping[str, int] = field(default_factory=lambda: dict(min_terms=2, max_terms=2, min_digits=1, max_digits=3))

    def steps(self, metadata: Metadata) -> list[str]:
        left, right = self.question(metadata).split("*")
        total, steps = 0, []
        for place, digit in enumerate(reversed(right)):
            part = int(left) * int(digit) * 10**place
            columns = carry(int(d) * int(digit) for d in reversed(left))
            steps.append(f"{left}*{int(digit) * 10**place}:{columns}={part}")
            if place:
                step, total = add(total, part)
                steps.append(step)
            else:
                total = part
        return steps


@dataclass(frozen=True)
class BaseConversion:
    """A number from one base to another: Horner's rule to decimal, then repeated division."""

    name: str = "base_conversion"
    difficulty: Mapping[str, int] = field(default_factory=lambda: dict(min_base=2, max_base=9, min_value=10, max_value=300))

    def question(self, metadata: Metadata) -> str:
        return f"{metadata['source_repr']} base {metadata['source_base']} to {metadata['target_base']}"

    def steps(self, metadata: Metadata) -> list[str]:
        source, target = metadata["source_base"], metadata["target_base"]
        value, *digits = (int(d) for d in metadata["source_repr"])
        steps = []
        for digit in digits:
            steps.append(f"{value}*{source}+{digit}={value * source + digit}")
            value = value * source + digit
        while value:
            steps.append(f"{value}={value // target}*{target}+{value % target}")
            value //= target
        return steps


@dataclass(frozen=True)
class CountBits:
    """Ones in a number's binary form: repeated halving with a running count."""

    name: str = "count_bits"
    difficulty: Mapping[str, int] = field(default_factory=lambda: dict(min_n=10, max_n=4000))

    def question(self, metadata: Metadata) -> str:
        return f"bits {metadata['number']}"

    def steps(self, metadata: Metadata) -> list[str]:
        value, count, steps = metadata["number"], 0, []
        while value:
            count += value % 2
            steps.append(f"{value // 2} {value % 2} {count}")
            value //= 2
        return steps


FAMILIES: Mapping[str, Family] = {f.name: f for f in (ChainSum(), Gcd(), Products(), BaseConversion(), CountBits())}
