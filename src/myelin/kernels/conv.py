"""Two-dimensional convolution of NHWC activations with HWIO weights, and its gradients.

How a plan uses these templates (all arguments float32, outputs last):

- `pad(cpu, conv)`: x[n,h,w,ci] → xp[n,hp,wp,ci], x within its zero border. Every template below
  that reads activations reads **xp**, so that one copy serves forward and gradients. Where
  `conv.padding` is all zero, xp is x itself: pass x and leave `pad` out.
- A parameter named **scratch** stands directly before the outputs of `backward_data`,
  `gram_norm` and `weighted_gradient`: a float32 vector that the kernel overwrites, whatever it
  holds. Its length is the parameter's shape.

    forward(cpu, conv, bias=…)       xp, w[kh,kw,ci,co], (b[co]) → y[n,oh,ow,co]
    backward_data(cpu, conv)         d[n,oh,ow,co], w, scratch → dx[n,h,w,ci]
    stored_gradient(cpu, conv)       xp, d → g[n,kh*kw*ci*co], s[n]
    stored_bias(cpu, n, pixels, co)  d[n,pixels,co] → g[n,co], s[n]
    gram_norm(cpu, conv)             xp, d, scratch → s[n], t[n]
    weighted_gradient(cpu, conv)     xp, d, c[n], scratch → g[kh,kw,ci,co]

`choose(conv)` says which way a layer's clipped gradient is best taken.

Bounds, u = 2⁻²⁴ and γ_k = k·u / (1 − k·u) (Higham, Accuracy and Stability, §3.1). g_i is the
gradient that example i really adds, as computed in float32:

- stored: ‖g_i‖² ≤ s_i · (1 + stored_norm_inflation(conv)).
- gram:   ‖g_i‖² ≤ s_i + gram_kappa(conv) · t_i, where t = (Σ_p |x_p|·|d_p|)² over output pixels p
  with x_p the unfolded patch; t ≤ ‖X‖²·‖D‖². s_i may come out negative.

All kernels give the same bits for any number of threads: loops run in parallel only over counts
that the shape fixes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from myelin.kernels.tiles import (
    Expression,
    Segment,
    Tile,
    argument,
    broadcast,
    channels,
    kernel,
    lanes,
    offsets,
    registers,
    segments,
    store,
    widen,
    zero,
)

if TYPE_CHECKING:
    from myelin.cpu import Cpu

UNIT = 2.0**-24  # rounding unit of float32
SMALLEST = 2.0**-126  # below this float32 results are flushed to zero
UNROLL = 4  # steps of a reduction in one loop iteration
CHUNKS = 8  # parts of a batch with a scratch of their own in `gram_norm`


@dataclass(frozen=True, kw_only=True)
class Conv:
    """A convolution of n images: h × w × ci → oh × ow × co, kernel kh × kw."""

    n: int
    h: int
    w: int
    ci: int
    co: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right

    def __post_init__(self) -> None:
        """Refuses sizes without an output pixel."""
        sizes = (self.n, self.h, self.w, self.ci, self.co, self.kh, self.kw, *self.stride)
        if min(sizes) < 1 or min(self.padding) < 0:
            raise ValueError(f"sizes and strides must be at least 1, padding at least 0: {self}")
        if self.hp < self.kh or self.wp < self.kw:
            raise ValueError(f"the kernel is larger than the padded image: {self}")

    @property
    def hp(self) -> int:
        """Height with padding."""
        return self.h + self.padding[0] + self.padding[2]

    @property
    def wp(self) -> int:
        """Width with padding."""
        return self.w + self.padding[1] + self.padding[3]

    @property
    def oh(self) -> int:
        """Height of the output."""
        return (self.hp - self.kh) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        """Width of the output."""
        return (self.wp - self.kw) // self.stride[1] + 1

    @property
    def pixels(self) -> int:
        """Pixels of one output image."""
        return self.oh * self.ow

    @property
    def taps(self) -> int:
        """Products summed for one output number: kh · kw · ci."""
        return self.kh * self.kw * self.ci

    @property
    def weights(self) -> int:
        """Numbers in the weight."""
        return self.taps * self.co


def choose(conv: Conv) -> Literal["stored", "gram"]:
    """How the clipped gradient of this layer is taken.

    "stored": `stored_gradient`, then `clipping.weighted_sum`; one product, n · weights floats.
    "gram": `gram_norm`, then `weighted_gradient`; a second, smaller product and no such memory.
    """
    stored = conv.pixels * conv.weights + 8 * conv.weights  # writing and reading back g
    gram = conv.pixels * conv.weights + conv.pixels**2 * (conv.taps + conv.co) // 2
    return "stored" if stored <= gram else "gram"


def stored_norm_inflation(conv: Conv) -> float:
    """Bound of ‖g‖² / s − 1 for `stored_gradient` and, with taps = 1, for `stored_bias`.

    Lanes add at most `registers` float32 squares of one tile, all else is float64.
    """
    del conv  # the same for every shape
    return _gamma(24 + 2)


def gram_kappa(conv: Conv) -> float:
    """κ of ‖g‖² ≤ s + κ·t, where g is the gradient that `weighted_gradient` sums.

    Gram entries are float32 dot products of length k: off by at most γ_k·|a||b|. Their products are
    summed in float64. The gradient itself is off by at most γ_pixels·√t.
    """
    patch, adjoint, own = _gamma(conv.taps), _gamma(conv.co), _gamma(conv.pixels + 1)
    gram = patch + adjoint + patch * adjoint + 4 * UNIT
    return gram + 2 * own * (1 + gram) + own * own


def weighted_gradient_additions(conv: Conv) -> int:
    """Longest chain of float32 operations on a sum over examples in `weighted_gradient`."""
    return _run(conv) + -(-conv.n // _run(conv)) + 1


def _gamma(operations: int) -> float:
    return operations * UNIT / (1 - operations * UNIT)


def _run(conv: Conv) -> int:
    """Examples summed before their sum is added to the total: two short chains, not one long."""
    return max(1, math.isqrt(conv.n))


# Kernels


def pad(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """x[n,h,w,ci] → xp[n,hp,wp,ci]: x with its zero border."""
    top, left, bottom, right = conv.padding

    def body() -> None:
        x = argument("x", conv.n, conv.h, conv.w, conv.ci)
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        with T.parallel(0, conv.n) as i:
            for h, v, inside in _bordered((top, conv.h, bottom), (left, conv.w, right)):
                for channel, width in _channel_vectors(cpu, conv.ci):
                    at = lanes(channel, width)
                    value = x[i, h - top, v - left, at] if inside else zero(width)
                    store(xp, [i, h, v, at], value)

    return kernel("conv_pad", body)


def forward(cpu: "Cpu", conv: Conv, *, bias: bool) -> PrimFunc:
    """xp[n,hp,wp,ci], w[kh,kw,ci,co], (b[co]) → y[n,oh,ow,co]."""
    sh, sw = conv.stride

    def body() -> None:
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        w = argument("w", conv.kh, conv.kw, conv.ci, conv.co)
        b = argument("b", conv.co) if bias else None
        y = argument("y", conv.n, conv.oh, conv.ow, conv.co)
        with T.parallel(0, conv.n) as i:
            for co, widths in _channel_groups(cpu, conv.co):
                for block in _blocks(cpu, conv.oh, conv.ow, len(widths)):
                    acc = Tile(block.size, widths)
                    for row, vector, offset, width in acc.cells():
                        start = zero(width) if b is None else b[lanes(co + offset, width)]
                        acc.set(row, vector, start)
                    for kh, kw, ci in _steps(conv.kh, conv.kw, conv.ci):
                        acc.add_outer(
                            [xp[i, h * sh + kh, v * sw + kw, ci] for h, v in block],
                            [w[kh, kw, ci, lanes(co + o, width)] for o, width in acc.vectors()],
                        )
                    pixels = list(block)
                    for row, vector, offset, width in acc.cells():
                        store(y, [i, *pixels[row], lanes(co + offset, width)], acc[row, vector])

    return kernel("conv_forward", body)


def backward_data(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """d[n,oh,ow,co], w[kh,kw,ci,co], scratch → dx[n,h,w,ci].

    Inputs whose padded position is r modulo the stride meet only the taps r, r + stride, …: for
    each such phase, dx is a dense convolution of d within a zero border. Scratch holds that
    bordered d, then the weights with channels swapped, [kh,kw,co,ci].
    """
    rows = _Axis(
        size=conv.h, before=conv.padding[0], taps=conv.kh, stride=conv.stride[0], out=conv.oh
    )
    columns = _Axis(
        size=conv.w, before=conv.padding[1], taps=conv.kw, stride=conv.stride[1], out=conv.ow
    )
    bordered = conv.n * rows.length * columns.length * conv.co

    def adjoint(i: Expression, h: Expression, v: Expression, co: Expression) -> Expression:
        return ((i * rows.length + h) * columns.length + v) * conv.co + co

    def weight(kh: Expression, kw: Expression, co: Expression, ci: Expression) -> Expression:
        return bordered + ((kh * conv.kw + kw) * conv.co + co) * conv.ci + ci

    def body() -> None:
        d = argument("d", conv.n, conv.oh, conv.ow, conv.co)
        w = argument("w", conv.kh, conv.kw, conv.ci, conv.co)
        scratch = argument("scratch", bordered + conv.weights)
        dx = argument("dx", conv.n, conv.h, conv.w, conv.ci)
        with T.parallel(0, conv.n) as i:
            for h, v, inside in _bordered(rows.border, columns.border):
                for co, width in _channel_vectors(cpu, conv.co):
                    at = h - rows.border[0], v - columns.border[0], lanes(co, width)
                    value = d[(i, *at)] if inside else zero(width)
                    store(scratch, [lanes(adjoint(i, h, v, co), width)], value)
        with T.parallel(0, conv.kh * conv.kw) as tap:
            kh, kw = _digits(tap, conv.kh, conv.kw)
            with T.serial(0, conv.ci) as ci, T.serial(0, conv.co) as co:
                store(scratch, [weight(kh, kw, co, ci)], w[kh, kw, ci, co])
        with T.parallel(0, conv.n) as i:
            for ci, widths in _channel_groups(cpu, conv.ci):
                for row_phase, column_phase in product(rows.phases(), columns.phases()):
                    for block in _blocks(cpu, row_phase.size, column_phase.size, len(widths)):
                        acc = Tile(block.size, widths)
                        acc.clear()
                        for th, tw, co in _steps(row_phase.taps, column_phase.taps, conv.co):
                            kh, kw = row_phase.tap(th), column_phase.tap(tw)
                            acc.add_outer(
                                [
                                    scratch[
                                        adjoint(
                                            i,
                                            row_phase.source(h) - th,
                                            column_phase.source(v) - tw,
                                            co,
                                        )
                                    ]
                                    for h, v in block
                                ],
                                [
                                    scratch[lanes(weight(kh, kw, co, ci + offset), width)]
                                    for offset, width in acc.vectors()
                                ],
                            )
                        pixels = [(row_phase.target(h), column_phase.target(v)) for h, v in block]
                        for row, vector, offset, width in acc.cells():
                            at = lanes(ci + offset, width)
                            store(dx, [i, *pixels[row], at], acc[row, vector])

    return kernel("conv_backward_data", body)


def stored_gradient(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """xp[n,hp,wp,ci], d[n,oh,ow,co] → g[n,kh*kw*ci*co], s[n].

    g_i is the gradient of example i, laid out as the weight; s_i = ‖g_i‖² of these very numbers.
    """

    def body() -> None:
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        d = argument("d", conv.n, conv.oh, conv.ow, conv.co)
        g = argument("g", conv.n, conv.weights)
        s = argument("s", conv.n)
        with T.parallel(0, conv.n) as i:
            norm = _SquaredNorm()
            for co, widths in _channel_groups(cpu, conv.co):
                kws, cis = _tap_segments(cpu, conv, len(widths))
                with norm.sum(widths) as add, T.serial(0, conv.kh) as kh:
                    for kw, ci, taps in _tap_tiles(kws, cis):
                        acc = _correlate(conv, xp, d, i, (kh, kw, ci, co), taps, widths)
                        for row, vector, offset, width in acc.cells():
                            v, c = taps[row]
                            at = ((kh * conv.kw + kw + v) * conv.ci + ci + c) * conv.co + co
                            store(g, [i, lanes(at + offset, width)], acc[row, vector])
                        add(acc)
            norm.store(s, i, conv.weights)

    return kernel("conv_stored_gradient", body)


def stored_bias(cpu: "Cpu", n: int, pixels: int, co: int) -> PrimFunc:
    """d[n,pixels,co] → g[n,co], s[n]: sums over the pixels, and the squared norm of these sums."""

    def body() -> None:
        d = argument("d", n, pixels, co)
        g = argument("g", n, co)
        s = argument("s", n)
        with T.parallel(0, n) as i:
            norm = _SquaredNorm()
            for channel, widths in _channel_groups(cpu, co):
                with norm.sum(widths) as add:
                    acc = Tile(1, widths)
                    acc.clear()
                    for (p,) in _steps(pixels):
                        for row, vector, offset, width in acc.cells():
                            acc.add(row, vector, d[i, p, lanes(channel + offset, width)])
                    for row, vector, offset, width in acc.cells():
                        store(g, [i, lanes(channel + offset, width)], acc[row, vector])
                    add(acc)
            norm.store(s, i, co)

    return kernel("conv_stored_bias", body)


def weighted_gradient(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], c[n], scratch → g[kh,kw,ci,co] = Σ_i c_i g_i.

    g_i is complete, all pixels summed, before it is multiplied by c_i and added, so that rounding
    of the sum over examples is relative to clipped gradients. Where c_i is 0 nothing is added,
    whatever the example holds. Scratch is laid out as g and holds the sum of a run of examples.
    """

    def body() -> None:
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        d = argument("d", conv.n, conv.oh, conv.ow, conv.co)
        c = argument("c", conv.n)
        scratch = argument("scratch", conv.weights)
        g = argument("g", conv.kh, conv.kw, conv.ci, conv.co)

        def partial(at: Sequence[Expression], width: int) -> Expression:
            kh, kw, ci, co = at
            return lanes(((kh * conv.kw + kw) * conv.ci + ci) * conv.co + co, width)

        for kh, co, widths, kws, cis in _gradient_tasks(cpu, conv):
            for at, width in _weight_vectors(kh, co, widths, kws, cis):
                store(g, [*at[:3], lanes(at[3], width)], zero(width))
            for runs in segments(conv.n, _run(conv)):
                with T.serial(0, runs.count) as run:
                    for at, width in _weight_vectors(kh, co, widths, kws, cis):
                        store(scratch, [partial(at, width)], zero(width))
                    with T.serial(0, runs.size) as example:
                        i = runs.at(run) + example
                        for kw, ci, taps in _tap_tiles(kws, cis):
                            acc = _correlate(conv, xp, d, i, (kh, kw, ci, co), taps, widths)
                            for row, vector, offset, width in acc.cells():
                                v, ch = taps[row]
                                where = partial((kh, kw + v, ci + ch, co + offset), width)
                                scaled = broadcast(c[i], width) * acc[row, vector]
                                kept = T.Select(
                                    broadcast(c[i] == T.float32(0), width), zero(width), scaled
                                )
                                store(scratch, [where], scratch[where] + kept)
                    for at, width in _weight_vectors(kh, co, widths, kws, cis):
                        here = (*at[:3], lanes(at[3], width))
                        store(g, here, g[here] + scratch[partial(at, width)])

    return kernel("conv_weighted_gradient", body)


