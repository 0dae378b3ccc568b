"""Convolutions of 3 × 3 at stride 1 by Winograd's F(4 × 4, 3 × 3).

Outputs are cut into tiles of 4 × 4, each of which sees 6 × 6 inputs. In the domain of 36 points a
convolution is 36 matrix products, with 2.25 multiplications an output and channel instead of 9:

    y = Aᵀ[(G w Gᵀ) · (Bᵀ x B)]A        g = Gᵀ[(Bᵀ x B) · (A d Aᵀ)]G

(Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016.) The points are 0,
±0.6875, ±1.3125 and infinity: against the usual 0, ±1, ±2 the largest errors are about a quarter,
and all coefficients without a division are exact in float32.

The templates are those of `myelin.kernels.conv` with the same arguments, but for activations, whose
border they put in themselves; scratch may be several vectors. `can` says for which convolutions.

Transforms are in float32; `operands` of the matrix products may be others. Of bfloat16 ones, input
and output channels come in whole vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.functions import is_finite
from myelin.kernels.operands import FLOAT32, Operands
from myelin.kernels.stream import Stream
from myelin.kernels.tiles import (
    SquaredNorm,
    Tile,
    add_shares,
    channel_groups,
    grid,
    largest_divisor,
    run_length,
    segments,
    shares,
    steps,
)
from myelin.kernels.tir import (
    Kernel,
    gamma,
    load,
    pieces,
    prefetch,
    select,
    serial,
    splat,
    store,
    vectors,
)
from myelin.kernels.window import Conv, Product

Values = list[Any]

_POINTS = 36
_CHUNKS = 8  # parts of the work, each with a scratch of its own
_AHEAD = 2  # rows of tiles, enough for memory to answer
_CACHE = 1 << 20  # bytes of a thread's own cache
_PAD = 16  # floats between planes: their distance must not be a multiple of a page
_GROWTH = 181  # what absolute values grow by, against a product of activations and adjoints


def can(conv: Conv, kind: Product) -> bool:
    """Whether a product can be computed so; `myelin.planner` says where it is worth it."""
    del kind  # the same for all
    square = (conv.kh, conv.kw, conv.stride) == (3, 3, (1, 1))
    return square and max(conv.padding) <= 2


def gradient_error(conv: Conv) -> float:
    """Bound of ‖ĝ − g‖ / (‖X‖·‖D‖): ĝ a gradient found here, X the patches and D the adjoints.

    Rounded is what 8 operations make of an input, 6 of an adjoint, tiles + 1 of their products and
    10 of these, the rounding of coefficients included: at most γ of all, of the same computation
    on absolute values. In a tile that is at most `_GROWTH` · |x|·|d|, the square of the largest
    singular value along one axis (`tests/kernels/test_winograd.py`), and so for all pairs of
    channels together. Each pixel of a tile's input is in a patch of its outputs; Cauchy and Schwarz
    do the rest.
    """
    return gamma(_tiles(conv) + 25) * _GROWTH


# Kernels


def forward(
    cpu: Cpu,
    conv: Conv,
    *,
    bias: bool,
    finish: Epilogue = PLAIN,
    operands: Operands = FLOAT32,
) -> Any:
    """x[n,h,w,ci], w[3,3,ci,co], (b[co]), others, scratch… → y[n,oh,ow,co], finished."""
    top, left = conv.padding[:2]
    rows = _Axis(before=top, size=conv.h, outputs=conv.oh)
    columns = _Axis(before=left, size=conv.w, outputs=conv.ow)
    layer = _Product(
        cpu=cpu, operands=operands, n=conv.n, ci=conv.ci, co=conv.co, rows=rows, columns=columns
    )
    output = (conv.n, conv.oh, conv.ow, conv.co)
    shapes = {
        "x": (conv.n, conv.h, conv.w, conv.ci),
        "w": (3, 3, conv.ci, conv.co),
        **({"b": (conv.co,)} if bias else {}),
        **finish.parameters(output),
        **layer.scratch,
    }
    with Kernel(**shapes, y=output) as kernel, operands.scope():
        x, w, *more, points, inputs, products, y = kernel.buffers
        b = more[:bias]
        layer.weights(points, lambda i, j, k, c, lanes: load(w, i, j, k, c, lanes=lanes))

        def biased(value: Any, channel: Any, lanes: int) -> Any:
            return value + load(b[0], channel, lanes=lanes) if b else value

        layer.run(x, points, inputs, products, y, biased, finish, more[bias:])
    return kernel.function


def backward_data(
    cpu: Cpu, conv: Conv, *, finish: Epilogue = PLAIN, operands: Operands = FLOAT32
) -> Any:
    """d[n,oh,ow,co], w[3·3·ci·co], others, scratch… → dx[n,h,w,ci], finished.

    A convolution of d within a border with the weights turned around and their channels swapped.
    """
    top, left = conv.padding[:2]
    rows = _Axis(before=2 - top, size=conv.oh, outputs=conv.h)
    columns = _Axis(before=2 - left, size=conv.ow, outputs=conv.w)
    layer = _Product(
        cpu=cpu, operands=operands, n=conv.n, ci=conv.co, co=conv.ci, rows=rows, columns=columns
    )
    image = (conv.n, conv.h, conv.w, conv.ci)
    shapes = {
        "d": (conv.n, conv.oh, conv.ow, conv.co),
        "w": (conv.weights,),
        **finish.parameters(image),
        **layer.scratch,
    }
    with Kernel(**shapes, dx=image) as kernel, operands.scope():
        d, w, *others, points, inputs, products, dx = kernel.buffers

        def turned(i: int, j: int, co: Any, ci: Any, lanes: int) -> Any:
            at = (((2 - i) * 3 + 2 - j) * conv.ci + ci) * conv.co + co
            return w[T.Ramp(at, conv.co, lanes)] if lanes > 1 else w[at]

        layer.weights(points, turned)
        plain = lambda value, _channel, _lanes: value  # noqa: E731
        layer.run(d, points, inputs, products, dx, plain, finish, others)
    return kernel.function


def stored_gradient(cpu: Cpu, conv: Conv, *, operands: Operands = FLOAT32) -> Any:
    """x[n,h,w,ci], d[n,oh,ow,co], scratch… → g[n,3·3·ci·co], s[n].

    s_i = ‖g_i‖² of the very numbers that are stored.
    """
    gradient = _each(cpu, conv, operands)
    later = Stream(cpu, n=conv.n, numbers=conv.weights, channels=conv.co)
    results = {"g": (conv.n, conv.weights), "s": (conv.n,)}
    shapes = {**gradient.images, **gradient.scratch, **results}
    with Kernel(**shapes) as kernel, operands.scope(), later.scope():
        x, d, *scratch, g, s = kernel.buffers
        for chunk, i in shares(conv.n, gradient.chunks):
            gradient.inputs(x, scratch, chunk, i)
            norm = SquaredNorm()
            for group in gradient.groups():
                gradient.adjoints(d, scratch, chunk, i, group)
                with norm.part(group.widths) as add:
                    for part in gradient.parts(group):
                        for row, v, offset, _, taps in gradient.taps(scratch, chunk, chunk, part):
                            for tap, value in enumerate(taps):
                                later.store(g, value, i, _weight(conv, tap, part, row, offset))
                            add(v, taps)
            norm.store(s, i, conv.weights)
            later.end()
    return kernel.function


def weighted_gradient(cpu: Cpu, conv: Conv) -> Any:
    """x[n,h,w,ci], d[n,oh,ow,co], c[n], scratch… → g[3·3·ci·co] = Σ_i c_i g_i.

    g_i leaves the domain of points before it is multiplied by c_i and added: sums there would
    round relative to numbers that no norm bounds. Where c_i g_i is not finite nothing is added: so
    an example with c_i = 0 adds nothing whatever it holds, nor one that overflows on the way.
    """
    sums = Sums(conv=conv)
    gradient = sums.gradient(cpu, FLOAT32)
    own = {
        "c": (conv.n,),
        **gradient.scratch,
        "sums": (gradient.chunks, 9 * gradient.most * gradient.wide),
        "totals": (sums.example_shares, conv.weights),
        "g": (conv.weights,),
    }
    with Kernel(**gradient.images, **own) as kernel:
        x, d, c, *scratch, part_sums, totals, g = kernel.buffers
        for run in sums.transformed(gradient, x, scratch, totals):
            for part in run.parts(gradient, d, scratch):
                for row, tap, offset, lanes in part.cells():
                    store(part_sums, splat(0.0, lanes), run.chunk, part.place(tap, row, offset))
                with serial(run.size) as i:
                    factor = T.bind(load(c, run.first + i))
                    found = gradient.taps(scratch, run.slot + i, run.chunk, part)
                    for row, _, offset, lanes, taps in found:
                        for tap, value in enumerate(taps):
                            at = (run.chunk, part.place(tap, row, offset))
                            clipped = T.bind(splat(factor, lanes) * value)
                            kept = select(is_finite(clipped), clipped, splat(0.0, lanes))
                            store(part_sums, load(part_sums, *at, lanes=lanes) + kept, *at)
                for row, tap, offset, lanes in part.cells():
                    value = load(part_sums, run.chunk, part.place(tap, row, offset), lanes=lanes)
                    at = (run.share, _weight(conv, tap, part, row, offset, run.origin))
                    store(totals, load(totals, *at, lanes=lanes) + value, *at)
        add_shares(cpu, totals, (sums.example_shares, 9, conv.ci * conv.co), g)
    return kernel.function


def weighted_gradient_additions(conv: Conv) -> int:
    """Longest chain of float32 operations on a sum over the examples in `weighted_gradient`."""
    sums = Sums(conv=conv)
    return 1 + sums.together + sums.runs + sums.example_shares


def gradient_scratch(
    cpu: Cpu, conv: Conv, *, sums: Sums | None = None, operands: Operands = FLOAT32
) -> int:
    """Bytes that a gradient keeps besides its arguments: of each example, or of `sums`."""
    gradient = sums.gradient(cpu, operands) if sums else _each(cpu, conv, operands)
    kept = gradient.scratch.values()
    shapes = [shape[0] if isinstance(shape[0], tuple) else shape for shape in kept]
    totals = sums.example_shares * conv.weights if sums else 0
    return 4 * (sum(math.prod(shape) for shape in shapes) + totals)


def _each(cpu: Cpu, conv: Conv, operands: Operands) -> _Gradient:
    """One for each example."""
    chunks = min(conv.n, _CHUNKS)
    return _Gradient(cpu=cpu, operands=operands, conv=conv, slots=chunks, chunks=chunks)


def batch_gradient(cpu: Cpu, conv: Conv, *, operands: Operands = FLOAT32) -> Any:
    """x[n,h,w,ci], d[n,oh,ow,co], scratch… → g[3·3·ci·co] = Σ_i g_i, for training without privacy.

    Runs of examples are summed in the domain of points, so nothing bounds what an example adds to
    their rounding.
    """
    sums = Sums(conv=conv)
    gradient = sums.gradient(cpu, operands)
    own = {
        **gradient.scratch,
        "totals": (sums.example_shares, conv.weights),
        "g": (conv.weights,),
    }
    with Kernel(**gradient.images, **own) as kernel, operands.scope():
        x, d, *scratch, totals, g = kernel.buffers
        for run in sums.transformed(gradient, x, scratch, totals):
            for part in run.parts(gradient, d, scratch):
                found = gradient.taps(scratch, run.slot, run.chunk, part, run.size)
                for row, _, offset, lanes, taps in found:
                    for tap, value in enumerate(taps):
                        at = (run.share, _weight(conv, tap, part, row, offset, run.origin))
                        store(totals, load(totals, *at, lanes=lanes) + value, *at)
        add_shares(cpu, totals, (sums.example_shares, 9, conv.ci * conv.co), g)
    return kernel.function


def _weight(conv: Conv, tap: int, part: _Part, row: Any, offset: int, origin: Any = 0) -> Any:
    """Where a vector of a part stands in the flat weight, input channels counted from `origin`."""
    channel = origin + part.first + part.at + row
    return (tap * conv.ci + channel) * conv.co + part.group.channel + offset


def _ask_ahead(
    images: Any, size: tuple[int, int, int], image: Any, tile: Any, across: Any, channel: Any
) -> None:
    """Asks for what a tile some rows of tiles below (tile, across) is the first to read.

    `size` are images, rows and columns; after an image comes the next.
    """
    n, height, width = size
    for k in range(4):
        line = T.bind(T.min(image * height + 4 * (tile + _AHEAD) + k, n * height - 1))
        for j in range(4):
            column = T.min(4 * across + j, width - 1)
            prefetch(images, line // height, line % height, column, channel)


# One axis, and the transforms along it


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Tiles along one axis of an image of `size` behind `before` zeros, and zeros after it."""

    before: int
    size: int
    outputs: int

    @property
    def tiles(self) -> int:
        return _count(self.outputs)

    def input(self, tile: Any, offset: int) -> tuple[Any, Any]:
        """Where input `offset` of a tile is, and whether it is in the image (None: always)."""
        at = tile * 4 + (offset - self.before)
        inside = []
        if offset < self.before:
            inside.append(at >= 0)
            at = T.max(at, 0)
        if 4 * (self.tiles - 1) + offset - self.before >= self.size:
            inside.append(tile * 4 + (offset - self.before) < self.size)
            at = T.min(at, self.size - 1)
        return at, _all(inside)

    def output(self, tile: Any, offset: Any) -> tuple[Any, Any]:
        """Where output `offset` of a tile is, and whether it exists (None: always)."""
        at = tile * 4 + offset
        most = offset if isinstance(offset, int) else 3
        if 4 * (self.tiles - 1) + most < self.outputs:
            return at, None
        return T.min(at, self.outputs - 1), at < self.outputs


