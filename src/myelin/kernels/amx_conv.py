"""Convolutions at stride 1 in the tile registers of AMX: sums of `myelin.kernels.amx` over windows.

An image of bfloat16 pairs lies row after row, in planes of 32 channels. So a tile is 16 neighbours
among pixels, from wherever it begins, and another tap of the window sees another such tile, some
pixels on. Where rows are short, tiles run over their ends: what comes out there is not written.

In a gradient pixels are what is summed. Activations are kept in tiles, each a column of channels by
32 pixels; adjoints in pairs of neighbouring pixels, once for each column of the window, because a
pair cannot begin in the middle of another. Rows of the window are rows of pixels further on.

The templates take and give what their namesakes in `myelin.kernels.conv` do, activations without
their border, but for two:

    squared_norm(cpu, conv)       x, d, scratch → s[n], as `stored_gradient` without storing
    weighted_gradient(cpu, conv)  x, d, c[n], scratch → g = Σ_i c_i g_i, as there

Both find the very numbers that `stored_gradient` would store, by the same instructions, so that a
norm bounds what is summed later although nothing is kept in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any, Literal

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels import split
from myelin.kernels.amx import block_sums
from myelin.kernels.bf16 import LANES, TILE, pairs, tile_words, words
from myelin.kernels.conv import bordered_pixels, flat
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.factors import ROUNDED, Factor, Part, Split, kept_once
from myelin.kernels.functions import is_finite
from myelin.kernels.linear import tile_start
from myelin.kernels.stream import Stream
from myelin.kernels.tiles import (
    SquaredNorm,
    add_shares,
    grid,
    largest_divisor,
    segments,
    shares,
)
from myelin.kernels.tir import (
    Kernel,
    blocks,
    load,
    local,
    select,
    serial,
    splat,
    store,
    transposed,
    vectors,
)
from myelin.kernels.window import Conv, Product

_DEPTH = 2 * LANES  # numbers that one instruction sums for each result
_RUN = 48  # instructions in a row for one tile of results, at most: five planes of 3 × 3 taps
_CHUNKS = 8  # parts of the work, each with a scratch of its own
_LARGE = 512 << 10  # bytes of a sum over examples of which there are fewer
_CACHE = 3 << 19  # bytes of a core's own cache, most of them
_PAD = LANES  # between planes: their distance must not be a multiple of a page


@dataclass(frozen=True, kw_only=True)
class TileConv:
    """The templates, of operands that are split so."""

    split: Split

    def can(self, conv: Conv, kind: Product) -> bool:
        """Whether a product can be computed so.

        Not a `weighted_gradient` whose norms are those of Gram matrices: nothing bounds how far it
        is from the exact one. Norms are `squared_norm`'s here.
        """
        whole = conv.ci % LANES == conv.co % LANES == 0
        top, left, bottom, right = conv.padding
        near = max(top, bottom) < conv.kh and max(left, right) < conv.kw
        small = conv.kw * len(self.split.left) <= _RUN
        fits = whole and near and small and conv.stride == (1, 1)
        return fits and kind != "weighted_gradient"

    def forward(self, cpu: Cpu, conv: Conv, *, bias: bool, finish: Epilogue = PLAIN) -> Any:
        """x[n,h,w,ci], w[kh,kw,ci,co], (b[co]), others, scratch… → y[n,oh,ow,co], finished."""
        del cpu
        layer = _forward(self.split, conv)
        output = (conv.n, conv.oh, conv.ow, conv.co)
        shapes = {
            "x": (conv.n, conv.h, conv.w, conv.ci),
            "w": (conv.kh, conv.kw, conv.ci, conv.co),
            **({"b": (conv.co,)} if bias else {}),
            **finish.parameters(output),
            **layer.scratch,
        }
        with Kernel(**shapes, y=output) as kernel, words(), tile_words():
            x, w, *more, packed, weights, y = kernel.buffers
            b, write = more[:bias], finish.into(y, more[bias:])
            layer.pack_weights(w, weights)
            layer.run(x, packed, weights, write, b[0] if b else None)
        return kernel.function

    def backward_data(self, cpu: Cpu, conv: Conv, *, finish: Epilogue = PLAIN) -> Any:
        """d[n,oh,ow,co], w[kh,kw,ci,co], others, scratch… → dx[n,h,w,ci], finished.

        A convolution of d within a border with the weights turned around and their channels
        swapped.
        """
        del cpu
        layer = _backward(self.split, conv)
        image = (conv.n, conv.h, conv.w, conv.ci)
        shapes = {
            "d": (conv.n, conv.oh, conv.ow, conv.co),
            "w": (conv.kh, conv.kw, conv.ci, conv.co),
            **finish.parameters(image),
            **layer.scratch,
        }
        with Kernel(**shapes, dx=image) as kernel, words(), tile_words():
            d, w, *others, packed, weights, dx = kernel.buffers
            layer.pack_turned_weights(w, weights)
            layer.run(d, packed, weights, finish.into(dx, others), None)
        return kernel.function

    def stored_gradient(self, cpu: Cpu, conv: Conv) -> Any:
        """x[n,h,w,ci], d[n,oh,ow,co], scratch… → g[n,kh*kw*ci*co], s[n].

        s_i = ‖g_i‖² of the very numbers that are stored.
        """
        gradient = _Gradient.one_by_one(self.split, conv)
        later = Stream(cpu, n=conv.n, numbers=conv.weights, channels=conv.co)
        results = {"g": (conv.n, conv.weights), "s": (conv.n,)}
        shapes = {**gradient.images, **gradient.scratch, **results}
        with Kernel(**shapes) as kernel, words(), tile_words(), later.scope():
            x, d, *scratch, g, s = kernel.buffers

            def keep(i: Any, at: Any, value: Any) -> None:
                later.store(g, value, i, at)

            gradient.norms(x, d, scratch, s, keep, later.end)
        return kernel.function

    def squared_norm(self, cpu: Cpu, conv: Conv) -> Any:
        """x[n,h,w,ci], d[n,oh,ow,co], scratch… → s[n]: those of `stored_gradient`."""
        del cpu
        gradient = _Gradient.one_by_one(self.split, conv)
        shapes = {**gradient.images, **gradient.scratch, "s": (conv.n,)}
        with Kernel(**shapes) as kernel, words(), tile_words():
            x, d, *scratch, s = kernel.buffers
            gradient.norms(x, d, scratch, s)
        return kernel.function

    def weighted_gradient(self, cpu: Cpu, conv: Conv) -> Any:
        """x[n,h,w,ci], d[n,oh,ow,co], c[n], scratch… → g[kh*kw*ci*co] = Σ_i c_i g_i.

        g_i are those of `stored_gradient`. A number that is not finite adds nothing, so none does
        where c_i is 0, whatever the example holds.
        """
        return self._sum(cpu, conv, weighted=True)

    def batch_gradient(self, cpu: Cpu, conv: Conv) -> Any:
        """x[n,h,w,ci], d[n,oh,ow,co], scratch… → g[kh*kw*ci*co] = Σ_i g_i, for training without
        privacy.
        """
        return self._sum(cpu, conv, weighted=False)

    def weighted_gradient_additions(self, conv: Conv) -> int:
        """Longest chain of float32 operations on a sum over the examples in `weighted_gradient`."""
        shares_ = _Gradient.summed(self.split, conv).chunks
        return 1 + -(-conv.n // shares_) + shares_

    def count(self, conv: Conv, kind: Product | Literal["squared_norm"]) -> Count:
        """What a template does, roughly."""
        match kind:
            case "forward":
                return _forward(self.split, conv).count
            case "backward_data":
                return _backward(self.split, conv).count
            case "stored_gradient":
                return _Gradient.one_by_one(self.split, conv).count(_KEEPING)
            case "squared_norm":
                return _Gradient.one_by_one(self.split, conv).count(_SQUARING)
        sums = _Gradient.summed(self.split, conv).count(_ADDING)
        totals = _Gradient.summed(self.split, conv).chunks * conv.weights
        return replace(
            sums, others=sums.others + 2 * totals // LANES, scratch=sums.scratch + 4 * totals
        )

    def _sum(self, cpu: Cpu, conv: Conv, *, weighted: bool) -> Any:
        gradient = _Gradient.summed(self.split, conv)
        parts = gradient.chunks
        shapes: dict[str, Any] = {
            **gradient.images,
            **({"c": (conv.n,)} if weighted else {}),
            **gradient.scratch,
            "totals": (parts, conv.weights),
            "g": (conv.weights,),
        }
        with Kernel(**shapes) as kernel, words(), tile_words():
            x, d, *more, inputs, adjoints, totals, g = kernel.buffers
            for chunk, first, size in gradient.runs(totals):
                slot = chunk * gradient.together
                with serial(size) as near:
                    gradient.pack(x, d, (inputs, adjoints), slot + near, first + near)
                for place in gradient.places():
                    with serial(size) as near:
                        factor = T.bind(load(more[0], first + near)) if weighted else None
                        for at, values in gradient.found((inputs, adjoints), slot + near, place):
                            for row, value in enumerate(values):
                                term = value
                                if factor is not None:
                                    scaled = T.bind(splat(factor, LANES) * value)
                                    term = select(is_finite(scaled), scaled, splat(0.0, LANES))
                                here = at + row * conv.co
                                total = load(totals, chunk, here, lanes=LANES)
                                store(totals, total + term, chunk, here)
            add_shares(cpu, totals, (parts, conv.kh * conv.kw, conv.ci * conv.co), g)
        return kernel.function


BF16 = TileConv(split=ROUNDED)
BF16X3 = TileConv(split=split.SPLIT)

# Vector instructions for 16 numbers: of packing, of turning a tile, of what becomes of a result
# and, of sums of several runs, for each.
_PACKING, _TURNING, _WRITING, _TOTAL = 6, 6, 6, 3
_KEEPING, _SQUARING, _ADDING = 6, 5, 9


@dataclass(frozen=True, kw_only=True)
class Count:
    """Products of tiles, all other vector instructions, and bytes of scratch."""

    products: int
    others: int
    scratch: int


# Outputs, and adjoints of inputs


def _forward(split: Split, conv: Conv) -> _Layer:
    top, left, bottom, right = conv.padding
    return _Layer(
        split=split,
        n=conv.n,
        rows=(top, conv.h, bottom),
        columns=(left, conv.w, right),
        window=(conv.kh, conv.kw),
        depth=conv.ci,
        channels=conv.co,
    )


def _backward(split: Split, conv: Conv) -> _Layer:
    top, left, bottom, right = conv.padding
    return _Layer(
        split=split,
        n=conv.n,
        rows=(conv.kh - 1 - top, conv.oh, conv.kh - 1 - bottom),
        columns=(conv.kw - 1 - left, conv.ow, conv.kw - 1 - right),
        window=(conv.kh, conv.kw),
        depth=conv.co,
        channels=conv.ci,
    )


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """y[n, row, column, channel] = Σ_taps,depth of images in a border and weights.

    `rows` and `columns` are (zeros, image, zeros).
    """

    split: Split
    n: int
    rows: tuple[int, int, int]
    columns: tuple[int, int, int]
    window: tuple[int, int]
    depth: int
    channels: int

    @property
    def scratch(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """An image of each chunk, and the weights in tiles."""
        parts = len(kept_once(self.split.left))
        images = (_chunks(self.n), parts, self._planes, self._length * LANES + _PAD)
        terms = len(kept_once(self.split.right))
        tiles = (self._planes, *self.window, self._across, terms * TILE)
        return {"packed": (images, "int32"), "weights": (tiles, "int32")}

    @property
    def count(self) -> Count:
        """What it does."""
        terms = len(self.split.left)
        parts = len(kept_once(self.split.left))
        results = self.n * self._count * self._across
        pixels = self.n * sum(self.rows) * self._pitch
        runs = self._steps // self._run
        weights = self._steps * self._across * LANES * parts
        each = _WRITING + _TOTAL * (runs if runs > 1 else 0)
        shapes = [shape for shape, _ in self.scratch.values()]
        return Count(
            products=results * self._steps * terms,
            others=_PACKING * (pixels * self._planes * parts + weights) + LANES * each * results,
            scratch=4 * sum(math.prod(shape) for shape in shapes),
        )

    def pack_weights(self, w: Any, weights: Any) -> None:
        """w[kh, kw, depth, channels]: a tile has 16 pairs of its rows, 16 of its columns."""
        for kh, kw in self._taps():
            read = lambda row, at, lanes: load(w, kh, kw, row, at, lanes=lanes)  # noqa: B023, E731
            factor = Factor(read=read, along=False)
            for at, size in blocks(self.depth, _DEPTH):
                with serial(self._across) as across:
                    for number, part in enumerate(kept_once(self.split.right)):
                        some = factor.part(part)
                        place = (at // _DEPTH, kh, kw, across)
                        with serial(size // 2) as pair:
                            value = some.pairs_of_rows(at + 2 * pair, True, across * LANES, LANES)
                            store(weights, value, *place, number * TILE + pair * LANES)
                        if size < _DEPTH:
                            with serial(LANES - size // 2) as pair:
                                zeros = splat(T.int32(0), LANES)
                                at_ = number * TILE + (size // 2 + pair) * LANES
                                store(weights, zeros, *place, at_)

    def pack_turned_weights(self, w: Any, weights: Any) -> None:
        """w[kh, kw, channels, depth], the window turned around."""
        for kh, kw in self._taps():
            read = lambda row, at, lanes: load(w, kh, kw, row, at, lanes=lanes)  # noqa: B023, E731
            factor = Factor(read=read, along=True)
            turned = (self.window[0] - 1 - kh, self.window[1] - 1 - kw)
            for at, size in blocks(self.depth, _DEPTH):
                with serial(self._across) as across:
                    for number, part in enumerate(kept_once(self.split.right)):
                        some = factor.part(part)
                        lines = [
                            some.pairs_of_row(across * LANES + line, at, size)
                            for line in range(LANES)
                        ]
                        for pair, value in enumerate(transposed(lines)):
                            at_ = number * TILE + pair * LANES
                            store(weights, value, at // _DEPTH, *turned, across, at_)

    def run(self, x: Any, packed: Any, weights: Any, write: Callable[..., None], b: Any) -> None:
        """Packs each image and writes what becomes of it."""
        for chunk, i in shares(self.n, _chunks(self.n)):
            self._pack(x, packed, chunk, i)
            for columns, rows in product(segments(self._across, 2), segments(self._count, 2)):
                for column, row in grid(columns.count, rows.count):
                    own = (rows.at(row), rows.size), (columns.at(column), columns.size)
                    self._block(packed, weights, write, b, chunk, i, *own)

    def _pack(self, x: Any, packed: Any, chunk: Any, i: Any) -> None:
        read = lambda pixel, at, lanes: load(x, i, *pixel, at, lanes=lanes)  # noqa: E731
        factor = Factor(read=read, along=True)
        for h, v, inside in bordered_pixels(self.rows, self.columns):
            place = T.bind((h * self._pitch + v) * LANES)
            pixel = (h - self.rows[0], v - self.columns[0])
            for at, size in blocks(self.depth, _DEPTH):
                for number, part in enumerate(kept_once(self.split.left)):
                    zeros = splat(T.int32(0), LANES)
                    value = factor.part(part).pairs_of_row(pixel, at, size) if inside else zeros
                    store(packed, value, chunk, number, at // _DEPTH, place)

    def _block(
        self,
        packed: Any,
        weights: Any,
        write: Callable[..., None],
        b: Any,
        chunk: Any,
        i: Any,
        rows: tuple[Any, int],
        columns: tuple[Any, int],
    ) -> None:
        """Up to two by two tiles of results."""
        (row, down), (column, across) = rows, columns
        starts = [T.bind(self._start(row + r)) for r in range(down)]
        numbers = _numbers(self.split)

        def left(r: int, first: Any, step: int, term: int) -> Any:
            plane, kh, kw = self._tap(first, step)
            at = (starts[r] + (kh * self._pitch + kw)) * LANES
            return load(packed, chunk, numbers[0][term], plane, at, lanes=TILE)

        def right(c: int, first: Any, step: int, term: int) -> Any:
            at = numbers[1][term] * TILE
            return load(weights, *self._tap(first, step), column + c, at, lanes=TILE)

        room = local(TILE)
        found = block_sums(
            (down, across), self._steps, self._run, len(self.split.left), left, right
        )
        for (r, c), value in found:
            store(room, value, 0)
            channel = (column + c) * LANES
            with serial(LANES) as pixel:
                result = load(room, pixel * LANES, lanes=LANES)
                if b is not None:
                    result = result + load(b, channel, lanes=LANES)
                h, v, inside = self._pixel(row + r, pixel)
                if inside is None:
                    write(result, i, h, v, channel)
                else:
                    with T.If(inside), T.Then():
                        write(result, i, h, v, channel)

    # Steps: planes, then rows and columns of the window. A run has some whole planes or, where the
    # window is large, one of its rows.

    def _tap(self, first: Any, step: int) -> tuple[Any, Any, int]:
        """(plane, row of the window, its column) of a step of the run that begins with `first`."""
        kh, kw = self.window
        if self._planes_of_run:
            plane, tap = divmod(step, kh * kw)
            return first // (kh * kw) + plane, *divmod(tap, kw)
        return first // (kh * kw), first // kw % kh, step

    @property
    def _planes_of_run(self) -> int:
        most = _RUN // (self.window[0] * self.window[1] * len(self.split.left))
        return largest_divisor(self._planes, most) if most else 0

    @property
    def _run(self) -> int:
        """Steps of a run."""
        kh, kw = self.window
        return self._planes_of_run * kh * kw or kw

    @property
    def _steps(self) -> int:
        return self._planes * self.window[0] * self.window[1]

    # Pixels

    @property
    def _pitch(self) -> int:
        """Pixels of a row in its border."""
        return sum(self.columns)

    @property
    def _size(self) -> tuple[int, int]:
        """Rows and columns of results."""
        return sum(self.rows) - self.window[0] + 1, self._pitch - self.window[1] + 1

    @property
    def _by_rows(self) -> int:
        """Tiles of one row of results, 0 if tiles run over the ends of rows."""
        height, width = self._size
        each = -(-width // LANES)
        over = -(-((height - 1) * self._pitch + width) // LANES)
        return each if width >= LANES and height * each <= over else 0

    @property
    def _count(self) -> int:
        """Tiles of an image of results."""
        height, width = self._size
        each = self._by_rows
        return height * each if each else -(-((height - 1) * self._pitch + width) // LANES)

    def _start(self, tile: Any) -> Any:
        """The first pixel of a tile, of the image in its border."""
        if each := self._by_rows:
            return tile // each * self._pitch + tile_start(tile % each, LANES, self._size[1])
        return tile * LANES

    def _pixel(self, tile: Any, number: Any) -> tuple[Any, Any, Any]:
        """(row, column) of a result of a tile, and whether there is one (None: always)."""
        height, width = self._size
        if each := self._by_rows:
            return tile // each, tile_start(tile % each, LANES, width) + number, None
        at = T.bind(tile * LANES + number)
        h, v = at // self._pitch, at % self._pitch
        inside = T.And(h < height, v < width)
        return T.min(h, height - 1), T.min(v, width - 1), inside

    @property
    def _length(self) -> int:
        """Pixels of an image in its border, and as many as the last tile may see."""
        reach = (self.window[0] - 1) * self._pitch + self.window[1] - 1
        return max(sum(self.rows) * self._pitch, self._count * LANES + reach)

    @property
    def _planes(self) -> int:
        return -(-self.depth // _DEPTH)

    @property
    def _across(self) -> int:
        return self.channels // LANES

    def _taps(self) -> Iterator[tuple[Any, Any]]:
        with T.parallel(self.window[0] * self.window[1]) as tap:
            yield tap // self.window[1], tap % self.window[1]


# Gradients


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A block of tiles: the tap of the window, its first tiles of input and output channels, and
    how many there are of each.
    """

    kh: Any
    kw: Any
    row: Any
    column: Any
    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class _Gradient:
    """Weight gradients, examples of a chunk in `together` slots."""

    split: Split
    conv: Conv
    chunks: int
    together: int = 1

    @staticmethod
    def one_by_one(split: Split, conv: Conv) -> _Gradient:
        """Each example's own."""
        return _Gradient(split=split, conv=conv, chunks=_chunks(conv.n))

    @staticmethod
    def summed(split: Split, conv: Conv) -> _Gradient:
        """Sums of as many examples as a cache has room for."""
        large = 4 * conv.weights > _LARGE
        one = _Gradient(split=split, conv=conv, chunks=_chunks(conv.n, large=large))
        fitting = _CACHE // (one.bytes // one.chunks)
        return replace(one, together=max(1, min(conv.n // one.chunks, fitting)))

    @property
    def bytes(self) -> int:
        """Of all slots."""
        return sum(4 * math.prod(shape) for shape, _ in self.scratch.values())

    def count(self, each: int) -> Count:
        """What finding all of them does, with so many instructions for 16 numbers of each."""
        conv, terms = self.conv, len(self.split.left)
        parts = len(kept_once(self.split.left))
        results = conv.n * self._inputs * self._outputs * conv.kh * conv.kw
        runs = -(-self._steps // self._run)
        each += _TOTAL * (runs if runs > 1 else 0)
        activations = self._inputs * self._positions // 2 * (_PACKING + _TURNING)
        adjoints = self._outputs * self._positions // 2 * conv.kw * _PACKING
        return Count(
            products=results * self._steps * terms,
            others=conv.n * parts * (activations + adjoints) + LANES * each * results,
            scratch=self.bytes,
        )

    @property
    def images(self) -> dict[str, Any]:
        """What a gradient is made of."""
        conv = self.conv
        return {
            "x": (conv.n, conv.h, conv.w, conv.ci),
            "d": (conv.n, conv.oh, conv.ow, conv.co),
        }

    @property
    def scratch(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Activations and adjoints of each slot."""
        slots = self.chunks * self.together
        left, right = (len(kept_once(side)) for side in (self.split.left, self.split.right))
        inputs = (slots, left, self._inputs, self._input_plane)
        adjoints = (slots, right, self.conv.kw, self._outputs, self._adjoint_plane)
        return {"inputs": (inputs, "int32"), "adjoints": (adjoints, "int32")}

    def norms(
        self,
        x: Any,
        d: Any,
        scratch: Sequence[Any],
        s: Any,
        keep: Callable[[Any, Any, Any], None] | None = None,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        """Finds the gradients one after the other and their squared norms.

        keep(i, at, values) is told of each, then `end` of its end.
        """
        conv = self.conv
        for chunk, i in shares(conv.n, self.chunks):
            self.pack(x, d, scratch, chunk, i)
            norm = SquaredNorm()
            with norm.part((LANES,)) as add:
                for place in self.places():
                    for at, values in self.found(scratch, chunk, place):
                        if keep is not None:
                            for row, value in enumerate(values):
                                keep(i, at + row * conv.co, value)
                        add(0, values)
            norm.store(s, i, conv.weights)
            end()

    def runs(self, totals: Any) -> Iterator[tuple[Any, Any, int]]:
        """(chunk, first example, examples) of sums; each chunk first clears its total."""
        each, left = divmod(self.conv.n, self.chunks)
        with T.parallel(self.chunks) as chunk:
            for at, lanes in vectors(self.conv.weights, LANES):
                store(totals, splat(0.0, lanes), chunk, at)
            for some in segments(each, self.together):
                with serial(some.count) as number:
                    yield chunk, chunk * each + some.at(number), some.size
        if left:
            with T.parallel(left) as chunk:
                yield chunk, self.conv.n - left + chunk, 1

    def pack(self, x: Any, d: Any, scratch: Sequence[Any], slot: Any, i: Any) -> None:
        """Example i into a slot."""
        conv, (inputs, adjoints) = self.conv, scratch
        for number, part in enumerate(kept_once(self.split.left)):
            size = (conv.h, conv.w, self._inputs)
            self._pack(x, part, i, size, (0, 0), inputs, (slot, number), self._positions)
            with serial(self._inputs) as channel, serial(self._steps) as step:
                places = [
                    (slot, number, channel, step * TILE + row * LANES) for row in range(LANES)
                ]
                rows = [load(inputs, *place, lanes=LANES) for place in places]
                for place, row in zip(places, transposed(rows), strict=True):
                    store(inputs, row, *place)
        for number, part in enumerate(kept_once(self.split.right)):
            for kw in range(conv.kw):
                size = (conv.oh, conv.ow, self._outputs)
                before = (conv.kh - 1 - conv.padding[0], kw - conv.padding[1])
                positions = self._positions + (conv.kh - 1) * self._pitch
                self._pack(d, part, i, size, before, adjoints, (slot, number, kw), positions)

    def _pack(
        self,
        image: Any,
        part: Part,
        i: Any,
        size: tuple[int, int, int],
        before: tuple[int, int],
        packed: Any,
        here: tuple[Any, ...],
        positions: int,
    ) -> None:
        """Pairs of neighbours of an image, `before` it so many rows and columns of zeros (fewer
        than none: columns are left out); of `size` rows, columns and tiles of channels.
        """
        height, width, channels = size
        half = self._pitch // 2

        def zeros(first: Any, count: int) -> None:
            if count:
                with serial(count) as at, serial(channels) as channel:
                    value = splat(T.int32(0), LANES)
                    store(packed, value, *here, channel, (first + at) * LANES)

        zeros(0, before[0] * half)
        with serial(height) as h:
            row = T.bind((before[0] + h) * half)
            for first, count, inside in self._pairs(width, before[1]):
                with serial(count) as near, serial(channels) as channel:
                    column = 2 * (first + near) - before[1]
                    even, odd = (
                        part(load(image, i, h, column + o, channel * LANES, lanes=LANES), LANES)
                        if inside[o]
                        else splat(0.0, LANES)
                        for o in (0, 1)
                    )
                    store(packed, pairs(even, odd), *here, channel, (row + first + near) * LANES)
        first = (before[0] + height) * half
        zeros(first, positions // 2 - first)

    def _pairs(self, width: int, before: int) -> Iterator[tuple[int, int, tuple[bool, bool]]]:
        """(first pair, pairs, whether even and odd ones are in the image) along a row."""

        def inside(pair: int) -> tuple[bool, bool]:
            column = 2 * pair - before
            return 0 <= column < width, 0 <= column + 1 < width

        for found, group in groupby(range(self._pitch // 2), key=inside):
            some = list(group)
            yield some[0], len(some), found

    def places(self) -> Iterator[_Place]:
        """All blocks of up to two by two tiles of a gradient, each tile once."""
        for rows, columns in product(segments(self._inputs, 2), segments(self._outputs, 2)):
            for row, column, kh, kw in grid(rows.count, columns.count, self.conv.kh, self.conv.kw):
                yield _Place(
                    kh=kh,
                    kw=kw,
                    row=rows.at(row),
                    column=columns.at(column),
                    shape=(rows.size, columns.size),
                )

    def found(
        self, scratch: Sequence[Any], slot: Any, place: _Place
    ) -> Iterator[tuple[Any, list[Any]]]:
        """(where its first row stands in the weight, 16 rows) of each tile of a block."""
        inputs, adjoints = scratch
        numbers = _numbers(self.split)
        below = T.bind((self.conv.kh - 1 - place.kh) * (self._pitch // 2))

        def left(r: int, first: Any, step: int, term: int) -> Any:
            at = (first + step) * TILE
            return load(inputs, slot, numbers[0][term], place.row + r, at, lanes=TILE)

        def right(c: int, first: Any, step: int, term: int) -> Any:
            at = (below + (first + step) * LANES) * LANES
            here = (slot, numbers[1][term], place.kw, place.column + c)
            return load(adjoints, *here, at, lanes=TILE)

        room = local(TILE)
        terms = len(self.split.left)
        for (r, c), value in block_sums(place.shape, self._steps, self._run, terms, left, right):
            store(room, value, 0)
            channels = (place.row + r) * LANES, (place.column + c) * LANES
            at = T.bind(flat(self.conv, place.kh, place.kw, *channels))
            yield at, [T.bind(load(room, k * LANES, lanes=LANES)) for k in range(LANES)]

    @property
    def _inputs(self) -> int:
        return self.conv.ci // LANES

    @property
    def _outputs(self) -> int:
        return self.conv.co // LANES

    @property
    def _pitch(self) -> int:
        """Pixels of a row, an even number."""
        return self.conv.w + self.conv.w % 2

    @property
    def _steps(self) -> int:
        return -(-self.conv.h * self._pitch // _DEPTH)

    @property
    def _run(self) -> int:
        """Steps of a run."""
        runs = -(-self._steps * len(self.split.left) // _RUN)
        return -(-self._steps // runs)

    @property
    def _positions(self) -> int:
        """Pixels that are summed, with zeros after the last."""
        return self._steps * _DEPTH

    @property
    def _input_plane(self) -> int:
        return self._positions // 2 * LANES + _PAD

    @property
    def _adjoint_plane(self) -> int:
        return (self._positions + (self.conv.kh - 1) * self._pitch) // 2 * LANES + _PAD


def _chunks(n: int, *, large: bool = False) -> int:
    return min(n, _CHUNKS // 2 if large else _CHUNKS)


def _numbers(split: Split) -> tuple[list[int], list[int]]:
    """Which of the kept parts stands in each term, of left and right factors."""
    left, right = (
        [kept_once(side).index(part) for part in side] for side in (split.left, split.right)
    )
    return left, right
