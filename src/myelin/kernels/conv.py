"""Two-dimensional convolution of NHWC activations with HWIO weights, and its gradients.

How a plan uses these templates (all arguments float32, outputs last):

- `pad(cpu, conv)`: x[n,h,w,ci] → xp[n,hp,wp,ci], x within its zero border. A template below that
  reads activations reads **xp**, so that one copy serves forward and gradients, or x itself: its
  first parameter has that name. Where `conv.padding` is all zero they are the same.
- Parameters between the inputs and the outputs named here are **scratch**: float32 arrays that the
  kernel overwrites, whatever they hold. How many there are and their sizes depend on the layer.

    forward(cpu, conv, bias=…)       xp, w[kh,kw,ci,co], (b[co]), others, scratch → y[n,oh,ow,co]
    backward_data(cpu, conv)         d[n,oh,ow,co], w, others, scratch → dx[n,h,w,ci]
    stored_gradient(cpu, conv)       xp, d, scratch → g[n,kh*kw*ci*co], s[n]
    stored_bias(cpu, n, pixels, co)  d[n,pixels,co] → g[n,co], s[n]
    gram_norm(cpu, conv, error)      xp, d, scratch → s[n], t[n]
    weighted_gradient(cpu, conv)     xp, d, c[n], scratch → g[kh,kw,ci,co]
    batch_gradient(cpu, conv)        xp, d, scratch → g[kh,kw,ci,co], never of private training

`myelin.kernels.winograd`, `myelin.kernels.mixed_conv` and `myelin.kernels.amx_conv` have the same
templates by other algorithms; `myelin.planner` chooses.

Bounds, u = 2⁻²⁴ and γ_k = k·u / (1 − k·u) (Higham, Accuracy and Stability, §3.1). g_i is the
gradient that example i really adds, as computed in float32:

- stored: ‖g_i‖² ≤ s_i · (1 + stored_norm_inflation(conv)).
- gram:   ‖g_i‖² ≤ s_i + gram_kappa(conv, error) · t_i, where t = ‖X‖²·‖D‖² over output pixels, X
  their unfolded patches, and `error` the `gradient_error` of the module whose `weighted_gradient`
  sums. s_i may come out negative.

All kernels give the same bits for any number of threads: loops run in parallel only over counts
that the shape fixes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.functions import is_finite
from myelin.kernels.gram import gram_kappa, gram_norm
from myelin.kernels.stream import Stream
from myelin.kernels.tiles import (
    MOST_SQUARES,
    Segment,
    SquaredNorm,
    Tile,
    add_shares,
    channel_groups,
    grid,
    largest_divisor,
    run_length,
    segments,
    steps,
)
from myelin.kernels.tir import Kernel, gamma, load, select, serial, splat, store, vectors
from myelin.kernels.window import Conv, Product

__all__ = [
    "Conv",
    "backward_data",
    "batch_gradient",
    "batch_shares",
    "can",
    "forward",
    "gradient_error",
    "gram_kappa",
    "gram_norm",
    "pad",
    "stored_bias",
    "stored_gradient",
    "stored_norm_inflation",
    "weighted_gradient",
    "weighted_gradient_additions",
]


def can(conv: Conv, kind: Product) -> bool:
    """Whether a product can be computed so: any can."""
    del conv, kind
    return True


def stored_norm_inflation(conv: Conv) -> float:
    """Bound of ‖g‖² / s - 1 for the stored gradients of any layer, `stored_bias` included.

    At most `MOST_SQUARES` squares, a column of a tile or nine taps, are added in float32; all else
    is float64, whose errors one unit covers, and rounded to float32 once.
    """
    del conv  # the same for all
    return gamma(MOST_SQUARES + 2)


def weighted_gradient_additions(conv: Conv) -> int:
    """Longest chain of float32 operations on a sum over the examples in `weighted_gradient`."""
    run = run_length(conv.n)
    return run + -(-conv.n // run) + 1


def gradient_error(conv: Conv) -> float:
    """Bound of ‖ĝ − g‖ / (‖X‖·‖D‖): ĝ a gradient found here, X the patches and D the adjoints."""
    return gamma(conv.pixels + 1)


# Kernels


def pad(cpu: Cpu, conv: Conv) -> Any:
    """x[n,h,w,ci] → xp[n,hp,wp,ci]: x with its zero border."""
    top, left, bottom, right = conv.padding
    with Kernel(x=(conv.n, conv.h, conv.w, conv.ci), xp=_padded(conv)) as kernel:
        x, xp = kernel.buffers
        with T.parallel(conv.n) as i:
            for h, w, inside in bordered_pixels((top, conv.h, bottom), (left, conv.w, right)):
                for c, lanes in vectors(conv.ci, cpu.lanes):
                    image = load(x, i, h - top, w - left, c, lanes=lanes) if inside else None
                    store(xp, splat(0.0, lanes) if image is None else image, i, h, w, c)
    return kernel.function


def forward(cpu: Cpu, conv: Conv, *, bias: bool, finish: Epilogue = PLAIN) -> Any:
    """xp[n,hp,wp,ci], w[kh,kw,ci,co], (b[co]), others, scratch → y[n,oh,ow,co], finished."""
    sh, sw = conv.stride
    shapes = {"xp": _padded(conv), "w": _weight(conv), **({"b": (conv.co,)} if bias else {})}
    with Kernel(**shapes, **finish.parameters(_output(conv)), y=_output(conv)) as kernel:
        xp, w, *more, y = kernel.buffers
        b, write = more[:bias], finish.into(y, more[bias:])
        with T.parallel(conv.n) as i:
            for co, widths in _channels(cpu, conv.co):
                for oh, ow, block in pixel_blocks(cpu, conv.oh, conv.ow, widths):
                    tile = Tile(len(block), widths)
                    pixels = [(oh + h, ow + v) for h, v in block]
                    if b:
                        for row, vector, offset, lanes in tile.cells():
                            tile.set(row, vector, load(b[0], co + offset, lanes=lanes))
                    # Of one channel, pixels see the same numbers at taps a stride apart: LLVM would
                    # keep them from tap to tap, on the stack.
                    unroll = 4 if conv.ci > 1 else min(4, sw if conv.kw > 1 else sh)
                    for kh, kw, ci in steps(conv.kh, conv.kw, conv.ci, unroll=unroll):
                        tile.add_outer(
                            [load(xp, i, h * sh + kh, v * sw + kw, ci) for h, v in pixels],
                            [load(w, kh, kw, ci, co + o, lanes=n) for o, n in tile.vectors()],
                        )
                    for row, vector, offset, _ in tile.cells():
                        write(tile.get(row, vector), i, *pixels[row], co + offset)
    return kernel.function


def backward_data(cpu: Cpu, conv: Conv, *, finish: Epilogue = PLAIN) -> Any:
    """d[n,oh,ow,co], w[kh,kw,ci,co], others, scratch → dx[n,h,w,ci], finished.

    Inputs whose padded position is r modulo the stride meet only the taps r, r + stride, …: for
    each part of such a phase, dx is a dense convolution of d within a zero border. Scratch holds
    that bordered d, then the weights turned around and with their channels swapped, [kh,kw,co,ci].
    """
    rows, columns = axes(conv)
    bordered = conv.n * rows.length * columns.length * conv.co

    def adjoint(i: Any, h: Any, w: Any, co: Any) -> Any:
        return ((i * rows.length + h) * columns.length + w) * conv.co + co

    def weight(kh: Any, kw: Any, co: Any, ci: Any) -> Any:
        return bordered + ((kh * conv.kw + kw) * conv.co + co) * conv.ci + ci

    image = (conv.n, conv.h, conv.w, conv.ci)
    shapes = {"d": _output(conv), "w": _weight(conv), **finish.parameters(image)}
    with Kernel(**shapes, scratch=(bordered + conv.weights,), dx=image) as kernel:
        d, w, *others, scratch, dx = kernel.buffers
        write = finish.into(dx, others)
        with T.parallel(conv.n) as i:
            for h, v, inside in bordered_pixels(rows.border, columns.border):
                for co, lanes in vectors(conv.co, cpu.lanes):
                    at = (i, h - rows.border[0], v - columns.border[0], co)
                    value = load(d, *at, lanes=lanes) if inside else splat(0.0, lanes)
                    store(scratch, value, adjoint(i, h, v, co))
        with T.parallel(conv.kh * conv.kw) as tap:
            for ci, co in grid(conv.ci, conv.co):
                kh, kw = _digits(tap, conv.kh, conv.kw)
                at = weight(conv.kh - 1 - kh, conv.kw - 1 - kw, co, ci)
                store(scratch, load(w, kh, kw, ci, co), at)
        with T.parallel(conv.n) as i:
            for ci, widths in _channels(cpu, conv.ci):
                for across, along in product(rows.phases(), columns.phases()):
                    for q, r, block in pixel_blocks(cpu, across.size, along.size, widths):
                        tile = Tile(len(block), widths)
                        h, v = across.source(q), along.source(r)
                        for th, tw, co in steps(len(across.taps), len(along.taps), conv.co):
                            kh, kw = across.tap(th), along.tap(tw)
                            tile.add_outer(
                                [
                                    load(scratch, adjoint(i, h + dh + th, v + dv + tw, co))
                                    for dh, dv in block
                                ],
                                [
                                    load(scratch, weight(kh, kw, co, ci + o), lanes=n)
                                    for o, n in tile.vectors()
                                ],
                            )
                        for row, vector, offset, _ in tile.cells():
                            dh, dv = block[row]
                            target = (across.target(q + dh), along.target(r + dv))
                            write(tile.get(row, vector), i, *target, ci + offset)
    return kernel.function


def stored_gradient(cpu: Cpu, conv: Conv) -> Any:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], scratch → g[n,kh*kw*ci*co], s[n].

    g_i is the gradient of example i, laid out as the weight; s_i = ‖g_i‖² of these very numbers.
    """
    results = {"g": (conv.n, conv.weights), "s": (conv.n,)}
    later = Stream(cpu, n=conv.n, numbers=conv.weights, channels=conv.co)
    with Kernel(xp=_padded(conv), d=_output(conv), **results) as kernel, later.scope():
        xp, d, g, s = kernel.buffers
        with T.parallel(conv.n) as i:
            norm = SquaredNorm()
            for co, widths in _channels(cpu, conv.co):
                kws, cis = tap_segments(cpu, conv, len(widths))
                with norm.part(widths) as add, serial(conv.kh) as kh:
                    for kw, ci, taps in tap_tiles(kws, cis):
                        tile = _correlate(conv, xp, d, i, (kh, kw, ci, co), taps, widths)
                        for row, vector, offset, _ in tile.cells():
                            v, c = taps[row]
                            at = flat(conv, kh, kw + v, ci + c, co + offset)
                            later.store(g, tile.get(row, vector), i, at)
                        for vector, column in tile.columns():
                            add(vector, column)
            norm.store(s, i, conv.weights)
            later.end()
    return kernel.function