def gram_norm(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], scratch → s[n], t[n]: ‖g_i‖² without forming g_i.

    s = Σ_pq ⟨x_p, x_q⟩⟨d_p, d_q⟩ over pairs of output pixels, t = (Σ_p |x_p||d_p|)²
    (`gram_kappa`); t carries a floor that covers numbers flushed to zero. Both products are
    symmetric: only pairs p ≤ q are formed. Scratch holds, for each chunk of the batch, the unfolded
    patches and the adjoint with pixels last, [taps + co, pixels rounded up].
    """
    widths = (cpu.lanes,) * (2 if conv.pixels > cpu.lanes else 1)
    wide = sum(widths)
    length = -(-conv.pixels // wide) * wide
    chunks = min(conv.n, CHUNKS)
    floors = [2 * k * SMALLEST / gram_kappa(conv) for k in (conv.taps, conv.co)]

    def body() -> None:
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        d = argument("d", conv.n, conv.oh, conv.ow, conv.co)
        scratch = argument("scratch", chunks, conv.taps + conv.co, length)
        s = argument("s", conv.n)
        t = argument("t", conv.n)

        def norms(chunk: Expression, first: int, count: int, pixel: Expression) -> Expression:
            total = Tile(1, (cpu.lanes,), "float64")
            total.clear()
            with T.serial(0, count) as k:
                value = widen(scratch[chunk, first + k, lanes(pixel, cpu.lanes)], cpu.lanes)
                total.add(0, 0, value * value)
            return total[0, 0]

        def gram(
            chunk: Expression, first: int, count: int, p: Segment, row: Expression, q: Expression
        ) -> Tile:
            acc = Tile(p.size, widths)
            acc.clear()
            for (k,) in _steps(count):
                acc.add_outer(
                    [scratch[chunk, first + k, p.at(row) + r] for r in range(p.size)],
                    [scratch[chunk, first + k, lanes(q + o, width)] for o, width in acc.vectors()],
                )
            return acc

        def example(chunk: Expression, i: Expression) -> None:
            for h, v in _grid(conv.oh, conv.ow):
                p = h * conv.ow + v
                for kh, kw, ci in _grid(conv.kh, conv.kw, conv.ci):
                    k = (kh * conv.kw + kw) * conv.ci + ci
                    value = xp[i, h * conv.stride[0] + kh, v * conv.stride[1] + kw, ci]
                    store(scratch, [chunk, k, p], value)
                for (co,) in _grid(conv.co):
                    store(scratch, [chunk, conv.taps + co, p], d[i, h, v, co])
            root = Tile(1, (cpu.lanes,), "float64")
            root.clear()
            with T.serial(0, length // cpu.lanes) as block:
                patch = norms(chunk, 0, conv.taps, block * cpu.lanes)
                own = norms(chunk, conv.taps, conv.co, block * cpu.lanes)
                floor = [T.Broadcast(T.FloatImm("float64", f), cpu.lanes) for f in floors]
                root.add(0, 0, T.sqrt(patch + floor[0]) * T.sqrt(own + floor[1]))
            total = Tile(1, widths, "float64")
            total.clear()
            for p in segments(conv.pixels, registers(cpu) // len(widths)):
                with T.serial(0, p.count) as row, T.serial(0, length // wide) as column:
                    with T.If((column + 1) * wide > p.at(row)), T.Then():
                        patch = gram(chunk, 0, conv.taps, p, row, column * wide)
                        own = gram(chunk, conv.taps, conv.co, p, row, column * wide)
                        for r, vector, offset, width in patch.cells():
                            q = T.Ramp(column * wide + offset, 1, width)
                            here = T.Broadcast(p.at(row) + r, width)
                            twice = T.Select(q > here, 2 * patch[r, vector], patch[r, vector])
                            once = T.Select(q < here, zero(width), twice)
                            pair = widen(once, width) * widen(own[r, vector], width)
                            total.add(0, vector, pair)
            store(s, [i], T.Cast("float32", total.total()))
            bound = T.bind(root.total())
            up = T.FloatImm("float64", 1 + 4 * UNIT)
            store(t, [i], T.Cast("float32", bound * bound * up))

        # Columns past the last pixel stay zero: they pair to nothing.
        with T.parallel(0, chunks) as chunk:
            for k, p in _grid(conv.taps + conv.co, length - conv.pixels):
                store(scratch, [chunk, k, conv.pixels + p], T.float32(0))
            each = conv.n // chunks
            with T.serial(0, each) as i:
                example(chunk, chunk * each + i)
        if conv.n % chunks:
            with T.parallel(0, conv.n % chunks) as chunk:
                example(chunk, conv.n - conv.n % chunks + chunk)

    return kernel("conv_gram_norm", body)


# Loops


def _grid(*extents: int) -> Iterator[tuple[Expression, ...]]:
    """One serial loop an extent; nothing where an extent is 0."""
    if min(extents) > 0:
        with ExitStack() as stack:
            yield tuple(stack.enter_context(T.serial(0, extent)) for extent in extents)


def _steps(*extents: int) -> Iterator[tuple[Expression, ...]]:
    """As `_grid`, with the last axis longer than 1 unrolled by UNROLL."""
    axis = max((a for a, extent in enumerate(extents) if extent > 1), default=0)
    for segment in segments(extents[axis], UNROLL):
        for *outer, block in _grid(*extents[:axis], segment.count):
            for inner in range(segment.size):
                yield (*outer, segment.at(block) + inner, *[0] * (len(extents) - axis - 1))


def _digits(number: Expression, *extents: int) -> tuple[Expression, ...]:
    """The mixed-radix digits of `number`, most significant first."""
    digits = []
    for extent in reversed(extents):
        digits.append(number % extent)
        number = number // extent
    return tuple(reversed(digits))


def _channel_groups(
    cpu: "Cpu", count: int, together: int = 2
) -> Iterator[tuple[Expression, tuple[int, ...]]]:
    """(first channel, widths of its vectors) of each group of channels."""
    for group in channels(count, cpu.lanes, together):
        with T.serial(0, group.count) as block:
            yield group.at(block), group.widths


def _channel_vectors(cpu: "Cpu", count: int) -> Iterator[tuple[Expression, int]]:
    """(first channel, width) of each vector of channels."""
    for channel, widths in _channel_groups(cpu, count, together=1):
        for offset, width in zip(offsets(widths), widths, strict=True):
            yield channel + offset, width


def _bordered(
    rows: tuple[int, int, int], columns: tuple[int, int, int]
) -> Iterator[tuple[Expression, Expression, bool]]:
    """(row, column, inside) of an image in its border; sizes are (before, image, after)."""
    for (a, height), (b, width) in product(enumerate(rows), enumerate(columns)):
        for h, v in _grid(height, width):
            yield sum(rows[:a]) + h, sum(columns[:b]) + v, a == b == 1


@dataclass(frozen=True, kw_only=True)
class _Block:
    """A rectangle of pixels held in registers."""

    row: Expression
    column: Expression
    height: int
    width: int

    @property
    def size(self) -> int:
        return self.height * self.width

    def __iter__(self) -> Iterator[tuple[Expression, Expression]]:
        for h, v in product(range(self.height), range(self.width)):
            yield self.row + h, self.column + v


def _blocks(cpu: "Cpu", height: int, width: int, count: int) -> Iterator[_Block]:
    """Covers height × width pixels by register blocks for `count` vectors a pixel."""

    def cost(shape: tuple[int, int]) -> tuple[int, int]:
        parts = [
            (rows.count * columns.count, rows.size * columns.size)
            for rows in segments(height, shape[0])
            for columns in segments(width, shape[1])
        ]
        # A step takes a multiplication for each accumulator, and at least the latency of one.
        cycles = sum(blocks * (max(size * count, 8) + count) for blocks, size in parts)
        return cycles, len(parts)

    limit = registers(cpu) // count
    shapes = [
        (h, v)
        for h in range(1, min(height, limit) + 1)
        for v in range(1, min(width, limit // h) + 1)
    ]
    h, v = min(shapes, key=cost)
    for rows, columns in product(segments(height, h), segments(width, v)):
        for r, c in _grid(rows.count, columns.count):
            yield _Block(row=rows.at(r), column=columns.at(c), height=rows.size, width=columns.size)


# Backward data


@dataclass(frozen=True, kw_only=True)
class _Phase:
    """Positions r, r + stride, … of one axis of the padded input: `size` of them in the image."""

    remainder: int
    first: int
    size: int
    taps: int
    axis: "_Axis"

    def tap(self, number: Expression) -> Expression:
        """The kernel's row that is tap `number` of this phase."""
        return self.remainder + self.axis.stride * number

    def source(self, number: Expression) -> Expression:
        """The row of the bordered adjoint that tap 0 of position `number` reads."""
        return self.first + number + self.axis.border[0]

    def target(self, number: Expression) -> Expression:
        """The row of the input that is position `number`."""
        return self.remainder + self.axis.stride * (self.first + number) - self.axis.before


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of a convolution seen from its output."""

    size: int
    before: int
    taps: int
    stride: int
    out: int

    @property
    def border(self) -> tuple[int, int, int]:
        """Zeros before the adjoint, its rows, zeros after it."""
        before = -(-self.taps // self.stride) - 1
        reached = (self.size - 1 + self.before) // self.stride + 1
        return before, min(self.out, reached), max(0, reached - self.out)

    @property
    def length(self) -> int:
        """Rows of the bordered adjoint."""
        return sum(self.border)

    def phases(self) -> Iterator[_Phase]:
        """The phases that have a position in the image."""
        for remainder in range(self.stride):
            first = max(0, -((remainder - self.before) // self.stride))
            end = (self.size - 1 + self.before - remainder) // self.stride + 1
            if end > first:
                yield _Phase(
                    remainder=remainder,
                    first=first,
                    size=end - first,
                    taps=len(range(remainder, self.taps, self.stride)),
                    axis=self,
                )


# Weight gradients


def _tap_segments(cpu: "Cpu", conv: Conv, count: int) -> tuple[list[Segment], list[Segment]]:
    """Splits of kernel columns and input channels into register tiles of `count` vectors a row."""
    limit = registers(cpu) // count
    columns = max(1, min(conv.kw, limit // conv.ci))
    rows = -(-conv.ci // -(-conv.ci // limit))
    return segments(conv.kw, columns), segments(conv.ci, rows)


def _tap_tiles(
    kws: Sequence[Segment], cis: Sequence[Segment]
) -> Iterator[tuple[Expression, Expression, list[tuple[int, int]]]]:
    """(first kernel column, first channel, (column, channel) of each row from there) of tiles."""
    for columns, rows in product(kws, cis):
        for a, b in _grid(columns.count, rows.count):
            yield columns.at(a), rows.at(b), list(product(range(columns.size), range(rows.size)))


def _weight_vectors(
    kh: Expression,
    co: Expression,
    widths: Sequence[int],
    kws: Sequence[Segment],
    cis: Sequence[Segment],
) -> Iterator[tuple[tuple[Expression, ...], int]]:
    """((kh, kw, ci, co), width) of every vector of a task's part of the weight."""
    for columns, rows in product(kws, cis):
        for a, v, b, c in _grid(columns.count, columns.size, rows.count, rows.size):
            for offset, width in zip(offsets(widths), widths, strict=True):
                yield (kh, columns.at(a) + v, rows.at(b) + c, co + offset), width


