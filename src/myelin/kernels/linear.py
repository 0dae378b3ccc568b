"""Linear layers: products of matrices, and norms of their gradients.

All products are tiles in registers (`Tile`). Where these would read the right factor badly as it
is, because it is large or must be turned around, each task packs what it reads, a block at a time
(`_packed_product`). A tile at the edge starts earlier instead of being cut: there is one tile shape
a kernel, and what two tiles both write is the same bits. Sizes: m examples, k inputs, n outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.tiles import Tile, grid, steps
from myelin.kernels.tir import (
    TINY,
    Kernel,
    blocks,
    gamma,
    load,
    local,
    pieces,
    prefetch,
    select,
    serial,
    splat,
    store,
    tasks,
    total,
    transposed,
    vectors,
    workspace,
)

# Examples that one float32 accumulator adds before it goes into the total.
EXAMPLES = 32
# Examples whose adjoints are packed together.
_PACKED = 16
# Numbers of a row from which on columns are packed, as those of large matrices: rows of pages share
# the same lines of a cache.
_LONG = 512
# Depths that are packed together, so that a panel stays in a core's first cache: beside what was
# prefetched, and alone.
_PREFETCHED, _DEPTHS = 128, 256
# Tasks that are enough to keep all threads busy to the end.
_TASKS = 16

_Left = Callable[[Any, Any], Any]
_Start = Callable[[Any, int], Any]


def matmul(cpu: Cpu, m: int, k: int, n: int, *, bias: bool, finish: Epilogue = PLAIN) -> Any:
    """x[m, k], w[k, n], (b[n]), others[m, n]… → y[m, n] = x @ w (+ b), finished."""
    shapes = {"x": (m, k), "w": (k, n), **({"b": (n,)} if bias else {})}
    with Kernel(**shapes, **finish.parameters((m, n)), y=(m, n)) as kernel:
        x, w, *more, y = kernel.buffers
        b, others = more[:bias], more[bias:]
        extents, write = (m, n, k), finish.into(y, others)

        def start(column: Any, lanes: int) -> Any:
            return load(b[0], column, lanes=lanes) if b else splat(0.0, lanes)

        def left(row: Any, depth: Any) -> Any:
            return load(x, row, depth)

        def right(depth: Any, column: Any, lanes: int) -> Any:
            return load(w, depth, column, lanes=lanes)

        def pack(panel: _Panel, first: Any, size: int) -> None:
            with serial(size) as depth:
                for at, lanes in panel.vectors:
                    panel.put(load(w, first + depth, panel.column + at, lanes=lanes), depth, at)
                    if size < k:  # No cache has what comes next, and its lines lie far apart.
                        prefetch(w, T.min(first + depth + size, k - 1), panel.column + at)

        if n > _LONG or 4 * k * n > cpu.cache:
            _packed_product(
                cpu, extents, left=left, pack=pack, start=start, write=write, depths=_PREFETCHED
            )
        else:
            _product(cpu, extents, left=left, right=right, start=start, write=write)
    return kernel.function


def backward_data(cpu: Cpu, m: int, k: int, n: int, *, finish: Epilogue = PLAIN) -> Any:
    """d[m, n], w[k, n], others[m, k]… → dx[m, k] = d @ wᵀ, finished."""
    with Kernel(d=(m, n), w=(k, n), **finish.parameters((m, k)), dx=(m, k)) as kernel:
        d, w, *others, dx = kernel.buffers

        def pack(panel: _Panel, first: Any, size: int) -> None:
            for near, depths in blocks(size, cpu.lanes):
                for at, lanes in panel.vectors:
                    rows = [panel.column + at + i for i in range(lanes)]
                    read = [load(w, row, first + near, lanes=depths) for row in rows]
                    for i, value in enumerate(transposed(read)):
                        panel.put(value, near + i, at)

        _packed_product(
            cpu,
            (m, k, n),
            left=lambda row, depth: load(d, row, depth),
            pack=pack,
            start=_zero,
            write=finish.into(dx, others),
        )
    return kernel.function


def weighted_gradient(cpu: Cpu, m: int, k: int, n: int) -> Any:
    """x[m, k], d[m, n], c[m] → g[k, n] = Σ_i c_i · x_iᵀ d_i.

    Examples with c_i = 0 add exactly zero, whatever x_i and d_i hold.
    """
    rows, width = tile_shape(cpu, k, n)
    # Whole vectors of kept inputs serve two tiles where they can.
    strip = cpu.lanes if k % cpu.lanes == 0 and cpu.lanes % rows == 0 else rows
    strips, panels, wide = -(-k // strip), -(-n // width), pieces(width, cpu.lanes)
    some, shares = _shares(panels, _TASKS // strips)
    with Kernel(x=(m, k), d=(m, n), c=(m,), g=(k, n)) as kernel:
        x, d, c, g = kernel.buffers
        packed = workspace(panels, m, width)
        work = m * panels * len(wide)
        for first, size in blocks(m, _PACKED, lambda extent: tasks(extent, work)):
            with serial(panels) as panel, serial(size) as i:
                weight = load(c, first + i)
                for at, lanes in wide:
                    column = tile_start(panel, width, n) + at
                    value = load(d, first + i, column, lanes=lanes)
                    counted = if_counted(weight, splat(weight, lanes) * value, lanes)
                    store(packed, counted, panel, first + i, at)
        with tasks(strips * shares, k * work) as task:
            row = tile_start(task // shares, strip, k)
            begin = tile_start(task % shares, some, panels)
            kept = workspace(m, strip)
            with serial(m) as i:
                for at, lanes in pieces(strip, cpu.lanes):
                    value = load(x, i, row + at, lanes=lanes)
                    store(kept, if_counted(load(c, i), value, lanes), i, at)
                # The next strip, whose lines lie as far apart.
                prefetch(x, i, T.min(row + strip, k - 1))
            for number, tile in grid(some, strip // rows):
                panel = begin + number
                column = tile_start(panel, width, n)
                totals = _tile(rows, wide)
                for first, size in blocks(m, EXAMPLES):
                    sums = _tile(rows, wide) if m > EXAMPLES else totals
                    for (near,) in steps(size):
                        sums.add_outer(
                            [load(kept, first + near, tile * rows + r) for r in range(rows)],
                            [
                                load(packed, panel, first + near, at, lanes=lanes)
                                for at, lanes in wide
                            ],
                        )
                    if sums is not totals:
                        for r, v, _, _ in totals.cells():
                            totals.add(r, v, sums.get(r, v))
                for r, v, at, _ in totals.cells():
                    store(g, totals.get(r, v), row + tile * rows + r, column + at)
    return kernel.function


def weighted_gradient_additions(m: int) -> int:
    """Bounds the float32 roundings from c_i · x_i · d_i to the sum of m examples."""
    return min(m, EXAMPLES) + -(-m // EXAMPLES) + 1


def weighted_bias(cpu: Cpu, m: int, n: int) -> Any:
    """d[m, n], c[m] → g[n] = Σ_i c_i · d_i; examples with c_i = 0 add exactly zero."""
    with Kernel(d=(m, n), c=(m,), g=(n,)) as kernel:
        d, c, g = kernel.buffers
        for column, lanes in blocks(n, cpu.lanes):
            whole, part = local(lanes), local(lanes)
            store(whole, splat(0.0, lanes), 0)
            for first, size in blocks(m, EXAMPLES):
                store(part, splat(0.0, lanes), 0)
                with serial(size) as i:
                    weight = load(c, first + i)
                    value = splat(weight, lanes) * load(d, first + i, column, lanes=lanes)
                    counted = if_counted(weight, value, lanes)
                    store(part, load(part, 0, lanes=lanes) + counted, 0)
                store(whole, load(whole, 0, lanes=lanes) + load(part, 0, lanes=lanes), 0)
            store(g, load(whole, 0, lanes=lanes), column)
    return kernel.function


def squared_norm(cpu: Cpu, m: int, k: int, n: int, *, bias: bool) -> Any:
    """x[m, k], d[m, n] → s[m] = |x_i|²·|d_i|² (+ |d_i|² for the bias): the squared norm of each
    example's gradient.

    True squared norm ≤ s·(1 + `squared_norm_inflation(k, n)`) + 2⁻¹²⁵. What flushing subnormal
    squares to zero can take away is added to each factor, or a huge x would hide behind a tiny d.
    """
    with Kernel(x=(m, k), d=(m, n), s=(m,)) as kernel:
        x, d, s = kernel.buffers
        with tasks(m, m * (-(-k // cpu.lanes) + -(-n // cpu.lanes))) as example:
            inputs = sum_of_squares(cpu, x, example, k)
            outputs = sum_of_squares(cpu, d, example, n)
            store(s, inputs * outputs + outputs if bias else inputs * outputs, example)
    return kernel.function


def squared_norm_inflation(k: int, n: int) -> float:
    """The relative rounding bound of `squared_norm`: k + n terms and four operations more."""
    return gamma(k + n + 4)


def sum_of_squares(
    cpu: Cpu,
    rows: Any,
    row: Any,
    extent: int,
    seen: Callable[[Any, int], Any] = lambda value, _lanes: value,
) -> Any:
    """|rows[row]|² + extent·2⁻¹²⁶, an upper bound even where squares were flushed to zero.

    `seen(value, lanes)` says what stands for a value: its rounding, where a product rounds it.
    """
    lanes = min(cpu.lanes, extent)
    chains = min(4, -(-extent // lanes))
    sums = [local(lanes) for _ in range(chains)]
    for part in sums:
        store(part, splat(0.0, lanes), 0)
    for position, (at, width) in enumerate(vectors(extent, lanes, chains)):
        value = seen(load(rows, row, at, lanes=width), width)
        part = sums[position % chains]
        store(part, load(part, 0, lanes=width) + value * value, 0)
    for part in sums[1:]:
        store(sums[0], load(sums[0], 0, lanes=lanes) + load(part, 0, lanes=lanes), 0)
    return T.bind(total(sums[0], lanes) + T.float32(extent * TINY))


def if_counted(weight: Any, value: Any, lanes: int) -> Any:
    """Keeps `value` where the weight is not zero, else gives zero, even for NaN and infinity."""
    # The comparison is a vector, so that it becomes a mask and not a branch on data.
    return select(splat(weight, lanes) != splat(0.0, lanes), value, splat(0.0, lanes))


def _product(
    cpu: Cpu,
    extents: tuple[int, int, int],
    *,
    left: _Left,
    right: Callable[[Any, Any, int], Any],
    start: _Start,
    write: Callable[..., None],
) -> None:
    """Writes start[column] + Σ_depth left[row, depth] · right[depth, column] at (row, column).

    `extents` are (rows, columns, depth). `left` is asked for a row at a depth, `right` for a vector
    at a depth and a column.
    """
    rows, columns, depth = extents
    tile_rows, width = tile_shape(cpu, rows, columns)
    row_tiles, panels = -(-rows // tile_rows), -(-columns // width)
    wide = pieces(width, cpu.lanes)

    with tasks(panels * row_tiles, rows * panels * len(wide) * depth) as task:
        column = tile_start(task // row_tiles, width, columns)
        row = tile_start(task % row_tiles, tile_rows, rows)
        sums = _tile(tile_rows, wide)
        for r, v, at, lanes in sums.cells():
            sums.set(r, v, start(column + at, lanes))
        for (at,) in steps(depth):
            sums.add_outer(
                [left(row + r, at) for r in range(tile_rows)],
                [right(at, column + offset, lanes) for offset, lanes in wide],
            )
        for r, v, at, _ in sums.cells():
            write(sums.get(r, v), row + r, column + at)


def _packed_product(
    cpu: Cpu,
    extents: tuple[int, int, int],
    *,
    left: _Left,
    pack: Callable[[_Panel, Any, int], None],
    start: _Start,
    write: Callable[..., None],
    depths: int = _DEPTHS,
) -> None:
    """The same where every task packs what it needs of the right factor, `depths` at a time.

    `pack` is asked for a panel from a depth on, for so many: they stay in a core's cache
    while all its rows go over them, whose sums wait in memory meanwhile.
    """
    rows, columns, depth = extents
    tile_rows, width = tile_shape(cpu, rows, columns)
    row_tiles, panels = -(-rows // tile_rows), -(-columns // width)
    wide = pieces(width, cpu.lanes)
    most = min(depth, depths)
    # Packing is done again for every share of the rows: little beside two tiles.
    tiles, shares = _shares(row_tiles, min(_TASKS // panels, row_tiles // 2))

    with tasks(panels * shares, rows * panels * len(wide) * depth) as task:
        column = tile_start(task // shares, width, columns)
        begin = tile_start(task % shares, tiles, row_tiles)
        panel = _Panel(column, wide, workspace(most, width))
        sums = workspace(tiles, tile_rows, width) if most < depth else None
        if sums is not None:
            for tile, r in grid(tiles, tile_rows):
                for at, lanes in wide:
                    store(sums, start(column + at, lanes), tile, r, at)
        for first, size in blocks(depth, most):
            pack(panel, first, size)
            with serial(tiles) as tile:
                row = tile_start(begin + tile, tile_rows, rows)
                here = _tile(tile_rows, wide)
                for r, v, at, lanes in here.cells():
                    so_far = load(sums, tile, r, at, lanes=lanes) if sums is not None else None
                    here.set(r, v, start(column + at, lanes) if so_far is None else so_far)
                for (near,) in steps(size):
                    here.add_outer(
                        [left(row + r, first + near) for r in range(tile_rows)],
                        [panel.get(near, at, lanes) for at, lanes in wide],
                    )
                for r, v, at, _ in here.cells():
                    if sums is not None:
                        store(sums, here.get(r, v), tile, r, at)
                    else:
                        write(here.get(r, v), row + r, column + at)
        if sums is not None:
            with serial(tiles) as tile:
                row = tile_start(begin + tile, tile_rows, rows)
                for r in range(tile_rows):
                    for at, lanes in wide:
                        write(load(sums, tile, r, at, lanes=lanes), row + r, column + at)


def _zero(_column: Any, lanes: int) -> Any:
    return splat(0.0, lanes)


class _Panel:
    """Some depths of some columns of a right factor, as tiles read them: depth after depth."""

    def __init__(self, column: Any, vectors: Sequence[tuple[int, int]], packed: Any) -> None:
        self.column, self.vectors, self._packed = column, vectors, packed

    def put(self, value: Any, depth: Any, at: int) -> None:
        """Keeps a vector, which starts at column `column + at`."""
        store(self._packed, value, depth, at)

    def get(self, depth: Any, at: int, lanes: int) -> Any:
        """What was kept there."""
        return load(self._packed, depth, at, lanes=lanes)


def _tile(rows: int, vectors: Sequence[tuple[int, int]]) -> Tile:
    return Tile(rows, [lanes for _, lanes in vectors])


def tile_shape(cpu: Cpu, rows: int, columns: int) -> tuple[int, int]:
    """Chooses the tile that stays in registers, (rows, columns), so that little of it overlaps."""
    tallest, widest = {16: (8, 3), 8: (6, 2)}[cpu.lanes]

    def cost(width: int) -> float:
        wide = -(-width // cpu.lanes)
        # One vector a row is too little work for each element of the left factor.
        return -(-columns // width) * wide * (1.5 if wide == 1 else 1.0)

    widths = [min(columns, cpu.lanes * wide) for wide in range(1, widest + 1)]
    return min(rows, tallest), min(widths, key=cost)


def _shares(count: int, most: int) -> tuple[int, int]:
    """(how many each has, shares) of `count`, in `most` shares at most; the last may overlap."""
    each = -(-count // max(1, most))
    return each, -(-count // each)


def tile_start(tile: Any, size: int, extent: int) -> Any:
    """Where a tile starts: the last one is moved back into the matrix."""
    return tile * size if extent % size == 0 else T.min(tile * size, extent - size)
