"""The factors of products on bfloat16 operands: how they are read, split and paired on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from myelin.kernels.bf16 import LANES, filled, neighbours, pairs

# read(row, column, lanes): neighbours of one row of a matrix.
Read = Callable[[Any, Any, int], Any]
# part(value, lanes): what of a number is rounded.
Part = Callable[[Any, int], Any]


def whole(value: Any, lanes: int) -> Any:
    """The number itself."""
    del lanes
    return value


@dataclass(frozen=True, kw_only=True)
class Split:
    """A product is the sum of those of left[i] of one factor and right[i] of the other.

    Neighbouring terms have a part in common, which tiles then keep.
    """

    left: tuple[Part, ...] = (whole,)
    right: tuple[Part, ...] = (whole,)


ROUNDED = Split()
"""Both factors are rounded, once."""


def kept_once(parts: Sequence[Part]) -> list[Part]:
    """The parts of a number that are kept: those of all terms, each once."""
    return list(dict.fromkeys(parts))


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A matrix whose rows lie along the depth of a product, or across it."""

    read: Read
    along: bool

    def part(self, part: Part) -> Factor:
        """What is rounded of it."""
        read = self.read
        return Factor(
            read=lambda row, at, lanes: part(read(row, at, lanes), lanes), along=self.along
        )

    def pairs_of_row(self, row: Any, at: Any, size: int) -> Any:
        """16 pairs of neighbours along a row, of which `size` numbers are there, then zeros."""

        def read(column: Any, lanes: int) -> Any:
            return self.read(row, column, lanes)

        return neighbours(filled(read, at, size), filled(read, at + LANES, size - LANES))

    def pairs_of_rows(self, row: Any, odd: bool, at: Any, size: int) -> Any:
        """16 pairs of numbers of a row and the next, which is zero unless `odd`."""
        even = filled(lambda a, lanes: self.read(row, a, lanes), at, size)
        other = filled(lambda a, lanes: self.read(row + 1, a, lanes), at, size if odd else 0)
        return pairs(even, other)
