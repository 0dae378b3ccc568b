"""Register tiles: what the inner loops of products are made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.tir import (
    TINY,
    blocks,
    load,
    local,
    pieces,
    serial,
    splat,
    store,
    vectors,
)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`count` blocks of `size`, the first at `start`; `start` may be an expression."""

    start: Any
    count: int
    size: int

    def at(self, block: Any) -> Any:
        """Where block number `block` begins."""
        return self.start + block * self.size


def segments(extent: int, size: int) -> list[Segment]:
    """0 … extent - 1 in blocks of `size`, the remainder as a block of its own."""
    whole, rest = divmod(extent, size)
    found = [Segment(start=0, count=whole, size=size)] if whole else []
    return found + ([Segment(start=whole * size, count=1, size=rest)] if rest else [])


def largest_divisor(number: int, most: int = 16) -> int:
    """The largest divisor up to `most`: what is taken at once where nothing may be left over."""
    return max(size for size in range(1, most + 1) if number % size == 0)


def run_length(examples: int) -> int:
    """Examples summed before their sum goes into the total: two short chains, not one long."""
    return math.isqrt(examples)


def add_shares(cpu: Cpu, parts: Any, extents: tuple[int, int, int], out: Any) -> None:
    """out[rows · row] = Σ_e parts[e], of `extents` (shares, rows, row); `parts` is overwritten.

    First those of each half of the shares where their threads left them: one of each half is all
    that another core must fetch.
    """
    shares, rows, row = extents
    halves = 2 if shares % 2 == 0 else 1
    each = shares // halves

    def total(some: Iterable[Any], at: Any, lanes: int) -> Any:
        return reduce(operator.add, (load(parts, e, at, lanes=lanes) for e in some))

    if each > 1:
        with T.parallel(halves * rows) as task:
            first = task // rows * each
            for offset, lanes in vectors(row, cpu.lanes):
                at = task % rows * row + offset
                store(parts, total((first + e for e in range(each)), at, lanes), first, at)
    for block, size in blocks(rows * row, 64 * cpu.lanes, T.parallel):
        for offset, lanes in vectors(size, cpu.lanes):
            at = block + offset
            store(out, total(range(0, shares, each), at, lanes), at)


def grid(*extents: int) -> Iterator[tuple[Any, ...]]:
    """One loop inside the other; nothing where an extent is 0. Use as `for i, j in grid(…)`."""
    if not extents:
        yield ()
    elif extents[0] > 0:
        with serial(extents[0]) as index:
            for inner in grid(*extents[1:]):
                yield (index, *inner)


def shares(count: int, chunks: int) -> Iterator[tuple[Any, Any]]:
    """(chunk, number) of 0 … count - 1, dealt out to parallel chunks that the shape fixes."""
    each, left = divmod(count, chunks)
    with T.parallel(chunks) as chunk, serial(each) as i:
        yield chunk, chunk * each + i
    if left:
        with T.parallel(left) as chunk:
            yield chunk, count - left + chunk


def steps(*extents: int, unroll: int = 4) -> Iterator[tuple[Any, ...]]:
    """As `grid`, with the last axis longer than 1 unrolled."""
    if 0 in extents:
        return
    axis = max((a for a, extent in enumerate(extents) if extent > 1), default=0)
    for segment in segments(extents[axis], unroll):
        for *outer, block in grid(*extents[:axis], segment.count):
            for inner in range(segment.size):
                yield (*outer, segment.at(block) + inner, *[0] * (len(extents) - axis - 1))


def channel_groups(channels: int, lanes: int) -> list[tuple[Segment, tuple[int, ...]]]:
    """Channels as groups of two vectors: (blocks, lanes of each vector of a block)."""
    return [
        (segment, tuple(width for _, width in pieces(segment.size, lanes)))
        for segment in segments(channels, 2 * lanes)
    ]