def stored_bias(cpu: Cpu, n: int, pixels: int, co: int) -> Any:
    """d[n,pixels,co] → g[n,co], s[n]: sums over the pixels, and the squared norm of these sums."""
    with Kernel(d=(n, pixels, co), g=(n, co), s=(n,)) as kernel:
        d, g, s = kernel.buffers
        with T.parallel(n) as i:
            norm = SquaredNorm()
            for channel, widths in _channels(cpu, co):
                with norm.part(widths) as add:
                    tile = Tile(1, widths)
                    for (p,) in steps(pixels):
                        for row, vector, offset, lanes in tile.cells():
                            tile.add(row, vector, load(d, i, p, channel + offset, lanes=lanes))
                    for row, vector, offset, _ in tile.cells():
                        store(g, tile.get(row, vector), i, channel + offset)
                    for vector, column in tile.columns():
                        add(vector, column)
            norm.store(s, i, co)
    return kernel.function


def weighted_gradient(cpu: Cpu, conv: Conv) -> Any:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], c[n], scratch → g[kh,kw,ci,co] = Σ_i c_i g_i.

    g_i is complete, all pixels summed, before it is multiplied by c_i and added: so rounding of the
    sum over examples is relative to clipped gradients. A number that is not finite adds nothing, so
    none does where c_i is 0, whatever the example holds. Scratch, laid out as g, holds the sum of a
    run of examples.
    """
    shapes = {"c": (conv.n,), "scratch": (conv.weights,), "g": (conv.weights,)}
    with Kernel(xp=_padded(conv), d=_output(conv), **shapes) as kernel:
        xp, d, c, scratch, g = kernel.buffers
        for _, kh, co, widths, kws, cis in _gradient_tasks(cpu, conv):
            own = (kh, co, widths, kws, cis)
            for at, lanes in _weight_vectors(conv, *own):
                store(g, splat(0.0, lanes), at)
            for runs in segments(conv.n, run_length(conv.n)):
                with serial(runs.count) as run:
                    for at, lanes in _weight_vectors(conv, *own):
                        store(scratch, splat(0.0, lanes), at)
                    with serial(runs.size) as example:
                        i = runs.at(run) + example
                        for kw, ci, taps in tap_tiles(kws, cis):
                            tile = _correlate(conv, xp, d, i, (kh, kw, ci, co), taps, widths)
                            factor = T.bind(load(c, i))
                            for row, vector, offset, lanes in tile.cells():
                                v, ch = taps[row]
                                at = flat(conv, kh, kw + v, ci + ch, co + offset)
                                clipped = splat(factor, lanes) * tile.get(row, vector)
                                kept = select(is_finite(clipped), clipped, splat(0.0, lanes))
                                store(scratch, load(scratch, at, lanes=lanes) + kept, at)
                    for at, lanes in _weight_vectors(conv, *own):
                        run_sum = load(scratch, at, lanes=lanes)
                        store(g, load(g, at, lanes=lanes) + run_sum, at)
    return kernel.function


def batch_gradient(cpu: Cpu, conv: Conv) -> Any:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], scratch → g[kh,kw,ci,co] = Σ_i g_i, for training without
    privacy.

    Examples and pixels are one sum, so nothing bounds what an example adds to its rounding.
    """
    shares = batch_shares(conv)
    each = conv.n // shares
    shapes = {"scratch": (shares, conv.weights), "g": (conv.weights,)}
    with Kernel(xp=_padded(conv), d=_output(conv), **shapes) as kernel:
        xp, d, parts, g = kernel.buffers
        for share, kh, co, widths, kws, cis in _gradient_tasks(cpu, conv, shares):
            for at, lanes in _weight_vectors(conv, kh, co, widths, kws, cis):
                store(parts, splat(0.0, lanes), share, at)
            for runs in segments(each, run_length(each)):
                with serial(runs.count) as run:
                    first = share * each + runs.at(run)
                    for kw, ci, taps in tap_tiles(kws, cis):
                        own = (kh, kw, ci, co)
                        tile = _correlate(conv, xp, d, first, own, taps, widths, runs.size)
                        for row, vector, offset, lanes in tile.cells():
                            v, c = taps[row]
                            at = flat(conv, kh, kw + v, ci + c, co + offset)
                            more = tile.get(row, vector)
                            store(parts, load(parts, share, at, lanes=lanes) + more, share, at)
        add_shares(cpu, parts, (shares, conv.kh * conv.kw, conv.ci * conv.co), g)
    return kernel.function


