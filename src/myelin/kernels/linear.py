"""Linear layers: products of matrices, and norms of their gradients.

All products are one tiled loop (`_product`). Its right factor is packed first, so that the inner
loop reads it in order. A tile at the edge starts earlier instead of being cut: there is one tile
shape a kernel, and what two tiles both write is the same bits. Sizes: m examples, k inputs, n
outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.tir import (
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
    vectors,
    workspace,
)

# Examples that one float32 accumulator adds before it goes into the total.
EXAMPLES = 32
# The smallest normal float32: what flushing to zero can take from one term.
_TINY = 2.0**-126


def matmul(cpu: Cpu, m: int, k: int, n: int, *, bias: bool, finish: Epilogue = PLAIN) -> Any:
    """x[m, k], w[k, n], (b[n]), others[m, n]… → y[m, n] = x @ w (+ b), finished."""
    shapes = {"x": (m, k), "w": (k, n), **({"b": (n,)} if bias else {})}
    with Kernel(**shapes, **finish.parameters((m, n)), y=(m, n)) as kernel:
        x, w, *more, y = kernel.buffers
        b, others = more[:bias], more[bias:]
        _product(
            cpu,
            (m, n, k),
            left=lambda _, r, row, depth: load(x, row + r, depth),
            right=lambda depth, column, lanes: load(w, depth, column, lanes=lanes),
            start=lambda column, lanes: load(b[0], column, lanes=lanes) if b else splat(0.0, lanes),
            write=finish.into(y, others),
        )
    return kernel.function


def backward_data(cpu: Cpu, m: int, k: int, n: int, *, finish: Epilogue = PLAIN) -> Any:
    """d[m, n], w[k, n], others[m, k]… → dx[m, k] = d @ wᵀ, finished."""
    with Kernel(d=(m, n), w=(k, n), **finish.parameters((m, k)), dx=(m, k)) as kernel:
        d, w, *others, dx = kernel.buffers
        _product(
            cpu,
            (m, k, n),
            left=lambda _, r, row, depth: load(d, row + r, depth),
            right=lambda depth, column, lanes: [load(w, column + i, depth) for i in range(lanes)],
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
        tiles = -(-k // rows)
        kept = workspace(tiles, m, rows)
        with tasks(tiles, m * tiles * -(-rows // cpu.lanes)) as tile, serial(m) as example:
            for at, lanes in pieces(rows, cpu.lanes):
                value = load(x, example, tile_start(tile, rows, k) + at, lanes=lanes)
                store(kept, if_counted(load(c, example), value, lanes), tile, example, at)

        def scaled(example: Any, column: Any, lanes: int) -> Any:
            weight = load(c, example)
            value = splat(weight, lanes) * load(d, example, column, lanes=lanes)
            return if_counted(weight, value, lanes)

        _product(
            cpu,
            (k, n, m),
            left=lambda tile, r, _, example: load(kept, tile, example, r),
            right=scaled,
            write=PLAIN.into(g, []),
            chain=EXAMPLES,
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
    return T.bind(total(sums[0], lanes) + T.float32(extent * _TINY))


def if_counted(weight: Any, value: Any, lanes: int) -> Any:
    """Keeps `value` where the weight is not zero, else gives zero, even for NaN and infinity."""
    # The comparison is a vector, so that it becomes a mask and not a branch on data.
    return select(splat(weight, lanes) != splat(0.0, lanes), value, splat(0.0, lanes))


def _product(
    cpu: Cpu,
    extents: tuple[int, int, int],
    *,
    left: Callable[[Any, int, Any, Any], Any],
    right: Callable[[Any, Any, int], Any],
    start: Callable[[Any, int], Any] = lambda _column, lanes: splat(0.0, lanes),
    write: Callable[..., None],
    chain: int | None = None,
) -> None:
    """Writes start[column] + Σ_depth left[row, depth] · right[depth, column] at (row, column).

    `extents` are (rows, columns, depth). `left` is asked for row `r` of tile `tile`, which starts
    at `row`, at a depth. `right` gives a vector, or a list of scalars where its columns are not
    neighbours. With `chain`, no accumulator adds more than that many products before it goes into a
    total.
    """
    rows, columns, depth = extents
    tile_rows, width = tile_shape(cpu, rows, columns)
    row_tiles, panels = -(-rows // tile_rows), -(-columns // width)
    vectors_wide = pieces(width, cpu.lanes)
    chain = min(chain or depth, depth)

    packed = workspace(panels, depth, width)
    with tasks(panels, panels * depth * len(vectors_wide)) as panel, serial(depth) as at:
        for offset, lanes in vectors_wide:
            value = right(at, tile_start(panel, width, columns) + offset, lanes)
            if isinstance(value, list):
                for i, scalar in enumerate(value):
                    store(packed, scalar, panel, at, offset + i)
            else:
                store(packed, value, panel, at, offset)

    with tasks(panels * row_tiles, rows * panels * len(vectors_wide) * depth) as task:
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
                    for r in range(tile_rows):
                        factor = left(tile, r, row, at)
                        for offset, lanes in vectors_wide:
                            term = splat(factor, lanes) * load(
                                packed, panel, at, offset, lanes=lanes
                            )
                            store(sums[r], load(sums[r], offset, lanes=lanes) + term, offset)
            if totals is not sums:
                for r in range(tile_rows):
                    for offset, lanes in vectors_wide:
                        more = load(sums[r], offset, lanes=lanes)
                        store(totals[r], load(totals[r], offset, lanes=lanes) + more, offset)
        for r in range(tile_rows):
            for offset, lanes in vectors_wide:
                write(load(totals[r], offset, lanes=lanes), row + r, column + offset)


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