def _gradient_tasks(
    cpu: "Cpu", conv: Conv
) -> Iterator[tuple[Expression, Expression, tuple[int, ...], list[Segment], list[Segment]]]:
    """(kh, first output channel, widths, kernel columns, input channels) of parallel tasks.

    Each task sums its own part of the weight over the whole batch. Parts are as large as balance
    over a few threads allows, because each reads all activations.
    """
    for group in channels(conv.co, cpu.lanes):
        kws, cis = _tap_segments(cpu, conv, len(group.widths))
        splits: list[list[tuple[Segment | None, Segment | None]]] = [
            [(None, None)],
            [(columns, None) for columns in kws],
            list(product(kws, cis)),
        ]
        for split in splits:
            counts = [
                (group.count, conv.kh, k.count if k else 1, c.count if c else 1) for k, c in split
            ]
            tasks = sum(math.prod(each) for each in counts)
            if tasks >= 7 or (tasks >= 4 and tasks % 2 == 0):
                break
        for (k, c), extents in zip(split, counts, strict=True):
            with T.parallel(0, math.prod(extents)) as task:
                block, kh, a, b = _digits(task, *extents)
                columns = [Segment(start=k.at(a), count=1, size=k.size)] if k else kws
                rows = [Segment(start=c.at(b), count=1, size=c.size)] if c else cis
                yield kh, group.at(block), group.widths, columns, rows


