"""What convolution and pooling kernels are written with: vectors, loop splits, register tiles.

Kernels are built by calling TVM's IR builder from plain Python, so that every loop bound, vector
width and offset is a Python number of the layer's shape: no masks, no tails left to the compiler.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

if TYPE_CHECKING:
    from myelin.cpu import Cpu

Expression = Any  # a TIR expression or a Python number


def kernel(name: str, body: Callable[[], None]) -> PrimFunc:
    """The function `name`; `body` declares its arguments (`argument`) and emits its loops."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        body()
    return builder.get()


def argument(name: str, *shape: int) -> Any:
    """Declares the next argument of the kernel: float32 of this shape."""
    return T.arg(name, T.Buffer(shape, "float32"))


def lanes(offset: Expression, width: int) -> Expression:
    """Indices offset … offset + width - 1, a plain index where width is 1."""
    return offset if width == 1 else T.Ramp(offset, 1, width)


def broadcast(value: Expression, width: int) -> Expression:
    """`value` in every lane."""
    return value if width == 1 else T.Broadcast(value, width)


def store(buffer: Any, indices: Sequence[Expression], value: Expression) -> None:
    """Emits buffer[indices] = value."""
    T.buffer_store(buffer, value, list(indices))


def zero(width: int, dtype: str = "float32") -> Expression:
    """A vector of zeros."""
    return broadcast(T.FloatImm(dtype, 0.0), width)


def vectors(extent: int, width: int) -> list[int]:
    """Widths of the vectors that cover `extent` exactly: full ones, then halving powers of two."""
    widths = [width] * (extent // width)
    rest = extent % width
    while rest:
        piece = 1 << (rest.bit_length() - 1)
        widths.append(piece)
        rest -= piece
    return widths


def offsets(widths: Sequence[int]) -> list[int]:
    """Where each vector of `widths` begins."""
    return [sum(widths[:index]) for index in range(len(widths))]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """`count` blocks of `size`, the first at `start`."""

    start: int
    count: int
    size: int

    def at(self, block: Expression) -> Expression:
        """Where block number `block` begins."""
        return self.start + block * self.size


def segments(extent: int, size: int) -> list[Segment]:
    """0 … extent - 1 in blocks of `size`, the remainder as a block of its own."""
    whole, rest = divmod(extent, size)
    found = [Segment(start=0, count=whole, size=size)] if whole else []
    return found + ([Segment(start=whole * size, count=1, size=rest)] if rest else [])


@dataclass(frozen=True, kw_only=True)
class Channels:
    """`count` groups of channels from `start` on, each read as vectors of `widths`."""

    start: int
    count: int
    widths: tuple[int, ...]

    def at(self, group: Expression) -> Expression:
        """The first channel of group number `group`."""
        return self.start + group * sum(self.widths)


def channels(extent: int, width: int, together: int = 2) -> list[Channels]:
    """All channels: groups of `together` full vectors, then what is left as one group."""
    whole, rest = divmod(extent, width * together)
    found = [Channels(start=0, count=whole, widths=(width,) * together)] if whole else []
    if rest:
        start = extent - rest
        found.append(Channels(start=start, count=1, widths=tuple(vectors(rest, width))))
    return found


def registers(cpu: "Cpu") -> int:
    """Vector registers that a tile's accumulators may fill; operands need the others."""
    return 24 if cpu.lanes == 16 else 12


class Tile:
    """Accumulators of `rows` × `widths`, one local buffer each so that all stay in registers."""

    def __init__(self, rows: int, widths: Sequence[int], dtype: str = "float32") -> None:
        """Allocates the accumulators; their values are undefined until `set` or `clear`."""
        self.rows, self.widths, self.dtype = rows, tuple(widths), dtype
        self._cells = [
            [T.alloc_buffer((width,), dtype, scope="local") for width in widths]
            for _ in range(rows)
        ]

    def cells(self) -> Iterator[tuple[int, int, int, int]]:
        """(row, vector, offset of the vector, its width) of every accumulator."""
        for row in range(self.rows):
            for vector, (offset, width) in enumerate(self.vectors()):
                yield row, vector, offset, width

    def __getitem__(self, cell: tuple[int, int]) -> Expression:
        """The value of an accumulator."""
        row, vector = cell
        return self._cells[row][vector][lanes(0, self.widths[vector])]

    def set(self, row: int, vector: int, value: Expression) -> None:
        """Overwrites an accumulator."""
        store(self._cells[row][vector], [lanes(0, self.widths[vector])], value)

    def clear(self) -> None:
        """Sets every accumulator to zero."""
        for row, vector, _, width in self.cells():
            self.set(row, vector, zero(width, self.dtype))

    def vectors(self) -> list[tuple[int, int]]:
        """(offset, width) of every vector of a row."""
        return list(zip(offsets(self.widths), self.widths, strict=True))

    def add_outer(self, column: Sequence[Expression], row: Sequence[Expression]) -> None:
        """Adds column[r] · row[v] to every accumulator (r, v): one step of a matrix product."""
        operands = [T.bind(vector) for vector in row]
        for index, scalar in enumerate(column):
            value = T.bind(scalar)
            for vector, width in enumerate(self.widths):
                self.add(index, vector, broadcast(value, width) * operands[vector])

    def add(self, row: int, vector: int, value: Expression) -> None:
        """Adds to one accumulator."""
        self.set(row, vector, self[row, vector] + value)

    def total(self) -> Expression:
        """The sum of all lanes of all accumulators, one addition after the other."""
        total = T.alloc_buffer((1,), self.dtype, scope="local")
        store(total, [0], T.FloatImm(self.dtype, 0.0))
        for row in self._cells:
            for cell, width in zip(row, self.widths, strict=True):
                for lane in range(width):
                    store(total, [0], total[0] + cell[lane])
        return total[0]


def widen(value: Expression, width: int) -> Expression:
    """Float32 lanes as float64."""
    return T.Cast("float64" if width == 1 else f"float64x{width}", value)
