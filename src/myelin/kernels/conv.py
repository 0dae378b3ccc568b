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
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from tvm.script.ir_builder import tirx as T  # noqa: N812
from tvm.tirx import PrimFunc

from myelin.kernels.tiles import (
    Channels,
    Expression,
    Segment,
    Tile,
    argument,
    broadcast,
    channels,
    kernel,
    lanes,
    registers,
    segments,
    store,
    vectors,
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

    def body() -> None:
        x = argument("x", conv.n, conv.h, conv.w, conv.ci)
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        rows = (conv.padding[0], conv.h, conv.padding[2])
        columns = (conv.padding[1], conv.w, conv.padding[3])
        with T.parallel(0, conv.n) as i:
            for h, w, inside in _bordered(rows, columns):
                for channel, width in _channels(cpu, conv.ci):
                    at = lanes(channel, width)
                    value = x[i, h - rows[0], w - columns[0], at] if inside else zero(width)
                    store(xp, [i, h, w, at], value)

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
            for co, widths in _groups(cpu, conv.co):
                for pixel, count in _pixel_tiles(cpu, conv.oh, conv.ow, len(widths)):
                    acc = Tile(count, widths)
                    for row, vector, offset, width in acc.cells():
                        start = zero(width) if b is None else b[lanes(co + offset, width)]
                        acc.set(row, vector, start)
                    for kh, kw, ci in _steps(conv.kh, conv.kw, conv.ci):

                        def value(row: int) -> Expression:
                            h, v = pixel(row)
                            return xp[i, h * sh + kh, v * sw + kw, ci]

                        acc.add_outer(value, lambda o, width: w[kh, kw, ci, lanes(co + o, width)])
                    for row, vector, offset, width in acc.cells():
                        store(y, [i, *pixel(row), lanes(co + offset, width)], acc[row, vector])

    return kernel("conv_forward", body)


def backward_data(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """d[n,oh,ow,co], w[kh,kw,ci,co], scratch → dx[n,h,w,ci].

    Inputs whose padded position is r modulo the stride meet only the taps r, r + stride, …: for
    each such phase, dx is a dense convolution of d within a zero border. Scratch holds that
    bordered d, then the weights with channels swapped, [kh,kw,co,ci].
    """
    top, left = conv.padding[:2]
    rows = _Phases(extent=conv.h, before=top, kernel=conv.kh, stride=conv.stride[0], out=conv.oh)
    columns = _Phases(extent=conv.w, before=left, kernel=conv.kw, stride=conv.stride[1], out=conv.ow)
    swapped = conv.n * rows.total * columns.total * conv.co

    def body() -> None:
        d = argument("d", conv.n, conv.oh, conv.ow, conv.co)
        w = argument("w", conv.kh, conv.kw, conv.ci, conv.co)
        scratch = argument("scratch", swapped + conv.weights)
        dx = argument("dx", conv.n, conv.h, conv.w, conv.ci)

        def bordered(i: Expression, h: Expression, v: Expression, co: Expression) -> Expression:
            return ((i * rows.total + h) * columns.total + v) * conv.co + co

        def weight(kh: Expression, kw: Expression, co: Expression, ci: Expression) -> Expression:
            return swapped + ((kh * conv.kw + kw) * conv.co + co) * conv.ci + ci

        with T.parallel(0, conv.n) as i:
            for h, v, inside in _bordered(rows.border, columns.border):
                for co, width in _channels(cpu, conv.co):
                    at = [i, h - rows.border[0], v - columns.border[0], lanes(co, width)]
                    value = d[tuple(at)] if inside else zero(width)
                    store(scratch, [lanes(bordered(i, h, v, co), width)], value)
        with T.parallel(0, conv.kh * conv.kw) as tap, T.serial(0, conv.ci) as ci:
            kh, kw = _split(tap, conv.kw)
            with T.serial(0, conv.co) as co:
                store(scratch, [weight(kh, kw, co, ci)], w[kh, kw, ci, co])
        with T.parallel(0, conv.n) as i:
            for ci, widths in _groups(cpu, conv.ci):
                for (rh, first_h, some_h), (rw, first_w, some_w) in product(rows, columns):
                    for pixel, count in _pixel_tiles(cpu, some_h, some_w, len(widths)):
                        acc = Tile(count, widths)
                        acc.clear()
                        for th, tw, co in _steps(rows.taps(rh), columns.taps(rw), conv.co):

                            def value(row: int) -> Expression:
                                h, v = pixel(row)
                                h = first_h + h + rows.border[0] - th
                                v = first_w + v + columns.border[0] - tw
                                return scratch[bordered(i, h, v, co)]

                            def taps(offset: int, width: int) -> Expression:
                                kh, kw = rh + rows.stride * th, rw + columns.stride * tw
                                return scratch[lanes(weight(kh, kw, co, ci + offset), width)]

                            acc.add_outer(value, taps)
                        for row, vector, offset, width in acc.cells():
                            h, v = pixel(row)
                            h = rh + rows.stride * (first_h + h) - top
                            v = rw + columns.stride * (first_w + v) - left
                            store(dx, [i, h, v, lanes(ci + offset, width)], acc[row, vector])

    return kernel("conv_backward_data", body)


def stored_gradient(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """xp[n,hp,wp,ci], d[n,oh,ow,co] → g[n,kh*kw*ci*co], s[n].

    g_i is the gradient of example i, laid out as the weight, s_i = ‖g_i‖² of these very numbers
    (`stored_norm_inflation`).
    """

    def body() -> None:
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        d = argument("d", conv.n, conv.oh, conv.ow, conv.co)
        g = argument("g", conv.n, conv.weights)
        s = argument("s", conv.n)
        with T.parallel(0, conv.n) as i:
            norm = _SquaredNorm()
            for co, widths in _groups(cpu, conv.co):
                with norm.of(widths) as squares, T.serial(0, conv.kh) as kh:
                    for kw, ci, tap, count in _tap_tiles(cpu, conv, len(widths)):
                        acc = _correlate(conv, xp, d, i, (kh, kw, ci, co), tap, count, widths)
                        for row, vector, offset, width in acc.cells():
                            v, c = tap(row)
                            at = _weight_index(conv, kh, kw + v, ci + c, co + offset)
                            store(g, [i, lanes(at, width)], acc[row, vector])
                        squares(acc)
            norm.store(s, i, conv.weights)

    return kernel("conv_stored_gradient", body)


def stored_bias(cpu: "Cpu", n: int, pixels: int, co: int) -> PrimFunc:
    """d[n,pixels,co] → g[n,co], s[n]: sums over the pixels and their squared norm."""

    def body() -> None:
        d = argument("d", n, pixels, co)
        g = argument("g", n, co)
        s = argument("s", n)
        with T.parallel(0, n) as i:
            norm = _SquaredNorm()
            for channel, widths in _groups(cpu, co):
                with norm.of(widths) as squares:
                    acc = Tile(1, widths)
                    acc.clear()
                    with T.serial(0, pixels) as p:
                        for row, vector, offset, width in acc.cells():
                            acc.add(row, vector, d[i, p, lanes(channel + offset, width)])
                    for row, vector, offset, width in acc.cells():
                        store(g, [i, lanes(channel + offset, width)], acc[row, vector])
                    squares(acc)
            norm.store(s, i, co)

    return kernel("conv_stored_bias", body)


def weighted_gradient(cpu: "Cpu", conv: Conv) -> PrimFunc:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], c[n], scratch → g[kh,kw,ci,co] = Σ_i c_i g_i.

    g_i is complete, all pixels summed, before it is multiplied by c_i and added, so that rounding
    of the sum over examples is relative to clipped gradients. Where c_i is 0 nothing is added,
    whatever the example holds. Scratch is the sum of a run of examples.
    """
    run = _run(conv)

    def body() -> None:
        xp = argument("xp", conv.n, conv.hp, conv.wp, conv.ci)
        d = argument("d", conv.n, conv.oh, conv.ow, conv.co)
        c = argument("c", conv.n)
        scratch = argument("scratch", conv.weights)
        g = argument("g", conv.kh, conv.kw, conv.ci, conv.co)

        def slice_of(
            kh: Expression, kws: Iterator, cis: Iterator, co: Expression, widths: Sequence[int]
        ) -> None:
            pass

        del slice_of
        for group in channels(conv.co, cpu.lanes):
            limit = registers(cpu) // len(group.widths)
