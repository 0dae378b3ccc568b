"""Linear layers: products of matrices, and norms of their gradients.

All products are one tiled loop (`_product`). A factor is packed before it only where the loop would
read it badly as it is: that is a pass over memory, and a loop on all threads, more. A tile at the
edge starts earlier instead of being cut: there is one tile shape a kernel, and what two tiles both
write is the same bits. Sizes: m examples, k inputs, n outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.tir import (
    TINY,
    Kernel,
    blocks,
    gamma,
    load,
    local,
    pieces,
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


def matmul(cpu: Cpu, m: int, k: int, n: int, *, bias: bool, finish: Epilogue = PLAIN) -> Any:
    """x[m, k], w[k, n], (b[n]), others[m, n]… → y[m, n] = x @ w (+ b), finished."""
    shapes = {"x": (m, k), "w": (k, n), **({"b": (n,)} if bias else {})}
    with Kernel(**shapes, **finish.parameters((m, n)), y=(m, n)) as kernel:
        x, w, *more, y = kernel.buffers
        b, others = more[:bias], more[bias:]
        right = _rows_of(w)
        several = m > tile_shape(cpu, m, n)[0]
        if n > _LONG or (several and 4 * k * n > cpu.cache):
            panels = _Panels(cpu, m, n, k)
            for panel, column in panels.each():
                with serial(k) as depth:
                    for at, lanes in panels.vectors:
                        panels.pack(load(w, depth, column + at, lanes=lanes), panel, depth, at)
            right = panels.read
        _product(
            cpu,
            (m, n, k),
            left=lambda _, r, row, depth: load(x, row + r, depth),
            right=right,
            start=lambda column, lanes: load(b[0], column, lanes=lanes) if b else splat(0.0, lanes),
            write=finish.into(y, others),
        )
    return kernel.function


def backward_data(cpu: Cpu, m: int, k: int, n: int, *, finish: Epilogue = PLAIN) -> Any:
    """d[m, n], w[k, n], others[m, k]… → dx[m, k] = d @ wᵀ, finished."""
    with Kernel(d=(m, n), w=(k, n), **finish.parameters((m, k)), dx=(m, k)) as kernel:
        d, w, *others, dx = kernel.buffers
        panels = _Panels(cpu, m, k, n)
        for panel, column in panels.each():
            for first, size in blocks(n, cpu.lanes):
                for at, lanes in panels.vectors:
                    rows = [load(w, column + at + i, first, lanes=size) for i in range(lanes)]
                    for i, value in enumerate(transposed(rows)):
                        panels.pack(value, panel, first + i, at)
        _product(
            cpu,
            (m, k, n),
            left=lambda _, r, row, depth: load(d, row + r, depth),
            right=panels.read,
            write=finish.into(dx, others),
        )
    return kernel.function


def weighted_gradient(cpu: Cpu, m: int, k: int, n: int) -> Any:
    """x[m, k], d[m, n], c[m] → g[k, n] = Σ_i c_i · x_iᵀ d_i.

    Examples with c_i = 0 add exactly zero, whatever x_i and d_i hold.
    """
    rows, _ = tile_shape(cpu, k, n)
    with Kernel(x=(m, k), d=(m, n), c=(m,), g=(k, n)) as kernel:
        x, d, c, g = kernel.buffers
        # Whole vectors of kept inputs serve two tiles where they can.
        wide = cpu.lanes if k % cpu.lanes == 0 and cpu.lanes % rows == 0 else rows
        strips = -(-k // wide)
        kept = workspace(strips, m, wide)
        panels = _Panels(cpu, k, n, m)
        # By strips, as tiles are dealt out below: what a thread packs, it needs itself.
        with tasks(strips, m * strips) as strip, serial(m) as i:
            for at, lanes in pieces(wide, cpu.lanes):
                column = tile_start(strip, wide, k) + at
                counted = if_counted(load(c, i), load(x, i, column, lanes=lanes), lanes)
                store(kept, counted, strip, i, at)
        work = m * panels.count * len(panels.vectors)
        for first, size in blocks(m, _PACKED, lambda extent: tasks(extent, work)):
            with serial(panels.count) as panel, serial(size) as i:
                weight = load(c, first + i)
                for at, lanes in panels.vectors:
                    value = load(d, first + i, panels.start(panel) + at, lanes=lanes)
                    counted = if_counted(weight, splat(weight, lanes) * value, lanes)
                    panels.pack(counted, panel, first + i, at)
        share = wide // rows
        _product(
            cpu,
            (k, n, m),
            left=lambda tile, r, _, example: load(
                kept, tile // share, example, tile % share * rows + r
            ),
            right=panels.read,
            write=PLAIN.into(g, []),
            chain=EXAMPLES,
            by_rows=True,
        )
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
    left: Callable[[Any, int, Any, Any], Any],
    right: Callable[[Any, Any, Any, int, int], Any],
    start: Callable[[Any, int], Any] = lambda _column, lanes: splat(0.0, lanes),
    write: Callable[..., None],
    chain: int | None = None,
    by_rows: bool = False,
) -> None:
    """Writes start[column] + Σ_depth left[row, depth] · right[depth, column] at (row, column).

    `extents` are (rows, columns, depth). `left` is asked for row `r` of tile `tile`, which starts
    at `row`, at a depth. `right` is asked for a vector of a panel, which starts at `column`, at a
    depth and an offset. With `chain`, no accumulator adds more than that many products before it
    goes into a total. Tasks go panel by panel, or tile by tile of rows.
    """
    rows, columns, depth = extents
    tile_rows, width = tile_shape(cpu, rows, columns)
    row_tiles, panels = -(-rows // tile_rows), -(-columns // width)
    vectors_wide = pieces(width, cpu.lanes)
    chain = min(chain or depth, depth)

    with tasks(panels * row_tiles, rows * panels * len(vectors_wide) * depth) as task:
        if by_rows:
            tile, panel = task // panels, task % panels
        else:
            panel, tile = task // row_tiles, task % row_tiles
        column, row = tile_start(panel, width, columns), tile_start(tile, tile_rows, rows)
        sums = [local(width) for _ in range(tile_rows)]
        totals = [local(width) for _ in range(tile_rows)] if chain < depth else sums

        for r in range(tile_rows):
            for offset, lanes in vectors_wide:
                store(totals[r], start(column + offset, lanes), offset)
        for first, size in blocks(depth, chain):
            if totals is not sums:
                for r in range(tile_rows):
                    for offset, lanes in vectors_wide:
                        store(sums[r], splat(0.0, lanes), offset)
            for near, steps in blocks(size, 4):
                for step in range(steps):
                    at = first + near + step
                    values = [
                        T.bind(right(panel, column, at, offset, lanes))
                        for offset, lanes in vectors_wide
                    ]
                    for r in range(tile_rows):
                        factor = left(tile, r, row, at)
                        for (offset, lanes), value in zip(vectors_wide, values, strict=True):
                            term = splat(factor, lanes) * value
                            store(sums[r], load(sums[r], offset, lanes=lanes) + term, offset)
            if totals is not sums:
                for r in range(tile_rows):
                    for offset, lanes in vectors_wide:
                        more = load(sums[r], offset, lanes=lanes)
                        store(totals[r], load(totals[r], offset, lanes=lanes) + more, offset)
        for r in range(tile_rows):
            for offset, lanes in vectors_wide:
                write(load(totals[r], offset, lanes=lanes), row + r, column + offset)


class _Panels:
    """The right factor of a product in panels: what a tile reads, depth after depth."""

    def __init__(self, cpu: Cpu, rows: int, columns: int, depth: int) -> None:
        self.columns, self.depth = columns, depth
        _, self.width = tile_shape(cpu, rows, columns)
        self.count = -(-columns // self.width)
        self.vectors = pieces(self.width, cpu.lanes)
        self._packed = workspace(self.count, depth, self.width)

    def each(self) -> Iterator[tuple[Any, Any]]:
        """(panel, its first column), on all threads if there is much to pack."""
        with tasks(self.count, self.count * self.depth * len(self.vectors)) as panel:
            yield panel, self.start(panel)

    def start(self, panel: Any) -> Any:
        """A panel's first column."""
        return tile_start(panel, self.width, self.columns)

    def pack(self, value: Any, panel: Any, depth: Any, at: int) -> None:
        """Puts a vector where it belongs."""
        store(self._packed, value, panel, depth, at)

    def read(self, panel: Any, _column: Any, depth: Any, at: int, lanes: int) -> Any:
        """What `_product` asks of its right factor."""
        return load(self._packed, panel, depth, at, lanes=lanes)


def _rows_of(matrix: Any) -> Callable[[Any, Any, Any, int, int], Any]:
    """A right factor that is read where it is."""
    return lambda _panel, column, depth, at, lanes: load(matrix, depth, column + at, lanes=lanes)


def tile_shape(cpu: Cpu, rows: int, columns: int) -> tuple[int, int]:
    """Chooses the tile that stays in registers, (rows, columns), so that little of it overlaps."""
    tallest, widest = {16: (8, 3), 8: (6, 2)}[cpu.lanes]

    def cost(width: int) -> float:
        wide = -(-width // cpu.lanes)
        # One vector a row is too little work for each element of the left factor.
        return -(-columns // width) * wide * (1.5 if wide == 1 else 1.0)

    widths = [min(columns, cpu.lanes * wide) for wide in range(1, widest + 1)]
    return min(rows, tallest), min(widths, key=cost)


def tile_start(tile: Any, size: int, extent: int) -> Any:
    """Where a tile starts: the last one is moved back into the matrix."""
    return tile * size if extent % size == 0 else T.min(tile * size, extent - size)
