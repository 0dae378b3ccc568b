"""Products of bfloat16 matrices in the tile registers of AMX.

A tile has 16 rows of 64 bytes. Both factors are packed in tiles first: of the left one a tile holds
16 rows of 16 pairs, of the right one 16 pairs of 16 columns; the last along an axis is filled with
zeros. A block of up to two by two tiles of results stays in registers over a long run of steps.

One instruction adds 16 pairs to a result. Of the order of its additions there are two accounts (one
after the other, or even and odd numbers apart and then their sum), so that nothing here depends on
it: with `chain`, each instruction starts at zero, and float32 instructions add what comes out. Who
uses `block_sums` bounds what comes out, not how.
Rounding is to the nearest, to even; subnormal numbers become zero, as in `myelin.kernels.bf16`.

The instructions stand in LLVM's language (`myelin.kernels.bf16.TILE_WORDS`) as functions of values;
LLVM loads and stores tiles, and configures them. The system must let the process use the tile
registers: the cell asks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product as product_of
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.kernels.bf16 import LANES, TILE, tile_dot, tile_numbers, tile_words
from myelin.kernels.factors import Factor, Part, Split, kept_once
from myelin.kernels.linear import tile_start
from myelin.kernels.tir import (
    blocks,
    load,
    local,
    serial,
    splat,
    store,
    tasks,
    transposed,
    workspace,
)

FEATURE = "amx_bf16"
# Numbers along the depth of a tile, and what an instruction adds of them to a result.
_DEPTH = 2 * LANES
# Instructions in a row for one tile of results before its numbers leave the register.
_RUN = 32


def products(rows: int, columns: int, depth: int) -> int:
    """Instructions that a product takes, of operands with one part."""
    return -(-rows // LANES) * -(-columns // LANES) * -(-depth // _DEPTH)


def product(
    extents: tuple[int, int, int],
    left: Factor,
    right: Factor,
    write: Callable[..., None],
    *,
    split: Split,
    start: Any = None,
    chain: int | None = None,
) -> None:
    """Writes start[column] + Σ_depth left · right at (row, column).

    `extents` are (rows, columns, depth). With `chain`, no accumulator adds more than that many
    pairs, at least 16, before it goes into a total.
    """
    if chain is not None and chain < LANES:
        raise ValueError(f"a tile adds {LANES} pairs at once, not {chain}")
    rows, columns, depth = extents
    a = _Tiles(left, rows, depth, split.left, turned=not left.along)
    b = _Tiles(right, columns, depth, split.right, turned=right.along)
    # Totals of a single tile stay in vector registers.
    most = 2 if chain is None else 1
    down, across = min(most, a.count), min(most, b.count)
    blocks_down, blocks_across = -(-a.count // down), -(-b.count // across)
    work = a.count * b.count * a.steps * len(split.left) * LANES
    sums = _runs if chain is None else partial(_alone, _zeros(a.steps))

    def block(task: Any, column: Any, last: int) -> None:
        """One whose last tile has `last` columns."""
        row = T.bind(tile_start(task % blocks_down, down, a.count))
        room = local(TILE)
        for (r, c), value in sums(a, b, row, column, (down, across)):
            store(room, value, 0)
            lanes = last if c == across - 1 else LANES
            with serial(min(rows, LANES)) as i:
                at = (row + r) * LANES + i, (column + c) * LANES
                result = load(room, i * LANES, lanes=lanes)
                if start is not None:
                    result = result + load(start, at[1], lanes=lanes)
                if rows < LANES or rows % LANES == 0:
                    write(result, *at)
                else:
                    with T.If(at[0] < rows), T.Then():
                        write(result, *at)

    with tile_words():
        # The last column of blocks ends with the last tile, and that with the last column.
        edge = columns % LANES
        if full := blocks_across - bool(edge):
            with tasks(full * blocks_down, work) as task:
                column = T.bind(tile_start(task // blocks_down, across, b.count))
                block(task, column, LANES)
        if edge:
            with tasks(blocks_down, work // blocks_across) as task:
                block(task, b.count - across, edge)


class _Tiles:
    """A factor in tiles: 16 lines of it (rows of the left one, columns of the right one) each.

    Of the parts of a number each is packed once; `terms` says which stands in each term of a sum.
    """

    def __init__(
        self, factor: Factor, lines: int, depth: int, parts: Sequence[Part], *, turned: bool
    ) -> None:
        self.count, self.steps = -(-lines // LANES), -(-depth // _DEPTH)
        unlike = kept_once(parts)
        self.terms = [unlike.index(part) for part in parts]
        # A single tile would be on the stack, and LLVM would keep it in vectors of its own making.
        size = max(len(unlike), 2 if self.count * self.steps == 1 else 1) * TILE
        self._packed = workspace(self.count, self.steps, size, dtype="int32")
        for line, wide, at, deep in self._each(lines, depth, len(unlike)):
            tile, step = line // LANES, at // _DEPTH
            for number, part in enumerate(unlike):
                self._pack(factor.part(part), (tile, step, number), line, wide, at, deep)
                if turned:
                    self._turn(tile, step, number)

    def read(self, tile: Any, step: Any, term: int) -> Any:
        """The tile of a term of the sum."""
        return load(self._packed, tile, step, self.terms[term] * TILE, lanes=TILE)

    def _each(self, lines: int, depth: int, parts: int) -> Iterator[tuple[Any, int, Any, int]]:
        """(first line, lines, first number of the depth, numbers) of all tiles."""
        work = self.count * self.steps * parts * LANES

        def loop(extent: int) -> Any:
            return tasks(extent, work)

        if self.count >= self.steps:
            for line, wide in blocks(lines, LANES, loop):
                for at, deep in blocks(depth, _DEPTH):
                    yield line, wide, at, deep
        else:
            for at, deep in blocks(depth, _DEPTH, loop):
                for line, wide in blocks(lines, LANES):
                    yield line, wide, at, deep

    def _pack(
        self, factor: Factor, place: tuple[Any, Any, int], line: Any, wide: int, at: Any, deep: int
    ) -> None:
        """Row by row of memory: a line each where rows lie along the depth, else a pair each."""
        *outer, number = place

        def put(value: Any, row: Any) -> None:
            store(self._packed, value, *outer, number * TILE + row * LANES)

        if factor.along:
            done = wide
            with serial(wide) as i:
                put(factor.pairs_of_row(line + i, at, deep), i)
        else:
            done = -(-deep // 2)
            if deep > 1:
                with serial(deep // 2) as i:
                    put(factor.pairs_of_rows(at + 2 * i, True, line, wide), i)
            if deep % 2:
                put(factor.pairs_of_rows(at + deep - 1, False, line, wide), done - 1)
        if done < LANES:
            with serial(LANES - done) as i:
                put(splat(T.int32(0), LANES), done + i)

    def _turn(self, tile: Any, step: Any, number: int) -> None:
        """Exchanges rows and columns of a packed tile."""
        places = [(tile, step, number * TILE + row * LANES) for row in range(LANES)]
        rows = [load(self._packed, *place, lanes=LANES) for place in places]
        for place, row in zip(places, transposed(rows), strict=True):
            store(self._packed, row, *place)


Cell = tuple[int, int]
Read = Callable[[int, Any, int, int], Any]


def block_sums(
    shape: tuple[int, int], steps: int, run: int, terms: int, left: Read, right: Read
) -> Iterator[tuple[Cell, Any]]:
    """((tile down, tile across), its sum) of a block: Σ left · right over all steps and terms.

    left(r, first, step, term) reads a tile of row r of tiles at step first + step, right(c, …) one
    of column c; `step` is less than `run`. The sums of a run stay in registers.
    """
    cells = [(r, c) for r in range(shape[0]) for c in range(shape[1])]

    def of(first: Any, count: int) -> dict[Cell, Any]:
        values = {cell: splat(0.0, TILE) for cell in cells}
        for step, term in product_of(range(count), range(terms)):
            a = [T.bind(left(r, first, step, term)) for r in range(shape[0])]
            b = [T.bind(right(c, first, step, term)) for c in range(shape[1])]
            values = {(r, c): T.bind(tile_dot(values[r, c], a[r], b[c])) for r, c in cells}
        return {cell: tile_numbers(value) for cell, value in values.items()}

    if run == steps:
        yield from of(0, run).items()
        return
    totals = {cell: local(TILE) for cell in cells}
    for total in totals.values():
        store(total, splat(0.0, TILE), 0)
    for first, count in blocks(steps, run):
        for cell, value in of(first, count).items():
            store(totals[cell], load(totals[cell], 0, lanes=TILE) + value, 0)
    for cell, total in totals.items():
        yield cell, load(total, 0, lanes=TILE)


def _runs(a: _Tiles, b: _Tiles, row: Any, column: Any, shape: Cell) -> Iterator[tuple[Cell, Any]]:
    """The sums of a block of a product."""
    runs = -(-a.steps * len(a.terms) // _RUN)

    def reader(tiles: _Tiles, start: Any) -> Read:
        return lambda at, first, step, term: tiles.read(start + at, first + step, term)

    size = -(-a.steps // runs)
    yield from block_sums(shape, a.steps, size, len(a.terms), reader(a, row), reader(b, column))


def _alone(
    zeros: Any, a: _Tiles, b: _Tiles, row: Any, column: Any, _shape: Cell
) -> Iterator[tuple[Cell, Any]]:
    """The same of one tile, of which each instruction gives numbers that go into a total."""
    total = local(TILE)
    store(total, splat(0.0, TILE), 0)
    with serial(a.steps) as at:
        for term in range(len(a.terms)):
            left, right = a.read(row, at, term), b.read(column, at, term)
            value = tile_numbers(tile_dot(load(zeros, at, 0, lanes=TILE), left, right))
            store(total, load(total, 0, lanes=TILE) + value, 0)
    yield (0, 0), load(total, 0, lanes=TILE)


def _zeros(steps: int) -> Any:
    """A tile of zeros for each step: of a single one LLVM would keep a copy in a register, and
    store and load that again for each use.
    """
    zeros = workspace(steps, TILE)
    with serial(steps) as at, serial(LANES) as i:
        store(zeros, splat(0.0, LANES), at, i * LANES)
    return zeros