class Tile:
    """Accumulators of `rows` × `widths` lanes, each a local buffer, so that all are registers."""

    def __init__(self, rows: int, widths: Sequence[int], dtype: str = "float32") -> None:
        """Allocates the accumulators and sets them to zero."""
        self.rows = rows
        self.widths = tuple(widths)
        self._cells = [[local(width, dtype=dtype) for width in widths] for _ in range(rows)]
        for row, vector, _, width in self.cells():
            zero = T.FloatImm(dtype, 0.0)
            self.set(row, vector, splat(zero, width))

    def vectors(self) -> list[tuple[int, int]]:
        """(offset, lanes) of the vectors of a row."""
        return [(sum(self.widths[:v]), width) for v, width in enumerate(self.widths)]

    def cells(self) -> Iterator[tuple[int, int, int, int]]:
        """(row, vector, offset of the vector, its lanes) of every accumulator."""
        for row in range(self.rows):
            for vector, (offset, width) in enumerate(self.vectors()):
                yield row, vector, offset, width

    def get(self, row: int, vector: int, lanes: int | None = None) -> Any:
        """The value of an accumulator, or of its first `lanes`."""
        return load(self._cells[row][vector], 0, lanes=lanes or self.widths[vector])

    def set(self, row: int, vector: int, value: Any) -> None:
        """Overwrites an accumulator."""
        store(self._cells[row][vector], value, 0)

    def add(self, row: int, vector: int, value: Any) -> None:
        """Adds to an accumulator."""
        self.set(row, vector, self.get(row, vector) + value)

    def add_outer(self, column: Sequence[Any], row: Sequence[Any]) -> None:
        """Adds column[r] · row[v] to every accumulator (r, v): one step of a matrix product."""
        operands = [T.bind(vector) for vector in row]
        for r, scalar in enumerate(column):
            value = T.bind(scalar)
            for v, width in enumerate(self.widths):
                self.add(r, v, splat(value, width) * operands[v])

    def columns(self) -> Iterator[tuple[int, list[Any]]]:
        """(number, accumulators of all rows) of every vector."""
        for vector in range(len(self.widths)):
            yield vector, [self.get(row, vector) for row in range(self.rows)]

    def sum(self) -> Any:
        """The sum of all lanes of all accumulators, one after the other."""
        terms = [
            self._cells[row][vector][lane]
            for row, vector, _, width in self.cells()
            for lane in range(width)
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return T.bind(total)


MOST_SQUARES = 16


class SquaredNorm:
    """Σ v²: at most `MOST_SQUARES` at once in float32, lane by lane, and float64 from there."""

    def __init__(self) -> None:
        """Begins at zero."""
        self._total = local(1, dtype="float64")
        store(self._total, T.FloatImm("float64", 0.0), 0)

    @contextmanager
    def part(self, widths: Sequence[int]) -> Iterator[Callable[[int, Sequence[Any]], None]]:
        """Gives add(vector, values): the squares of values that are as wide as this vector."""
        squares = Tile(1, widths, "float64")

        def add(vector: int, values: Sequence[Any]) -> None:
            if len(values) > MOST_SQUARES:
                raise ValueError(f"{len(values)} squares at once, the bound is for {MOST_SQUARES}")
            value = values[0] * values[0]
            for other in values[1:]:
                value = value + other * other
            squares.add(0, vector, widen(value, squares.widths[vector]))

        yield add
        store(self._total, load(self._total, 0) + squares.sum(), 0)

    def store(self, s: Any, i: Any, count: int) -> None:
        """s[i] = the sum, with the most that `count` squares lose when they are flushed to zero."""
        flushed = T.FloatImm("float64", count * TINY)
        store(s, T.Cast("float32", load(self._total, 0) + flushed), i)


def widen(value: Any, lanes: int) -> Any:
    """Float32 lanes as float64."""
    return T.Cast("float64" if lanes == 1 else f"float64x{lanes}", value)
