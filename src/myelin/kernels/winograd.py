"""Convolutions of 3 × 3 at stride 1 by Winograd's F(4 × 4, 3 × 3), in float32.

Outputs are cut into tiles of 4 × 4, each of which sees 6 × 6 inputs. In the domain of 36 points a
convolution is 36 matrix products, with 2.25 multiplications an output and channel instead of 9:

    y = Aᵀ[(G w Gᵀ) · (Bᵀ x B)]A        g = Gᵀ[(Bᵀ x B) · (A d Aᵀ)]G

(Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016.) The points are 0,
±0.6875, ±1.3125 and infinity: against the usual 0, ±1, ±2 the largest errors are about a quarter,
and all coefficients without a division are exact in float32.

The templates are those of `myelin.kernels.conv` with the same arguments; scratch may be several
vectors. Every size is right; `suits` says where they are worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.tiles import SquaredNorm, Tile, channel_groups, grid, segments, steps
from myelin.kernels.tir import Kernel, load, pieces, select, serial, splat, store, vectors
from myelin.kernels.window import Conv

Values = list[Any]

_POINTS = 36
_CHUNKS = 8  # parts of the batch, each with a scratch of its own
_SUMS = 4  # parts of the batch that are summed on their own
_PAD = 16  # floats between planes: their distance must not be a multiple of a page
_LARGEST = 1 << 20  # floats of one example in the domain of points, so that it stays in cache


def suits(cpu: Cpu, conv: Conv) -> bool:
    """Whether outputs and adjoints of this convolution are found faster this way than directly."""
    ragged = _ragged(conv.oh) * _ragged(conv.ow)
    tiles = _block(conv.n * _count(conv.oh) * _count(conv.ow))
    return (
        (conv.kh, conv.kw, conv.stride) == (3, 3, (1, 1))
        and max(conv.padding) <= 2
        and min(conv.ci, conv.co) >= cpu.lanes
        and ragged <= 2
        and tiles >= 4
    )


def suits_gradient(cpu: Cpu, conv: Conv) -> bool:
    """Whether stored gradients are found faster this way: not of few tiles, nor of large images.

    Measured at 4 tiles: 1.3 and 1.6 times as fast as directly (128 to 256 and 256 to 256 channels).
    """
    tiles = _count(conv.oh) * _count(conv.ow)
    return suits(cpu, conv) and tiles >= 4 and _POINTS * tiles * (conv.ci + conv.co) <= _LARGEST


# Kernels


def forward(cpu: Cpu, conv: Conv, *, bias: bool) -> Any:
    """xp[n,hp,wp,ci], w[3,3,ci,co], (b[co]), scratch… → y[n,oh,ow,co]."""
    rows = _Axis(before=0, size=conv.hp, outputs=conv.oh)
    columns = _Axis(before=0, size=conv.wp, outputs=conv.ow)
    layer = _Product(cpu=cpu, n=conv.n, ci=conv.ci, co=conv.co, rows=rows, columns=columns)
    shapes = {
        "xp": (conv.n, conv.hp, conv.wp, conv.ci),
        "w": (3, 3, conv.ci, conv.co),
        **({"b": (conv.co,)} if bias else {}),
        **layer.scratch,
    }
    with Kernel(**shapes, y=(conv.n, conv.oh, conv.ow, conv.co)) as kernel:
        xp, w, *b, points, inputs, products, y = kernel.buffers
        layer.weights(points, lambda i, j, k, c, lanes: load(w, i, j, k, c, lanes=lanes))

        def finish(value: Any, channel: Any, lanes: int) -> Any:
            return value + load(b[0], channel, lanes=lanes) if b else value

        layer.run(xp, points, inputs, products, y, finish)
    return kernel.function


def backward_data(cpu: Cpu, conv: Conv) -> Any:
    """d[n,oh,ow,co], w[3·3·ci·co], scratch… → dx[n,h,w,ci].

    A convolution of d within a border with the weights turned around and their channels swapped.
    """
    top, left = conv.padding[:2]
    rows = _Axis(before=2 - top, size=conv.oh, outputs=conv.h)
    columns = _Axis(before=2 - left, size=conv.ow, outputs=conv.w)
    layer = _Product(cpu=cpu, n=conv.n, ci=conv.co, co=conv.ci, rows=rows, columns=columns)
    shapes = {
        "d": (conv.n, conv.oh, conv.ow, conv.co),
        "w": (conv.weights,),
        **layer.scratch,
    }
    with Kernel(**shapes, dx=(conv.n, conv.h, conv.w, conv.ci)) as kernel:
        d, w, points, inputs, products, dx = kernel.buffers

        def turned(i: int, j: int, co: Any, ci: Any, lanes: int) -> Any:
            at = (((2 - i) * 3 + 2 - j) * conv.ci + ci) * conv.co + co
            return w[T.Ramp(at, conv.co, lanes)] if lanes > 1 else w[at]

        layer.weights(points, turned)
        layer.run(d, points, inputs, products, dx, lambda value, _channel, _lanes: value)
    return kernel.function


def stored_gradient(cpu: Cpu, conv: Conv) -> Any:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], scratch… → g[n,3·3·ci·co], s[n].

    s_i = ‖g_i‖² of the very numbers that are stored.
    """
    gradient = _Gradient(cpu=cpu, conv=conv, chunks=min(conv.n, _CHUNKS))
    results = {"g": (conv.n, conv.weights), "s": (conv.n,)}
    with Kernel(**gradient.images, **gradient.scratch, **results) as kernel:
        xp, d, *scratch, g, s = kernel.buffers
        for chunk, i in _shares(conv.n, gradient.chunks):
            gradient.transform(xp, d, scratch, chunk, i)
            norm = SquaredNorm()
            for co, widths in gradient.groups():
                with norm.part(widths) as add:
                    for ci, v, offset, _, taps in gradient.vectors(scratch, chunk, co, widths):
                        for tap, value in enumerate(taps):
                            store(g, value, i, (tap * conv.ci + ci) * conv.co + co + offset)
                        add(v, taps)
            norm.store(s, i, conv.weights)
    return kernel.function


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

    def output(self, tile: Any, offset: int) -> tuple[Any, Any]:
        """Where output `offset` of a tile is, and whether it exists (None: always)."""
        at = tile * 4 + offset
        if 4 * (self.tiles - 1) + offset < self.outputs:
            return at, None
        return T.min(at, self.outputs - 1), at < self.outputs