def _correlate(
    conv: Conv,
    xp: Expression,
    d: Expression,
    i: Expression,
    at: tuple[Expression, Expression, Expression, Expression],
    taps: Sequence[tuple[int, int]],
    widths: Sequence[int],
) -> Tile:
    """The part of example i's gradient at (kh, kw, ci, co): one row a tap, summed over pixels."""
    kh, kw, ci, co = at
    acc = Tile(len(taps), widths)
    acc.clear()
    for h, v in _steps(conv.oh, conv.ow):
        row, column = h * conv.stride[0] + kh, v * conv.stride[1] + kw
        acc.add_outer(
            [xp[i, row, column + dv, ci + dc] for dv, dc in taps],
            [d[i, h, v, lanes(co + offset, width)] for offset, width in acc.vectors()],
        )
    return acc


class _SquaredNorm:
    """Σ v² over tiles: float32 within a lane of one tile, float64 from there."""

    def __init__(self) -> None:
        self._total = T.alloc_buffer((1,), "float64", scope="local")
        store(self._total, [0], T.FloatImm("float64", 0.0))

    @contextmanager
    def sum(self, widths: Sequence[int]) -> Iterator[Callable[[Tile], None]]:
        """Gives a function that adds the squares of a tile of these widths."""
        squares = Tile(1, widths, "float64")
        squares.clear()

        def add(tile: Tile) -> None:
            for vector, width in enumerate(tile.widths):
                column = [tile[row, vector] for row in range(tile.rows)]
                value = column[0] * column[0]
                for cell in column[1:]:
                    value = value + cell * cell
                squares.add(0, vector, widen(value, width))

        yield add
        store(self._total, [0], self._total[0] + squares.total())

    def store(self, s: Expression, i: Expression, count: int) -> None:
        """s[i] = the sum, with what `count` squares lose at most when flushed to zero."""
        flushed = T.FloatImm("float64", count * SMALLEST)
        store(s, [i], T.Cast("float32", self._total[0] + flushed))