def batch_shares(conv: Conv) -> int:
    """Shares of the examples that `batch_gradient` sums alone, so that threads read what they wrote
    themselves; one where the sums would take much memory.
    """
    return largest_divisor(conv.n, 8) if 4 * conv.weights <= _SMALL else 1


_SMALL = 1 << 20  # bytes of one share's sums


# Shapes and loops


def _padded(conv: Conv) -> tuple[int, ...]:
    return conv.n, conv.hp, conv.wp, conv.ci


def _output(conv: Conv) -> tuple[int, ...]:
    return conv.n, conv.oh, conv.ow, conv.co


def _weight(conv: Conv) -> tuple[int, ...]:
    return conv.kh, conv.kw, conv.ci, conv.co


def flat(conv: Conv, kh: Any, kw: Any, ci: Any, co: Any) -> Any:
    return ((kh * conv.kw + kw) * conv.ci + ci) * conv.co + co


def _digits(number: Any, *extents: int) -> tuple[Any, ...]:
    """The mixed-radix digits of `number`, most significant first."""
    digits = []
    for extent in reversed(extents):
        digits.append(number % extent)
        number = number // extent
    return tuple(reversed(digits))


def _channels(cpu: Cpu, count: int) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """(first channel, lanes of its vectors) of each group of channels."""
    for segment, widths in channel_groups(count, cpu.lanes):
        with serial(segment.count) as block:
            yield segment.at(block), widths


