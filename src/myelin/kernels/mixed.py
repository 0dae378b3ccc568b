"""Linear layers in mixed precision: the products of `myelin.kernels.linear` on bfloat16 operands.

Arguments, results and sums are float32; both factors of a product are rounded to bfloat16 when they
are packed (`myelin.kernels.bf16`), and multiplied in tiles where the CPU level has them
(`myelin.kernels.amx`). Every template takes and gives what its namesake there does.

The clipped gradient stays within its bound: example i adds round(x_i)ᵀ round(c_i · d_i), whose
norm is at most c_i · |round(x_i)| · |d_i| · (1 + 2⁻⁸). `squared_norm` rounds x_i in the same way,
and `squared_norm_inflation` has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels import amx, linear
from myelin.kernels.bf16 import LANES, ROUNDOFF, dot, filled, rounded, words
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.factors import ROUNDED, Factor, Part, Split
from myelin.kernels.linear import (
    EXAMPLES,
    if_counted,
    sum_of_squares,
    tile_shape,
    tile_start,
    weighted_bias,
    weighted_gradient_additions,
)
from myelin.kernels.tir import (
    Kernel,
    blocks,
    load,
    local,
    pieces,
    serial,
    splat,
    store,
    tasks,
    workspace,
)

__all__ = [
    "backward_data",
    "matmul",
    "squared_norm",
    "squared_norm_inflation",
    "weighted_bias",
    "weighted_gradient",
    "weighted_gradient_additions",
]


def matmul(
    cpu: Cpu,
    m: int,
    k: int,
    n: int,
    *,
    bias: bool,
    finish: Epilogue = PLAIN,
    split: Split = ROUNDED,
) -> Any:
    """x[m, k], w[k, n], (b[n]), others[m, n]… → y[m, n] = x @ w (+ b), finished."""
    shapes = {"x": (m, k), "w": (k, n), **({"b": (n,)} if bias else {})}
    with Kernel(**shapes, **finish.parameters((m, n)), y=(m, n)) as kernel, words():
        x, w, *more, y = kernel.buffers
        b, others = more[:bias], more[bias:]
        left, right = _matrix(x, along=True), _matrix(w, along=False)
        write, start = finish.into(y, others), b[0] if b else None
        _product(cpu, (m, n, k), left, right, write, split=split, start=start)
    return kernel.function


def backward_data(
    cpu: Cpu, m: int, k: int, n: int, *, finish: Epilogue = PLAIN, split: Split = ROUNDED
) -> Any:
    """d[m, n], w[k, n], others[m, k]… → dx[m, k] = d @ wᵀ, finished."""
    shapes = {"d": (m, n), "w": (k, n), **finish.parameters((m, k))}
    with Kernel(**shapes, dx=(m, k)) as kernel, words():
        d, w, *others, dx = kernel.buffers
        left, right = _matrix(d, along=True), _matrix(w, along=True)
        _product(cpu, (m, k, n), left, right, finish.into(dx, others), split=split)
    return kernel.function


def weighted_gradient(cpu: Cpu, m: int, k: int, n: int, *, split: Split = ROUNDED) -> Any:
    """x[m, k], d[m, n], c[m] → g[k, n] = Σ_i c_i · x_iᵀ d_i.

    Examples with c_i = 0 add exactly zero, whatever x_i and d_i hold.
    """
    with Kernel(x=(m, k), d=(m, n), c=(m,), g=(k, n)) as kernel, words():
        x, d, c, g = kernel.buffers

        def kept(example: Any, at: Any, lanes: int) -> Any:
            return if_counted(load(c, example), load(x, example, at, lanes=lanes), lanes)

        def scaled(example: Any, at: Any, lanes: int) -> Any:
            weight = load(c, example)
            value = splat(weight, lanes) * load(d, example, at, lanes=lanes)
            return if_counted(weight, value, lanes)

        left, right = Factor(read=kept, along=False), Factor(read=scaled, along=False)
        write = PLAIN.into(g, [])
        _product(cpu, (k, n, m), left, right, write, split=split, chain=EXAMPLES // 2)
    return kernel.function


def squared_norm(cpu: Cpu, m: int, k: int, n: int, *, bias: bool) -> Any:
    """x[m, k], d[m, n] → s[m] = |round(x_i)|²·|d_i|² (+ |d_i|² for the bias).

    True squared norm ≤ s·(1 + `squared_norm_inflation(k, n)`) + 2⁻¹²⁵.
    """
    with Kernel(x=(m, k), d=(m, n), s=(m,)) as kernel:
        x, d, s = kernel.buffers
        with tasks(m, m * (-(-k // cpu.lanes) + -(-n // cpu.lanes))) as example:
            inputs = sum_of_squares(cpu, x, example, k, rounded)
            outputs = sum_of_squares(cpu, d, example, n)
            store(s, inputs * outputs + outputs if bias else inputs * outputs, example)
    return kernel.function


def squared_norm_inflation(k: int, n: int) -> float:
    """The relative bound of `squared_norm`, with the rounding of c_i · d_i to bfloat16."""
    return (1 + linear.squared_norm_inflation(k, n)) * (1 + ROUNDOFF) ** 2 - 1


def _matrix(matrix: Any, *, along: bool) -> Factor:
    return Factor(read=lambda row, at, lanes: load(matrix, row, at, lanes=lanes), along=along)


def _product(
    cpu: Cpu,
    extents: tuple[int, int, int],
    left: Factor,
    right: Factor,
    write: Callable[..., None],
    *,
    split: Split,
    start: Any = None,
    chain: int | None = None,
) -> None:
    """What `amx.product` does, on vectors where the level has no tiles."""
    if amx.FEATURE in cpu.features:
        amx.product(extents, left, right, write, split=split, start=start, chain=chain)
        return
    rows, columns, depth = extents
    pack = _rows if left.along else _columns
    factor = pack(left, rows, depth, split.left)
    panels = _Panels(cpu, rows, columns, depth, split.right)
    if right.along:
        panels.pack_columns(right)
    else:
        panels.pack_rows(right)
    panels.multiply(factor, write, start=start, chain=chain)


# The left factor: what is returned gives the pair along the depth of (row, pair).


def _rows(
    factor: Factor, rows: int, depth: int, parts: Sequence[Part]
) -> Callable[[Any, Any], Any]:
    """Of a matrix whose rows run along the depth."""
    each = -(-depth // 2)
    # What a vector has too much, the next part overwrites.
    packed = workspace(rows, (len(parts) - 1) * each + -(-depth // 32) * LANES, dtype="int32")
    with tasks(rows, len(parts) * rows * -(-depth // LANES)) as row:
        for number, part in enumerate(parts):
            for at, size in blocks(depth, 2 * LANES):
                value = factor.part(part).pairs_of_row(row, at, size)
                store(packed, value, row, number * each + at // 2)
    return lambda row, pair: load(packed, row, pair)


def _columns(
    factor: Factor, rows: int, depth: int, parts: Sequence[Part]
) -> Callable[[Any, Any], Any]:
    """Of a matrix whose columns run along the depth."""
    each = -(-depth // 2)
    packed = workspace(len(parts) * each, -(-rows // LANES) * LANES, dtype="int32")
    for number, part in enumerate(parts):
        for pair, odd in _depths(depth, rows):
            for at, size in blocks(rows, LANES):
                value = factor.part(part).pairs_of_rows(2 * pair, odd, at, size)
                store(packed, value, number * each + pair, at)
    return lambda row, pair: load(packed, pair, row)


def _depths(depth: int, width: int) -> Iterator[tuple[Any, bool]]:
    """(pair, whether it has an odd one) along the depth; vectors of `width` are packed for each."""
    if depth >= 2:
        with tasks(depth // 2, depth * -(-width // LANES)) as pair:
            yield pair, True
    if depth % 2:
        yield depth // 2, False


class _Panels:
    """The right factor in panels, and the product with it.

    A panel is a few vectors wide and as deep as the product; the last one ends with the last
    column, rounded up to whole vectors.
    """

    def __init__(
        self, cpu: Cpu, rows: int, columns: int, depth: int, parts: Sequence[Part]
    ) -> None:
        self.rows, self.columns, self.depth, self.parts = rows, columns, depth, parts
        self.each = -(-depth // 2)
        self.pairs = len(parts) * self.each
        whole = -(-columns // LANES) * LANES
        self.tile, self.width = tile_shape(cpu, rows, whole)
        self.count = -(-whole // self.width)
        self.last = whole - self.width
        self.packed = workspace(self.count, self.pairs, self.width, dtype="int32")

    def pack_rows(self, factor: Factor) -> None:
        """Of a matrix of which a row lies along the columns."""
        for number, part in enumerate(self.parts):
            some = factor.part(part)
            for pair, odd in _depths(self.depth, self.count * self.width):
                for panel, first, size in self._each(serial):
                    for at, lanes in pieces(self.width, LANES):
                        here = min(lanes, size - at)
                        value = some.pairs_of_rows(2 * pair, odd, first + at, here)
                        store(self.packed, value, panel, number * self.each + pair, at)

    def pack_columns(self, factor: Factor) -> None:
        """Of a matrix of which a row lies along the depth."""
        for panel, first, size in self._each(lambda count: tasks(count, self.columns * self.pairs)):
            if size < self.width:
                with serial(self.pairs) as pair:
                    zeros = splat(T.int32(0), LANES)
                    store(self.packed, zeros, panel, pair, self.width - LANES)
            room = local(LANES, dtype="int32")
            with serial(size) as column:
                row = T.bind(first + column)
                for number, part in enumerate(self.parts):
                    for at, numbers in blocks(self.depth, 2 * LANES):
                        store(room, factor.part(part).pairs_of_row(row, at, numbers), 0)
                        for i in range(-(-numbers // 2)):
                            place = number * self.each + at // 2 + i
                            store(self.packed, load(room, i), panel, place, column)

    def multiply(
        self,
        factor: Callable[[Any, Any], Any],
        write: Callable[..., None],
        *,
        start: Any = None,
        chain: int | None = None,
    ) -> None:
        """Writes start[column] + Σ_pair factor(row, pair) · packed at (row, column).

        With `chain`, no accumulator adds more than that many pairs before it goes into a total.
        """
        tiles = -(-self.rows // self.tile)
        chain = min(chain or self.pairs, self.pairs)
        work = self.rows * self.count * self.width // LANES * self.pairs

        def one(panel: Any, tile: Any, first: Any, size: int) -> None:
            row = T.bind(tile_start(tile, self.tile, self.rows))
            self._cell(factor, write, start, chain, panel, row, first, size)

        if self.count > 1:
            with tasks((self.count - 1) * tiles, work) as task:
                panel, tile = task // tiles, task % tiles
                one(panel, tile, panel * self.width, self.width)
        with tasks(tiles, work // self.count) as tile:
            one(self.count - 1, tile, self.last, self.columns - self.last)

    def _cell(
        self,
        factor: Callable[[Any, Any], Any],
        write: Callable[..., None],
        start: Any,
        chain: int,
        panel: Any,
        row: Any,
        first: Any,
        size: int,
    ) -> None:
        """The tile at (row, first), of which `size` columns count."""
        cells = [(r, at) for r in range(self.tile) for at in range(0, self.width, LANES)]
        sums = {cell: local(LANES) for cell in cells}
        totals = {cell: local(LANES) for cell in cells} if chain < self.pairs else sums
        for r, at in cells:
            begin = splat(0.0, LANES)
            if start is not None:
                read = lambda a, n: load(start, a, lanes=n)  # noqa: E731
                begin = filled(read, first + at, min(LANES, size - at))
            store(totals[r, at], begin, 0)
        for near, some in blocks(self.pairs, chain):
            if totals is not sums:
                for cell in cells:
                    store(sums[cell], splat(0.0, LANES), 0)
            for next_, steps in blocks(some, 4):
                for step in range(steps):
                    self._step(sums, factor, panel, row, near + next_ + step)
            if totals is not sums:
                for cell in cells:
                    more = load(sums[cell], 0, lanes=LANES)
                    store(totals[cell], load(totals[cell], 0, lanes=LANES) + more, 0)
        for r, at in cells:
            lanes = min(LANES, size - at)
            write(load(totals[r, at], 0, lanes=lanes), row + r, first + at)

    def _step(
        self, sums: Any, factor: Callable[[Any, Any], Any], panel: Any, row: Any, pair: Any
    ) -> None:
        offsets = range(0, self.width, LANES)
        right = [T.bind(load(self.packed, panel, pair, at, lanes=LANES)) for at in offsets]
        for r in range(self.tile):
            left = T.bind(T.Broadcast(factor(row + r, pair), LANES))
            for at, values in zip(offsets, right, strict=True):
                total = load(sums[r, at], 0, lanes=LANES)
                store(sums[r, at], dot(total, values, left), 0)

    def _each(self, loop: Callable[[int], Any]) -> Iterator[tuple[Any, Any, int]]:
        """(panel, its first column, its columns) of all panels; a loop over all but the last."""
        if self.count > 1:
            with loop(self.count - 1) as panel:
                yield panel, panel * self.width, self.width
        yield self.count - 1, self.last, self.columns - self.last