def _count(outputs: int) -> int:
    return -(-outputs // 4)


def _tiles(conv: Conv) -> int:
    """Tiles of one image."""
    return _count(conv.oh) * _count(conv.ow)


def _all(conditions: Sequence[Any]) -> Any:
    return None if not conditions else T.And(*conditions) if conditions[1:] else conditions[0]


_A, _B = 0.6875, 1.3125
_A2, _B2 = _A * _A, _B * _B
_A3, _B3 = _A2 * _A, _B2 * _B
_AB, _SUM = _A2 * _B2, _A2 + _B2
_KA, _KB = 1 / (2 * _A2 * (_A2 - _B2)), 1 / (2 * _B2 * (_B2 - _A2))


class _Lanes:
    """The five transforms along one axis, of vectors of some lanes."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes

    def times(self, factor: float, value: Any) -> Any:
        return splat(factor, self._lanes) * value

    def input(self, d: Values) -> Values:
        """Bᵀ: 6 → 6."""
        by = self.times
        p, q = T.bind(d[4] - by(_B2, d[2])), T.bind(d[3] - by(_B2, d[1]))
        r, s = T.bind(d[4] - by(_A2, d[2])), T.bind(d[3] - by(_A2, d[1]))
        return _bind(
            by(_AB, d[0]) + (d[4] - by(_SUM, d[2])),
            p + by(_A, q),
            p - by(_A, q),
            r + by(_B, s),
            r - by(_B, s),
            by(_AB, d[1]) + (d[5] - by(_SUM, d[3])),
        )

    def output(self, m: Values) -> Values:
        """Aᵀ: 6 → 4."""
        by = self.times
        s, d, u, e = _bind(m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4])
        return _bind(
            m[0] + s + u,
            by(_A, d) + by(_B, e),
            by(_A2, s) + by(_B2, u),
            by(_A3, d) + (by(_B3, e) + m[5]),
        )

    def weight(self, w: Values) -> Values:
        """G: 3 → 6."""
        by = self.times
        p = T.bind(by(_KA, w[0]) + by(_KA * _A2, w[2]))
        q = T.bind(by(_KB, w[0]) + by(_KB * _B2, w[2]))
        return _bind(
            by(1 / _AB, w[0]),
            p + by(_KA * _A, w[1]),
            p - by(_KA * _A, w[1]),
            q + by(_KB * _B, w[1]),
            q - by(_KB * _B, w[1]),
            w[2],
        )

    def adjoint(self, y: Values) -> Values:
        """A: 4 → 6."""
        by = self.times
        p, q = T.bind(y[0] + by(_A2, y[2])), T.bind(by(_A, y[1]) + by(_A3, y[3]))
        r, s = T.bind(y[0] + by(_B2, y[2])), T.bind(by(_B, y[1]) + by(_B3, y[3]))
        return _bind(y[0], p + q, p - q, r + s, r - s, y[3])

    def gradient(self, m: Values) -> Values:
        """Gᵀ: 6 → 3."""
        by = self.times
        s, d, u, e = _bind(m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4])
        return _bind(
            by(1 / _AB, m[0]) + (by(_KA, s) + by(_KB, u)),
            by(_KA * _A, d) + by(_KB * _B, e),
            by(_KA * _A2, s) + (by(_KB * _B2, u) + m[5]),
        )


def _bind(*values: Any) -> Values:
    return [T.bind(value) for value in values]


def _both(
    transform: Callable[[Values], Values], size: int, source: Callable[[int, int], Any]
) -> Values:
    """The transform of `size` columns, then of the rows that result, row by row."""
    columns = [transform(_bind(*(source(i, j) for i in range(size)))) for j in range(size)]
    rows = [transform([column[i] for column in columns]) for i in range(len(columns[0]))]
    return [value for row in rows for value in row]


# Loops


def _kept(value: Any, lanes: int, *conditions: Any) -> Any:
    """The value, or 0 where a condition does not hold."""
    inside = _all([condition for condition in conditions if condition is not None])
    return value if inside is None else select(inside, value, splat(0.0, lanes))


def _groups(cpu: Cpu, channels: int) -> Iterator[tuple[Any, Any, tuple[int, ...]]]:
    """(number, first channel, lanes of its vectors) of groups of up to two vectors."""
    first = 0
    for segment, widths in channel_groups(channels, cpu.lanes):
        with serial(segment.count) as block:
            yield first + block, segment.at(block), widths
        first += segment.count


def _offsets(widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(number, offset, lanes) of the vectors of a group."""
    return [(v, sum(widths[:v]), lanes) for v, lanes in enumerate(widths)]


@dataclass(frozen=True, kw_only=True)
class _Product:
    """Tiles [n, rows, columns] of an image with ci channels times weights, to co channels."""

    cpu: Cpu
    operands: Operands
    n: int
    ci: int
    co: int
    rows: _Axis
    columns: _Axis

    @property
    def scratch(self) -> dict[str, Any]:
        """Transformed weights of each group of channels; each chunk's inputs and products."""
        dtype = self.operands.dtype
        return {
            "points": ((-(-self.co // self._wide), _POINTS * self._weight_plane), dtype),
            "inputs": ((self._chunks, _POINTS * self._input_plane), dtype),
            "products": (self._chunks, _POINTS * self._output_plane),
        }

    def weights(self, points: Any, source: Callable[..., Any]) -> None:
        """Transforms weights; source(i, j, k, c, lanes) is a vector of tap (i, j)."""
        first = 0
        for segment, widths in channel_groups(self.co, self.cpu.lanes):
            with T.parallel(segment.count * self._depth) as task:
                block, k = task // self._depth, task % self._depth
                for _, offset, lanes in _offsets(widths):
                    channel = segment.at(block) + offset
                    at = k * self._wide + offset
                    found = []
                    for e in range(self.operands.each):
                        c = k * self.operands.each + e
                        taps = lambda i, j: source(i, j, c, channel, lanes)  # noqa: B023, E731
                        found.append(_both(_Lanes(lanes).weight, 3, taps))
                    for p, values in enumerate(zip(*found, strict=True)):
                        value = self.operands.across(values)
                        store(points, value, first + block, p * self._weight_plane + at)
            first += segment.count

    def run(
        self,
        x: Any,
        points: Any,
        inputs: Any,
        products: Any,
        y: Any,
        biased: Callable[[Any, Any, int], Any],
        finish: Epilogue,
        others: Sequence[Any],
    ) -> None:
        """y = biased(x * weights, channel, lanes), finished."""
        for chunk, block in shares(self._tiles // self._block, self._chunks):
            with serial(self._block) as t:
                place = self._place(block * self._block + t)
                for k, lanes in vectors(self.ci, self.cpu.lanes, unroll=1):
                    self._input(x, inputs, chunk, t, place, k, lanes)
                    image, row, column = place
                    size = (self.n, self.rows.size, self.columns.size)
                    _ask_ahead(x, size, image, row, column, k)
            for group, channel, widths in _groups(self.cpu, self.co):
                self._multiply(points, inputs, products, chunk, group, widths)
                with serial(self._block) as t:
                    place = self._place(block * self._block + t)
                    for _, offset, lanes in _offsets(widths):
                        at = t * self._wide + offset
                        values = self._output(products, chunk, at, lanes)
                        for p, value in enumerate(values):
                            with self._existing(place, *divmod(p, 4)) as pixel:
                                result = biased(value, channel + offset, lanes)
                                store(y, result, *pixel, channel + offset)
            if finish is not PLAIN:
                # Of whole pixels, in long runs: a group's would wait for each line of the others.
                for i, t, j in grid(4, self._block, 4):
                    place = self._place(block * self._block + t)
                    with self._existing(place, i, j) as pixel:
                        for channel, lanes in vectors(self.co, self.cpu.lanes):
                            value = load(y, *pixel, channel, lanes=lanes)
                            finish.into(y, others)(value, *pixel, channel)

    def _input(
        self, x: Any, inputs: Any, chunk: Any, t: Any, place: Values, k: Any, lanes: int
    ) -> None:
        image, row, column = place

        def source(i: int, j: int) -> Any:
            (h, above), (w, beside) = self.rows.input(row, i), self.columns.input(column, j)
            return _kept(load(x, image, h, w, k, lanes=lanes), lanes, above, beside)

        for p, value in enumerate(_both(_Lanes(lanes).input, 6, source)):
            at = p * self._input_plane + t * self._depth + k // self.operands.each
            store(inputs, self.operands.along(value), chunk, at)

    def _multiply(
        self, points: Any, inputs: Any, products: Any, chunk: Any, group: Any, widths: Sequence[int]
    ) -> None:
        for tiles in segments(
            self._block, largest_divisor(self._block, 8 if self.cpu.lanes == 16 else 6)
        ):
            for p, part in grid(_POINTS, tiles.count):
                first = tiles.at(part)
                tile = Tile(tiles.size, widths)
                for (k,) in steps(self._depth):
                    at = p * self._weight_plane + k * self._wide
                    self.operands.add_outer(
                        tile,
                        [
                            load(
                                inputs, chunk, p * self._input_plane + (first + r) * self._depth + k
                            )
                            for r in range(tiles.size)
                        ],
                        [load(points, group, at + o, lanes=n) for o, n in tile.vectors()],
                    )
                for r, v, offset, _ in tile.cells():
                    at = p * self._output_plane + (first + r) * self._wide + offset
                    store(products, tile.get(r, v), chunk, at)

    def _output(self, products: Any, chunk: Any, at: Any, lanes: int) -> Values:
        def source(i: int, j: int) -> Any:
            plane = (i * 6 + j) * self._output_plane
            return load(products, chunk, plane + at, lanes=lanes)

        return _both(_Lanes(lanes).output, 6, source)

    @contextmanager
    def _existing(self, place: Values, i: Any, j: Any) -> Iterator[Values]:
        """(image, row, column) of output (i, j) of a tile; what is written is, if it exists."""
        image, row, column = place
        (h, above), (w, beside) = self.rows.output(row, i), self.columns.output(column, j)
        inside = _all([condition for condition in (above, beside) if condition is not None])
        with ExitStack() as stack:
            if inside is not None:
                stack.enter_context(T.If(inside))
                stack.enter_context(T.Then())
            yield [image, h, w]

    def _place(self, tile: Any) -> Values:
        """(image, row, column) of a tile."""
        columns, rows = self.columns.tiles, self.rows.tiles
        return [tile // (rows * columns), tile // columns % rows, tile % columns]

    @property
    def _tiles(self) -> int:
        return self.n * self.rows.tiles * self.columns.tiles

    @property
    def _block(self) -> int:
        """Tiles transformed at once: more where they all need weights that no cache holds, if there
        is enough for all chunks.
        """
        inputs = 4 * _POINTS * self._depth
        large = inputs * self.co > self.cpu.cache >= 40 * inputs
        more = largest_divisor(self._tiles, 32)
        enough = self._tiles // more >= _CHUNKS
        return more if large and enough else largest_divisor(self._tiles)

    @property
    def _chunks(self) -> int:
        return min(_CHUNKS, self._tiles // self._block)

    @property
    def _wide(self) -> int:
        """Output channels at once."""
        return min(self.co, 2 * self.cpu.lanes)

    @property
    def _depth(self) -> int:
        """Elements along the input channels."""
        return self.ci // self.operands.each

    @property
    def _weight_plane(self) -> int:
        return self._depth * self._wide + _PAD

    @property
    def _input_plane(self) -> int:
        return self._block * self._depth + _PAD

    @property
    def _output_plane(self) -> int:
        return self._block * self._wide + _PAD


_ROWS = 16  # input channels that are transformed at once
_MOST = 8  # of them, those whose gradients are found at once, in vectors of 16 lanes
_WIDEST = 32  # output channels of the widest group


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Neighbouring output channels."""

    channel: Any
    widths: tuple[int, ...]

    @property
    def wide(self) -> int:
        """How many."""
        return sum(self.widths)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some input channels and a group of output channels of a gradient: what is found at once.

    `first` … are channels first + at … of the `size` that begin at `first`.
    """

    first: Any
    size: int
    at: Any
    rows: int
    group: _Group

    def cells(self) -> Iterator[tuple[Any, int, int, int]]:
        """(row, tap, offset, lanes) of every vector of its gradient."""
        for (row,) in grid(self.rows):
            for tap, (_, offset, lanes) in product(range(9), _offsets(self.group.widths)):
                yield row, tap, offset, lanes

    def place(self, tap: int, row: Any, offset: int) -> Any:
        """Where such a vector stands in an array of its own."""
        return (tap * self.rows + row) * self.group.wide + offset


@dataclass(frozen=True, kw_only=True)
class _Gradient:
    """Weight gradients, one example after the other in a slot, parts of them in a chunk's scratch.

    A part is in the domain of points only as long as it stays in cache. A slot may hold but one of
    `shares` equal shares of the input channels.
    """

    cpu: Cpu
    operands: Operands = FLOAT32
    conv: Conv
    slots: int
    chunks: int
    shares: int = 1

    @property
    def images(self) -> dict[str, tuple[int, ...]]:
        """What a gradient is made of."""
        conv = self.conv
        return {
            "x": (conv.n, conv.h, conv.w, conv.ci),
            "d": (conv.n, conv.oh, conv.ow, conv.co),
        }

    @property
    def scratch(self) -> dict[str, Any]:
        """Each slot's activations and the adjoints of one group, and each chunk's part of a
        gradient.
        """
        dtype = self.operands.dtype
        return {
            "inputs": ((self.slots, _POINTS * self._input_plane), dtype),
            "adjoints": ((self.slots, _POINTS * self._adjoint_plane), dtype),
            "products": (self.chunks, _POINTS * self._product_plane),
        }

    def inputs(self, x: Any, scratch: Sequence[Any], slot: Any, i: Any, origin: Any = 0) -> None:
        """Activations of example i to the domain of points, channels from `origin` on."""
        rows, columns = self._axes()
        for t, h, ws in self._places(rows, columns):
            for group in segments(self.channels, _ROWS):
                for (block,) in grid(group.count):
                    for offset, lanes in pieces(group.size, self.cpu.lanes):
                        first = group.at(block)
                        at = first * self._depth + t * group.size + offset

                        def activation(w: Any) -> Values:
                            def source(i_: int, j: int) -> Any:
                                (r, above), (c, beside) = rows.input(h, i_), columns.input(w, j)  # noqa: B023
                                value = load(x, i, r, c, origin + first + offset, lanes=lanes)  # noqa: B023
                                return _kept(value, lanes, above, beside)  # noqa: B023

                            return _both(_Lanes(lanes).input, 6, source)  # noqa: B023

                        for p, values in enumerate(zip(*map(activation, ws), strict=True)):
                            value = self.operands.across(values)
                            store(scratch[0], value, slot, p * self._input_plane + at)
                        size = (self.conv.n, rows.size, columns.size)
                        for w in ws:
                            _ask_ahead(x, size, i, h, w, origin + first + offset)

    def adjoints(self, d: Any, scratch: Sequence[Any], slot: Any, i: Any, group: _Group) -> None:
        """Adjoints of example i to the domain of points, of some channels."""
        rows, columns = self._axes()
        for t, h, ws in self._places(rows, columns):
            for _, offset, lanes in _offsets(group.widths):

                def adjoint(w: Any) -> Values:
                    def source(i_: int, j: int) -> Any:
                        (r, above), (c, beside) = rows.output(h, i_), columns.output(w, j)  # noqa: B023
                        value = load(d, i, r, c, group.channel + offset, lanes=lanes)  # noqa: B023
                        return _kept(value, lanes, above, beside)  # noqa: B023

                    return _both(_Lanes(lanes).adjoint, 4, source)  # noqa: B023

                at = t * group.wide + offset
                for p, values in enumerate(zip(*map(adjoint, ws), strict=True)):
                    value = self.operands.across(values)
                    store(scratch[1], value, slot, p * self._adjoint_plane + at)
                size = (self.conv.n, rows.outputs, columns.outputs)
                for w in ws:
                    _ask_ahead(d, size, i, h, w, group.channel + offset)

    def _places(self, rows: _Axis, columns: _Axis) -> Iterator[tuple[Any, Any, list[Any]]]:
        """(number, row, columns) of the tiles of each element."""
        each = self.operands.each
        for group in segments(columns.tiles, each):
            for h, block in grid(rows.tiles, group.count):
                w = group.at(block)
                t = h * -(-columns.tiles // each) + w // each
                yield t, h, [w + e for e in range(group.size)]

    def groups(self) -> Iterator[_Group]:
        """Groups of output channels."""
        for _, channel, widths in _groups(self.cpu, self.conv.co):
            yield _Group(channel=channel, widths=widths)

    def parts(self, group: _Group) -> Iterator[_Part]:
        """All parts of one group of output channels."""
        for some in segments(self.channels, _ROWS):
            for rows in segments(some.size, self.most):
                for block, part in grid(some.count, rows.count):
                    yield _Part(
                        first=some.at(block),
                        size=some.size,
                        at=rows.at(part),
                        rows=rows.size,
                        group=group,
                    )

    def taps(
        self, scratch: Sequence[Any], slot: Any, chunk: Any, part: _Part, slots: int = 1
    ) -> Iterator[tuple[Any, int, int, int, Values]]:
        """(row, vector, its offset, its lanes, 9 taps) of a part of a slot's finished gradient, or
        of the sum of several slots'.
        """
        inputs, adjoints, products = scratch
        wide = part.group.wide
        for (p,) in grid(_POINTS):
            tile = Tile(part.rows, part.group.widths)
            for *others, t in steps(*[slots] * (slots > 1), self._depth):
                own = slot + others[0] if others else slot
                row = part.first * self._depth + t * part.size + part.at
                column = t * wide
                self.operands.add_outer(
                    tile,
                    [load(inputs, own, p * self._input_plane + row + r) for r in range(part.rows)],
                    [
                        load(adjoints, own, p * self._adjoint_plane + column + o, lanes=lanes)
                        for o, lanes in tile.vectors()
                    ],
                )
            for r, v, offset, _ in tile.cells():
                store(products, tile.get(r, v), chunk, p * self._product_plane + r * wide + offset)
        with serial(part.rows) as row:
            for v, offset, lanes in _offsets(part.group.widths):
                at = row * wide + offset

                def source(i: int, j: int) -> Any:
                    plane = (i * 6 + j) * self._product_plane
                    return load(products, chunk, plane + at, lanes=lanes)  # noqa: B023

                yield row, v, offset, lanes, _both(_Lanes(lanes).gradient, 6, source)

    def _axes(self) -> tuple[_Axis, _Axis]:
        conv = self.conv
        top, left = conv.padding[:2]
        return (
            _Axis(before=top, size=conv.h, outputs=conv.oh),
            _Axis(before=left, size=conv.w, outputs=conv.ow),
        )

    @property
    def channels(self) -> int:
        """Input channels of a slot."""
        return self.conv.ci // self.shares

    @property
    def most(self) -> int:
        """Input channels of a part."""
        return _MOST if self.cpu.lanes == 16 else 4

    @property
    def wide(self) -> int:
        """Output channels of the widest part."""
        return min(self.conv.co, 2 * self.cpu.lanes)

    @property
    def _depth(self) -> int:
        """Elements along the tiles."""
        return _count(self.conv.oh) * -(-_count(self.conv.ow) // self.operands.each)

    @property
    def _input_plane(self) -> int:
        return self.channels * self._depth + _PAD

    @property
    def _adjoint_plane(self) -> int:
        return self.wide * self._depth + _PAD

    @property
    def _product_plane(self) -> int:
        return self.most * self.wide + _PAD


@dataclass(frozen=True, kw_only=True)
class Sums:
    """How a sum over examples is dealt out to chunks: each has some examples and input channels.

    A chunk's thread finds all that it reads often in its own cache, for it wrote that itself.
    Channels are divided only where a sum would not fit there: each share takes all adjoints.
    """

    conv: Conv

    @property
    def channel_shares(self) -> int:
        """Shares of the input channels."""
        large = 4 * self.conv.weights > _CACHE
        return math.gcd(self.conv.ci // _ROWS, 4) if large and self.conv.ci % _ROWS == 0 else 1

    @property
    def example_shares(self) -> int:
        """Shares of the examples, each with a total of its own."""
        return min(_CHUNKS // self.channel_shares, self.conv.n)

    @property
    def each(self) -> int:
        """Examples of a share; some have one more."""
        return self.conv.n // self.example_shares

    @property
    def together(self) -> int:
        """Examples that are summed before they go into the total: short chains of additions."""
        wide = self.conv.ci // self.channel_shares + min(self.conv.co, _WIDEST)
        fitting = _CACHE // (4 * _POINTS * _tiles(self.conv) * wide)
        return max(1, min(self.each, max(_CHUNKS, run_length(self.each)), fitting))

    @property
    def runs(self) -> int:
        """Of a share, those of a share with one more example too."""
        return -(-self.each // self.together) + (self.conv.n % self.example_shares > 0)

    def gradient(self, cpu: Cpu, operands: Operands) -> _Gradient:
        """One that has a slot for each example of a chunk's run."""
        chunks = self.example_shares * self.channel_shares
        return _Gradient(
            cpu=cpu,
            operands=operands,
            conv=self.conv,
            slots=chunks * self.together,
            chunks=chunks,
            shares=self.channel_shares,
        )

    def transformed(
        self, gradient: _Gradient, x: Any, scratch: Sequence[Any], totals: Any
    ) -> Iterator[_Run]:
        """All runs of all chunks, transformed; each chunk first clears its part of its total."""

        def clear(chunk: Any, share: Any) -> None:
            size = gradient.channels * self.conv.co
            with serial(9) as tap:
                for at, lanes in vectors(size, gradient.cpu.lanes):
                    place = (tap * self.channel_shares + chunk % self.channel_shares) * size + at
                    store(totals, splat(0.0, lanes), share, place)

        def run(chunk: Any, share: Any, first: Any, size: int) -> _Run:
            origin = chunk % self.channel_shares * gradient.channels
            slot = chunk * self.together
            with serial(size) as i:
                gradient.inputs(x, scratch, slot + i, first + i, origin)
            return _Run(chunk=chunk, share=share, first=first, size=size, slot=slot, origin=origin)

        with T.parallel(self.example_shares * self.channel_shares) as chunk:
            share = chunk // self.channel_shares
            clear(chunk, share)
            for some in segments(self.each, self.together):
                with serial(some.count) as number:
                    yield run(chunk, share, share * self.each + some.at(number), some.size)
        left = self.conv.n % self.example_shares
        if left:
            with T.parallel(left * self.channel_shares) as chunk:
                share = chunk // self.channel_shares
                yield run(chunk, share, self.conv.n - left + share, 1)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Examples first … of a chunk, in its slots from `slot` on, input channels from `origin` on."""

    chunk: Any
    share: Any
    first: Any
    size: int
    slot: Any
    origin: Any

    def parts(self, gradient: _Gradient, d: Any, scratch: Sequence[Any]) -> Iterator[_Part]:
        """All parts, their adjoints transformed."""
        for group in gradient.groups():
            with serial(self.size) as i:
                gradient.adjoints(d, scratch, self.slot + i, self.first + i, group)
            yield from gradient.parts(group)