def bordered_pixels(
    rows: tuple[int, int, int], columns: tuple[int, int, int]
) -> Iterator[tuple[Any, Any, bool]]:
    """(row, column, inside) of an image in its border; sizes are (before, image, after)."""
    for (a, height), (b, width) in product(enumerate(rows), enumerate(columns)):
        for h, v in grid(height, width):
            yield sum(rows[:a]) + h, sum(columns[:b]) + v, a == b == 1


def pixel_blocks(
    cpu: Cpu, height: int, width: int, widths: Sequence[int]
) -> Iterator[tuple[Any, Any, list[tuple[int, int]]]]:
    """Covers height × width pixels by rectangles that fit the registers, vectors of `widths` each.

    Gives (row, column, (row, column) of each pixel from there).
    """

    count = len(widths)
    # LLVM takes seconds over large blocks of scalars, trying to make vectors of them.
    limit = (20 if cpu.lanes == 16 else 12) // count if sum(widths) > 1 else 4

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        parts = list(product(segments(height, shape[0]), segments(width, shape[1])))
        # A step takes a multiplication for each accumulator, and at least the latency of one.
        cycles = sum(
            rows.count * columns.count * (max(rows.size * columns.size * count, 8) + count)
            for rows, columns in parts
        )
        return cycles, len(parts)

    shapes = [
        (h, v)
        for h in range(1, min(height, limit) + 1)
        for v in range(1, min(width, limit // h) + 1)
    ]
    h, v = min(shapes, key=cost)
    for rows, columns in product(segments(height, h), segments(width, v)):
        for r, c in grid(rows.count, columns.count):
            pixels = list(product(range(rows.size), range(columns.size)))
            yield rows.at(r), columns.at(c), pixels


# Backward data


def axes(conv: Conv) -> tuple[_Axis, _Axis]:
    top, left = conv.padding[:2]
    sh, sw = conv.stride
    return (
        _Axis(size=conv.h, before=top, taps=conv.kh, stride=sh, out=conv.oh),
        _Axis(size=conv.w, before=left, taps=conv.kw, stride=sw, out=conv.ow),
    )


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of a convolution, seen from its output."""

    size: int
    before: int
    taps: int
    stride: int
    out: int

    @property
    def border(self) -> tuple[int, int, int]:
        """Zeros before the adjoint, rows of the adjoint, zeros after it."""
        before = -(-self.taps // self.stride) - 1
        reached = (self.size - 1 + self.before) // self.stride + 1
        return before, min(self.out, reached), max(0, reached - self.out)

    @property
    def length(self) -> int:
        """Rows of the bordered adjoint."""
        return sum(self.border)

    def phases(self) -> Iterator[_Phase]:
        """The phases that have a position in the image, in parts."""
        for remainder in range(self.stride):
            first = max(0, -((remainder - self.before) // self.stride))
            end = (self.size - 1 + self.before - remainder) // self.stride + 1
            if end > first:
                taps = len(range(remainder, self.taps, self.stride))
                yield from _Phase(
                    axis=self,
                    remainder=remainder,
                    first=first,
                    size=end - first,
                    whole=taps,
                    taps=range(taps),
                ).parts()


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """Positions remainder + stride · (first, first + 1, …) of one axis of the padded input.

    `taps` are those of the phase's `whole` taps that these positions need.
    """

    axis: _Axis
    remainder: int
    first: int
    size: int
    whole: int
    taps: range

    def parts(self) -> Iterator[_Phase]:
        """This phase; in parts, if many of its taps meet nothing but zeros: less to multiply."""
        positions = range(self.first, self.first + self.size)
        parts = [(met, len(list(group))) for met, group in groupby(positions, key=self._met)]
        needed = sum(len(met) * size for met, size in parts)
        many = self.axis.stride > 2 or len(parts) > _MOST_PARTS
        if many or needed > _WORTH * self.whole * self.size:
            yield self
            return
        first = self.first
        for met, size in parts:
            yield replace(self, first=first, size=size, taps=met)
            first += size

    def tap(self, number: Any) -> Any:
        """Which row of the turned kernel tap `number` of this phase is."""
        first = (self.axis.taps - 1 - self.remainder) % self.axis.stride
        return first + self.axis.stride * (self.taps.start + number)

    def source(self, number: Any) -> Any:
        """Which row of the bordered adjoint meets position `number` at tap 0."""
        return self.first + number + self.axis.border[0] - (self.whole - 1) + self.taps.start

    def target(self, number: Any) -> Any:
        """Which row of the input position `number` is."""
        return self.remainder + self.axis.stride * (self.first + number) - self.axis.before

    def _met(self, position: int) -> range:
        """The taps of a position that meet the adjoint, not its border."""
        first = self.whole - 1 - position
        return range(max(0, first), max(0, first, min(self.whole, first + self.axis.border[1])))


_MOST_PARTS = 3  # each is compiled on its own, for each phase of both axes
_WORTH = 0.9  # of a phase's multiplications


# Weight gradients


def _rows(cpu: Cpu, count: int) -> int:
    """Rows of a tile of `count` vectors a row."""
    return (MOST_SQUARES if cpu.lanes == 16 else 8) // count


def tap_segments(cpu: Cpu, conv: Conv, count: int) -> tuple[list[Segment], list[Segment]]:
    """Kernel columns and input channels split into register tiles, `count` vectors a row."""
    rows = _rows(cpu, count)
    columns = max(1, min(conv.kw, rows // conv.ci))
    return segments(conv.kw, columns), segments(conv.ci, min(conv.ci, rows))


def tap_tiles(
    kws: Sequence[Segment], cis: Sequence[Segment]
) -> Iterator[tuple[Any, Any, list[tuple[int, int]]]]:
    """(kernel column, input channel, (column, channel) of each row from there) of tiles."""
    for columns, rows in product(kws, cis):
        for a, b in grid(columns.count, rows.count):
            yield columns.at(a), rows.at(b), list(product(range(columns.size), range(rows.size)))


def _weight_vectors(
    conv: Conv,
    kh: Any,
    co: Any,
    widths: Sequence[int],
    kws: Sequence[Segment],
    cis: Sequence[Segment],
) -> Iterator[tuple[Any, int]]:
    """(flat index, lanes) of every vector of a task's part of the weight."""
    for columns, rows in product(kws, cis):
        for a, v, b, c in grid(columns.count, columns.size, rows.count, rows.size):
            at = flat(conv, kh, columns.at(a) + v, rows.at(b) + c, co)
            for vector, lanes in enumerate(widths):
                yield at + sum(widths[:vector]), lanes


def _gradient_tasks(
    cpu: Cpu, conv: Conv, shares: int = 1
) -> Iterator[tuple[Any, Any, Any, tuple[int, ...], list[Segment], list[Segment]]]:
    """(share, kh, first output channel, lanes, kernel columns, input channels) of parallel tasks.

    Each task sums its own part of the weight over the batch or one of its shares. Parts are as
    large as balance over a few threads allows, because each task reads all activations.
    """
    for channels, widths in channel_groups(conv.co, cpu.lanes):
        kws, cis = tap_segments(cpu, conv, len(widths))
        splits: list[list[tuple[Segment | None, Segment | None]]] = [
            [(None, None)],
            [(columns, None) for columns in kws],
            list(product(kws, cis)),
        ]
        for split in splits:
            counts = [
                (channels.count, conv.kh, k.count if k else 1, c.count if c else 1)
                for k, c in split
            ]
            tasks = shares * sum(math.prod(each) for each in counts)
            if tasks >= 7 or (tasks >= 4 and tasks % 2 == 0):
                break
        for (k, c), extents in zip(split, counts, strict=True):
            with T.parallel(shares * math.prod(extents)) as task:
                share, block, kh, a, b = _digits(task, shares, *extents)
                columns = [Segment(start=k.at(a), count=1, size=k.size)] if k else kws
                rows = [Segment(start=c.at(b), count=1, size=c.size)] if c else cis
                yield share, kh, channels.at(block), widths, columns, rows


def _correlate(
    conv: Conv,
    xp: Any,
    d: Any,
    i: Any,
    at: tuple[Any, Any, Any, Any],
    taps: Sequence[tuple[int, int]],
    widths: Sequence[int],
    examples: int = 1,
) -> Tile:
    """The gradient of `examples` from i on at (kh, kw, ci, co): one row a tap, summed over all
    pixels.
    """
    kh, kw, ci, co = at
    tile = Tile(len(taps), widths)
    for *others, h, v in steps(*[examples] * (examples > 1), conv.oh, conv.ow):
        example = i + others[0] if others else i
        row, column = h * conv.stride[0] + kh, v * conv.stride[1] + kw
        tile.add_outer(
            [load(xp, example, row, column + dv, ci + dc) for dv, dc in taps],
            [load(d, example, h, v, co + offset, lanes=n) for offset, n in tile.vectors()],
        )
    return tile
