"""Convolutions in mixed precision: products of `myelin.kernels.conv` on bfloat16 operands.

Arguments, results, sums and norms are float32; both factors of a product are rounded to bfloat16
when they are packed into scratch (`myelin.kernels.bf16`), by Winograd after they are transformed.
Every template takes and gives what its namesake in `conv` does.

`stored_gradient` takes norms of the very numbers that it stores, so that its bounds are the same.
The templates that are missing here, `gram_norm` and `weighted_gradient`, stay in float32: a bound
for the rounding of operands would make a Gram norm useless. `batch_gradient` is there by Winograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels import conv as plain
from myelin.kernels import winograd
from myelin.kernels.bf16 import LANES, add_outer, filled, neighbours, pairs, words
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.operands import BF16
from myelin.kernels.stream import Stream
from myelin.kernels.tiles import SquaredNorm, Tile, grid, segments, steps
from myelin.kernels.tir import Kernel, blocks, load, local, serial, splat, store
from myelin.kernels.window import Conv, Product

__all__ = ["Winograd", "backward_data", "can", "forward", "stored_gradient"]


def can(conv: Conv, kind: Product) -> bool:
    """Whether a product can be computed so: numbers must come in pairs along what is summed.

    Outputs are sums along rows of a window, adjoints along output channels; stored gradients along
    rows of the output, of which an odd one is paired with zeros.
    """
    if kind == "forward":
        steps_ = (conv.wp * conv.ci, conv.kw * conv.ci, conv.stride[1] * conv.ci)
        return all(step % 2 == 0 for step in steps_)
    return kind == "stored_gradient" or (kind == "backward_data" and conv.co % 2 == 0)


class Winograd:
    """The same templates by Winograd.

    Inputs and weights are rounded in the domain of points, so that errors are larger than those of
    rounding directly (tests/kernels/test_mixed_conv.py has their limits). Tiles of 2 × 2 outputs
    would be more exact, but take 16 products for 4 outputs in place of 36 for 16, which uses up
    what bfloat16 gains.
    """

    forward = staticmethod(partial(winograd.forward, operands=BF16))
    backward_data = staticmethod(partial(winograd.backward_data, operands=BF16))
    stored_gradient = staticmethod(partial(winograd.stored_gradient, operands=BF16))
    batch_gradient = staticmethod(partial(winograd.batch_gradient, operands=BF16))

    @staticmethod
    def can(conv: Conv, kind: Product) -> bool:
        """Whether a product can be computed so: channels come in whole vectors."""
        whole = conv.ci % LANES == conv.co % LANES == 0
        return kind != "weighted_gradient" and whole and winograd.can(conv, kind)


def forward(
    cpu: Cpu,
    conv: Conv,
    *,
    bias: bool,
    finish: Epilogue = PLAIN,
) -> Any:
    """xp[n,hp,wp,ci], w[kh,kw,ci,co], (b[co]), others, scratch… → y[n,oh,ow,co], finished.

    A row of a window, kw · ci numbers, lies together in memory, and so do its pairs.
    """
    row, window = conv.wp * conv.ci, conv.kw * conv.ci
    sh, step = conv.stride[0], conv.stride[1] * conv.ci // 2
    shapes: dict[str, Any] = {"xp": (conv.n, conv.hp, row), "w": (conv.kh, window, conv.co)}
    shapes |= {"b": (conv.co,)} if bias else {}
    output = (conv.n, conv.oh, conv.ow, conv.co)
    shapes |= finish.parameters(output)
    shapes["packed"] = ((conv.n, conv.hp, _whole(row // 2)), "int32")
    shapes["weights"] = ((conv.kh, window // 2, _whole(conv.co)), "int32")
    with Kernel(**shapes, y=output) as kernel, words():
        xp, w, *more, packed, weights, y = kernel.buffers
        b, write = more[:bias], finish.into(y, more[bias:])
        with T.parallel(conv.kh) as kh, serial(window // 2) as pair:
            for at, size in blocks(conv.co, LANES):
                even, odd = (_reader(w, kh, 2 * pair + o) for o in (0, 1))
                value = pairs(filled(even, at, size), filled(odd, at, size))
                store(weights, value, kh, pair, at)
        with T.parallel(conv.n) as i:
            with serial(conv.hp) as h:
                _pack_row(_reader(xp, i, h), row, packed, i, h)
            for co, lanes in _channels(conv.co):
                for oh, ow, block in plain.pixel_blocks(cpu, conv.oh, conv.ow, _wide(lanes)):
                    tile = Tile(len(block), _wide(lanes))
                    pixels = [(oh + h, ow + v) for h, v in block]
                    if b:
                        for at, vector, offset, _ in tile.cells():
                            tile.set(at, vector, filled(_reader(b[0]), co + offset, lanes[vector]))
                    for kh, pair in steps(conv.kh, window // 2):
                        add_outer(
                            tile,
                            [load(packed, i, h * sh + kh, v * step + pair) for h, v in pixels],
                            [
                                load(weights, kh, pair, co + o, lanes=LANES)
                                for o, _ in tile.vectors()
                            ],
                        )
                    for at, vector, offset, _ in tile.cells():
                        value = tile.get(at, vector, lanes[vector])
                        write(value, i, *pixels[at], co + offset)
    return kernel.function


def backward_data(cpu: Cpu, conv: Conv, *, finish: Epilogue = PLAIN) -> Any:
    """d[n,oh,ow,co], w[kh,kw,ci,co], others, scratch… → dx[n,h,w,ci], finished.

    Pairs lie along co.
    """
    rows, columns = plain.axes(conv)
    half = conv.co // 2
    line = conv.ow * conv.co
    image = (conv.n, conv.h, conv.w, conv.ci)
    shapes: dict[str, Any] = {
        "d": (conv.n, conv.oh, line),
        "w": (conv.kh, conv.kw, conv.ci, conv.co),
        **finish.parameters(image),
        "packed": ((conv.n, conv.oh, _whole(line // 2)), "int32"),
        "bordered": ((conv.n, rows.length, columns.length, half), "int32"),
        "turned": ((conv.kh, conv.kw, half, _whole(conv.ci)), "int32"),
    }
    with Kernel(**shapes, dx=image) as kernel, words():
        d, w, *others, packed, bordered, turned, dx = kernel.buffers
        write = finish.into(dx, others)
        with T.parallel(conv.kh * conv.kw) as tap:
            kh, kw = tap // conv.kw, tap % conv.kw
            at = (conv.kh - 1 - kh, conv.kw - 1 - kw)
            room = local(LANES, dtype="int32")
            for (co,) in grid(half):
                for ci, _ in blocks(_whole(conv.ci), LANES):
                    store(turned, splat(T.int32(0), LANES), *at, co, ci)
            with serial(conv.ci) as ci:
                for co, size in blocks(conv.co, 2 * LANES):
                    store(room, _neighbours(_reader(w, kh, kw, ci), co, size), 0)
                    for o in range(size // 2):
                        store(turned, load(room, o), *at, co // 2 + o, ci)
        with T.parallel(conv.n) as i:
            with serial(conv.oh) as h:
                _pack_row(_reader(d, i, h), line, packed, i, h)
            for h, v, inside in plain.bordered_pixels(rows.border, columns.border):
                for co, size in blocks(half, LANES):
                    pixel = (h - rows.border[0], (v - columns.border[0]) * half + co)
                    zeros = splat(T.int32(0), size)
                    value = load(packed, i, *pixel, lanes=size) if inside else zeros
                    store(bordered, value, i, h, v, co)
            for ci, lanes in _channels(conv.ci):
                for across, along in product(rows.phases(), columns.phases()):
                    sizes = across.size, along.size
                    for q, r, block in plain.pixel_blocks(cpu, *sizes, _wide(lanes)):
                        tile = Tile(len(block), _wide(lanes))
                        h, v = across.source(q), along.source(r)
                        for th, tw, co in steps(len(across.taps), len(along.taps), half):
                            kernel_at = across.tap(th), along.tap(tw)
                            add_outer(
                                tile,
                                [
                                    load(bordered, i, h + dh + th, v + dv + tw, co)
                                    for dh, dv in block
                                ],
                                [
                                    load(turned, *kernel_at, co, ci + o, lanes=LANES)
                                    for o, _ in tile.vectors()
                                ],
                            )
                        for number, vector, offset, _ in tile.cells():
                            dh, dv = block[number]
                            target = (across.target(q + dh), along.target(r + dv))
                            value = tile.get(number, vector, lanes[vector])
                            write(value, i, *target, ci + offset)
    return kernel.function


def stored_gradient(cpu: Cpu, conv: Conv) -> Any:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], scratch… → g[n,kh*kw*ci*co], s[n].

    A pair is of two rows of the output, and of the two rows of the input that they meet.
    """
    sh, sw = conv.stride
    row = conv.wp * conv.ci
    shapes: dict[str, Any] = {
        "xp": (conv.n, conv.hp, row),
        "d": (conv.n, conv.oh, conv.ow, conv.co),
        "inputs": ((conv.n, conv.hp, _whole(row)), "int32"),
        "adjoints": ((conv.n, -(-conv.oh // 2), conv.ow, _whole(conv.co)), "int32"),
    }
    later = Stream(cpu, n=conv.n, numbers=conv.weights, channels=conv.co)
    results = {"g": (conv.n, conv.weights), "s": (conv.n,)}
    with Kernel(**shapes, **results) as kernel, words(), later.scope():
        xp, d, inputs, adjoints, g, s = kernel.buffers
        with T.parallel(conv.n) as i:
            for first, count, both in _row_pairs(conv.hp, sh):
                with serial(count) as near:
                    h = first + near
                    for at, size in blocks(row, LANES):
                        even = filled(_reader(xp, i, h), at, size)
                        odd = filled(_reader(xp, i, h + sh), at, size * both)
                        store(inputs, pairs(even, odd), i, h, at)
            for first, count, both in ((0, conv.oh // 2, 1), (conv.oh // 2, conv.oh % 2, 0)):
                for near, v in grid(count, conv.ow):
                    h = first + near
                    for at, size in blocks(conv.co, LANES):
                        even = filled(_reader(d, i, 2 * h, v), at, size)
                        odd = filled(_reader(d, i, 2 * h + 1, v), at, size * both)
                        store(adjoints, pairs(even, odd), i, h, v, at)
            norm = SquaredNorm()
            for co, lanes in _channels(conv.co):
                kws, cis = plain.tap_segments(cpu, conv, len(lanes))
                with norm.part(_wide(lanes)) as add, serial(conv.kh) as kh:
                    for kw, ci, taps in plain.tap_tiles(kws, cis):
                        tile = Tile(len(taps), _wide(lanes))
                        for h, v in steps(-(-conv.oh // 2), conv.ow):
                            add_outer(
                                tile,
                                [
                                    load(
                                        inputs,
                                        i,
                                        2 * sh * h + kh,
                                        (v * sw + kw + dv) * conv.ci + ci + dc,
                                    )
                                    for dv, dc in taps
                                ],
                                [
                                    load(adjoints, i, h, v, co + o, lanes=LANES)
                                    for o, _ in tile.vectors()
                                ],
                            )
                        for at, vector, offset, _ in tile.cells():
                            v, c = taps[at]
                            place = plain.flat(conv, kh, kw + v, ci + c, co + offset)
                            later.store(g, tile.get(at, vector, lanes[vector]), i, place)
                        for vector, column in tile.columns():
                            add(vector, column)
            norm.store(s, i, conv.weights)
            later.end()
    return kernel.function


def _reader(buffer: Any, *index: Any) -> Callable[[Any, int], Any]:
    return lambda at, lanes: load(buffer, *index, at, lanes=lanes)


def _pack_row(read: Callable[[Any, int], Any], extent: int, packed: Any, *index: Any) -> None:
    """The pairs of one row, from packed[index] on."""
    for at, size in blocks(extent, 2 * LANES):
        store(packed, _neighbours(read, at, size), *index, at // 2)


def _neighbours(read: Callable[[Any, int], Any], at: Any, size: int) -> Any:
    return neighbours(filled(read, at, size), filled(read, at + LANES, size - LANES))


def _channels(count: int) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """(first channel, lanes that count in each vector) of groups of two vectors, then the rest."""
    whole = count // LANES * LANES
    for segment in segments(whole, 2 * LANES):
        with serial(segment.count) as block:
            yield segment.at(block), (LANES,) * (segment.size // LANES)
    if count > whole:
        yield whole, (count - whole,)


def _row_pairs(rows: int, distance: int) -> list[tuple[int, int, int]]:
    """(first row, rows, whether there is one at `distance` from each), in order."""
    both = max(0, rows - distance)
    return [(a, n, b) for a, n, b in ((0, both, 1), (both, rows - both, 0)) if n]


def _wide(lanes: Sequence[int]) -> tuple[int, ...]:
    return (LANES,) * len(lanes)


def _whole(count: int) -> int:
    """Rounded up to whole vectors."""
    return -(-count // LANES) * LANES