def _count(outputs: int) -> int:
    return -(-outputs // 4)


def _ragged(outputs: int) -> float:
    """Outputs computed for each that is there."""
    return 4 * _count(outputs) / outputs


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


def _shares(count: int, chunks: int) -> Iterator[tuple[Any, Any]]:
    """(chunk, number) of 0 … count - 1, dealt out to parallel chunks that the shape fixes."""
    each, left = divmod(count, chunks)
    with T.parallel(chunks) as chunk, serial(each) as i:
        yield chunk, chunk * each + i
    if left:
        with T.parallel(left) as chunk:
            yield chunk, count - left + chunk


def _block(tiles: int, most: int = 16) -> int:
    """The largest divisor of `tiles` up to `most`."""
    return max(size for size in range(1, most + 1) if tiles % size == 0)


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
    n: int
    ci: int
    co: int
    rows: _Axis
    columns: _Axis

    @property
    def scratch(self) -> dict[str, tuple[int, ...]]:
        """Transformed weights of each group of channels; each chunk's inputs and products."""
        return {
            "points": (-(-self.co // self._wide), _POINTS * self._weight_plane),
            "inputs": (self._chunks, _POINTS * self._input_plane),
            "products": (self._chunks, _POINTS * self._output_plane),
        }

    def weights(self, points: Any, source: Callable[..., Any]) -> None:
        """Transforms weights; source(i, j, k, c, lanes) is a vector of tap (i, j)."""
        first = 0
        for segment, widths in channel_groups(self.co, self.cpu.lanes):
            with T.parallel(segment.count * self.ci) as task:
                block, k = task // self.ci, task % self.ci
                for _, offset, lanes in _offsets(widths):
                    channel = segment.at(block) + offset
                    taps = lambda i, j: source(i, j, k, channel, lanes)  # noqa: B023, E731
                    at = k * self._wide + offset
                    for p, value in enumerate(_both(_Lanes(lanes).weight, 3, taps)):
                        store(points, value, first + block, p * self._weight_plane + at)
            first += segment.count

    def run(
        self,
        x: Any,
        points: Any,
        inputs: Any,
        products: Any,
        y: Any,
        finish: Callable[[Any, Any, int], Any],
    ) -> None:
        """y = finish(x * weights, channel, lanes)."""
        for chunk, block in _shares(self._tiles // self._block, self._chunks):
            with serial(self._block) as t:
                place = self._place(block * self._block + t)
                for k, lanes in vectors(self.ci, self.cpu.lanes, unroll=1):
                    self._input(x, inputs, chunk, t, place, k, lanes)
            for group, channel, widths in _groups(self.cpu, self.co):
                self._multiply(points, inputs, products, chunk, group, widths)
                with serial(self._block) as t:
                    place = self._place(block * self._block + t)
                    for _, offset, lanes in _offsets(widths):
                        at = t * self._wide + offset
                        values = self._output(products, chunk, at, lanes)
                        self._finish(y, values, place, channel + offset, lanes, finish)

    def _input(
        self, x: Any, inputs: Any, chunk: Any, t: Any, place: Values, k: Any, lanes: int
    ) -> None:
        image, row, column = place

        def source(i: int, j: int) -> Any:
            (h, above), (w, beside) = self.rows.input(row, i), self.columns.input(column, j)
            return _kept(load(x, image, h, w, k, lanes=lanes), lanes, above, beside)

        for p, value in enumerate(_both(_Lanes(lanes).input, 6, source)):
            store(inputs, value, chunk, p * self._input_plane + t * self.ci + k)

    def _multiply(
        self, points: Any, inputs: Any, products: Any, chunk: Any, group: Any, widths: Sequence[int]
    ) -> None:
        for tiles in segments(self._block, _block(self._block, 8 if self.cpu.lanes == 16 else 6)):
            for p, part in grid(_POINTS, tiles.count):
                first = tiles.at(part)
                tile = Tile(tiles.size, widths)
                for (k,) in steps(self.ci):
                    at = p * self._weight_plane + k * self._wide
                    tile.add_outer(
                        [
                            load(inputs, chunk, p * self._input_plane + (first + r) * self.ci + k)
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

    def _finish(
        self,
        y: Any,
        values: Values,
        place: Values,
        channel: Any,
        lanes: int,
        finish: Callable[[Any, Any, int], Any],
    ) -> None:
        image, row, column = place
        for (i, j), value in zip(product(range(4), range(4)), values, strict=True):
            (h, above), (w, beside) = self.rows.output(row, i), self.columns.output(column, j)
            result = finish(value, channel, lanes)
            inside = _all([condition for condition in (above, beside) if condition is not None])
            if inside is None:
                store(y, result, image, h, w, channel)
            else:
                with T.If(inside), T.Then():
                    store(y, result, image, h, w, channel)

    def _place(self, tile: Any) -> Values:
        """(image, row, column) of a tile."""
        columns, rows = self.columns.tiles, self.rows.tiles
        return [tile // (rows * columns), tile // columns % rows, tile % columns]

    @property
    def _tiles(self) -> int:
        return self.n * self.rows.tiles * self.columns.tiles

    @property
    def _block(self) -> int:
        """Tiles transformed at once."""
        return _block(self._tiles)

    @property
    def _chunks(self) -> int:
        return min(_CHUNKS, self._tiles // self._block)

    @property
    def _wide(self) -> int:
        """Output channels at once."""
        return min(self.co, 2 * self.cpu.lanes)

    @property
    def _weight_plane(self) -> int:
        return self.ci * self._wide + _PAD

    @property
    def _input_plane(self) -> int:
        return self._block * self.ci + _PAD

    @property
    def _output_plane(self) -> int:
        return self._block * self._wide + _PAD


_ROWS = 16  # input channels whose gradients are in the domain of points at once


@dataclass(frozen=True, kw_only=True)
class _Gradient:
    """The weight gradient of one example after the other, of each chunk its own."""

    cpu: Cpu
    conv: Conv
    chunks: int

    @property
    def images(self) -> dict[str, tuple[int, ...]]:
        """What a gradient is made of."""
        conv = self.conv
        return {
            "xp": (conv.n, conv.hp, conv.wp, conv.ci),
            "d": (conv.n, conv.oh, conv.ow, conv.co),
        }

    @property
    def scratch(self) -> dict[str, tuple[int, ...]]:
        """Each chunk's activations and adjoints, and a block of its gradient."""
        return {
            "inputs": (self.chunks, _POINTS * self._input_plane),
            "adjoints": (self.chunks, _POINTS * self._adjoint_plane),
            "products": (self.chunks, _POINTS * self._product_plane),
        }

    def transform(self, xp: Any, d: Any, scratch: Sequence[Any], chunk: Any, i: Any) -> None:
        """Activations and adjoints of example i to the domain of points."""
        conv, tiles = self.conv, self._tiles
        inputs, adjoints, _ = scratch
        rows, columns = self._axes()
        for group in segments(conv.ci, _ROWS):
            for block, h, w in grid(group.count, rows.tiles, columns.tiles):
                t = h * columns.tiles + w
                for offset, lanes in pieces(group.size, self.cpu.lanes):
                    first = group.at(block)
                    at = first * tiles + t * group.size + offset

                    def activation(i_: int, j: int) -> Any:
                        (r, above), (c, beside) = rows.input(h, i_), columns.input(w, j)  # noqa: B023
                        value = load(xp, i, r, c, first + offset, lanes=lanes)  # noqa: B023
                        return _kept(value, lanes, above, beside)  # noqa: B023

                    for p, value in enumerate(_both(_Lanes(lanes).input, 6, activation)):
                        store(inputs, value, chunk, p * self._input_plane + at)
        for _, channel, widths in _groups(self.cpu, conv.co):
            for h, w in grid(rows.tiles, columns.tiles):
                t = h * columns.tiles + w
                for _, offset, lanes in _offsets(widths):
                    at = channel * tiles + t * sum(widths) + offset

                    def adjoint(i_: int, j: int) -> Any:
                        (r, above), (c, beside) = rows.output(h, i_), columns.output(w, j)  # noqa: B023
                        value = load(d, i, r, c, channel + offset, lanes=lanes)  # noqa: B023
                        return _kept(value, lanes, above, beside)  # noqa: B023

                    for p, value in enumerate(_both(_Lanes(lanes).adjoint, 4, adjoint)):
                        store(adjoints, value, chunk, p * self._adjoint_plane + at)

    def groups(self) -> Iterator[tuple[Any, tuple[int, ...]]]:
        """(first output channel, lanes of its vectors) of each group for `vectors`."""
        for _, channel, widths in _groups(self.cpu, self.conv.co):
            yield channel, widths

    def vectors(
        self, scratch: Sequence[Any], chunk: Any, channel: Any, widths: Sequence[int]
    ) -> Iterator[tuple[Any, int, int, int, Values]]:
        """(input channel, vector, its offset, its lanes, 9 taps) of a group's finished gradient."""
        inputs, adjoints, products = scratch
        wide, most = sum(widths), 8 if self.cpu.lanes == 16 else 6
        for group in segments(self.conv.ci, _ROWS):
            with serial(group.count) as block:
                first = group.at(block)
                for rows in segments(group.size, most):
                    for p, part in grid(_POINTS, rows.count):
                        tile = Tile(rows.size, widths)
                        for (t,) in steps(self._tiles):
                            row = first * self._tiles + t * group.size + rows.at(part)
                            column = channel * self._tiles + t * wide
                            tile.add_outer(
                                [
                                    load(inputs, chunk, p * self._input_plane + row + r)
                                    for r in range(rows.size)
                                ],
                                [
                                    load(
                                        adjoints,
                                        chunk,
                                        p * self._adjoint_plane + column + o,
                                        lanes=lanes,
                                    )
                                    for o, lanes in tile.vectors()
                                ],
                            )
                        for r, v, offset, _ in tile.cells():
                            at = p * self._product_plane + (rows.at(part) + r) * wide + offset
                            store(products, tile.get(r, v), chunk, at)
                with serial(group.size) as row:
                    for v, offset, lanes in _offsets(widths):
                        at = row * wide + offset

                        def source(i: int, j: int) -> Any:
                            plane = (i * 6 + j) * self._product_plane
                            return load(products, chunk, plane + at, lanes=lanes)  # noqa: B023

                        taps = _both(_Lanes(lanes).gradient, 6, source)
                        yield first + row, v, offset, lanes, taps

    def _axes(self) -> tuple[_Axis, _Axis]:
        conv = self.conv
        return (
            _Axis(before=0, size=conv.hp, outputs=conv.oh),
            _Axis(before=0, size=conv.wp, outputs=conv.ow),
        )

    @property
    def _tiles(self) -> int:
        return _count(self.conv.oh) * _count(self.conv.ow)

    @property
    def _input_plane(self) -> int:
        return self.conv.ci * self._tiles + _PAD

    @property
    def _adjoint_plane(self) -> int:
        return self.conv.co * self._tiles + _PAD

    @property
    def _product_plane(self) -> int:
        return _ROWS * min(self.conv.co, 2 * self.cpu.lanes) + _PAD
