"""What products are made of: float32 numbers, or pairs of bfloat16 (`myelin.kernels.bf16`).

A template that takes `operands` keeps the factors of its products in scratch of `dtype`, `each`
numbers that are summed in one element, and adds their products to float32 accumulators.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

from myelin.kernels import bf16
from myelin.kernels.tiles import Tile
from myelin.kernels.tir import splat


class Operands(Protocol):
    """How numbers are kept, and multiplied."""

    @property
    def dtype(self) -> str:
        """Of an element of scratch."""

    @property
    def each(self) -> int:
        """Numbers of an element."""

    def scope(self) -> Any:
        """Where the following may be used."""

    def along(self, numbers: Any) -> Any:
        """A vector of numbers, neighbours of which are summed."""

    def across(self, vectors: Sequence[Any]) -> Any:
        """Up to `each` vectors, whose numbers in one lane are summed."""

    def add_outer(self, tile: Tile, column: Sequence[Any], row: Sequence[Any]) -> None:
        """Adds column[r] · row[v] to every accumulator (r, v) of the tile."""


class _Float32:
    dtype, each = "float32", 1

    def scope(self) -> Any:
        return nullcontext()

    def along(self, numbers: Any) -> Any:
        return numbers

    def across(self, vectors: Sequence[Any]) -> Any:
        return vectors[0]

    def add_outer(self, tile: Tile, column: Sequence[Any], row: Sequence[Any]) -> None:
        tile.add_outer(column, row)


class _Bf16:
    """Vectors have 16 lanes."""

    dtype, each = "int32", 2

    def scope(self) -> Any:
        return bf16.words()

    def along(self, numbers: Any) -> Any:
        return bf16.row(numbers)

    def across(self, vectors: Sequence[Any]) -> Any:
        even, odd = (*vectors, splat(0.0, bf16.LANES))[:2]
        return bf16.pairs(even, odd)

    def add_outer(self, tile: Tile, column: Sequence[Any], row: Sequence[Any]) -> None:
        bf16.add_outer(tile, column, row)


FLOAT32: Operands = _Float32()
BF16: Operands = _Bf16()
