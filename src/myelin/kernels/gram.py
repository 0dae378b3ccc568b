"""Norms of convolution gradients from Gram matrices of pixels, without forming a gradient.

‖Σ_p x_p ⊗ d_p‖² = Σ_pq ⟨x_p, x_q⟩⟨d_p, d_q⟩ over pairs of output pixels, x_p the patch that p sees.
Both products are symmetric: only pairs p ≤ q are formed. There are two ways to the first one:

- *unfolded*: patches are written out, one product of taps numbers for each pair;
- *shifted* (stride 1): one product of ci numbers for each pair of input pixels. That of two patches
  is then the sum of kh · kw entries of this matrix along a diagonal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.tiles import Tile, grid, segments, steps, widen
from myelin.kernels.tir import (
    TINY,
    Kernel,
    gamma,
    load,
    select,
    serial,
    splat,
    store,
    transposed,
    vectors,
)
from myelin.kernels.window import Conv

_UNIT = 2.0**-24  # rounding unit of float32
_CHUNKS = 8  # parts of the batch, each with a scratch of its own


def gram_cost(conv: Conv) -> int:
    """Multiplications an example that `gram_norm` takes, at the rate of the other kernels."""
    adjoints = _product_cost(conv.pixels, conv.co)
    return min(_unfolded_cost(conv), _shifted_cost(conv)) + adjoints


def gram_kappa(conv: Conv, error: float) -> float:
    """κ of ‖g‖² ≤ s + κ·t, where g is the gradient that `weighted_gradient` adds.

    `error` is ε of ‖g − ĝ‖ ≤ ε·√t: how far that is from the exact gradient ĝ, by the same module's
    `gradient_error`. Gram entries are float32 dot products of length k, off by at most γ_k·|a||b|;
    their products are summed in float64.
    """
    length = conv.ci + conv.kh * conv.kw if _is_shifted(conv) else conv.taps
    patch, adjoint = gamma(length), gamma(conv.co)
    gram = patch + adjoint + patch * adjoint + 4 * _UNIT
    return (1 + _stretch(conv, error)) * gram + error * error + error / math.sqrt(conv.pixels)


def _stretch(conv: Conv, error: float) -> float:
    """θ of ‖g‖² ≤ (‖ĝ‖ + ε·√t)² ≤ (1 + θ)·‖ĝ‖² + (1 + 1/θ)·ε²·t, good where t is about pixels·s."""
    return error * math.sqrt(conv.pixels)


def gram_norm(cpu: Cpu, conv: Conv, error: float) -> Any:
    """xp[n,hp,wp,ci], d[n,oh,ow,co], scratch → s[n], t[n].

    s is ‖g_i‖² up to rounding (`gram_kappa` of the same `error`), t = Σ_p |x_p|² · Σ_p |d_p|² with
    a floor that covers numbers flushed to zero.
    """
    plan = _Shifted(cpu, conv, error) if _is_shifted(conv) else _Unfolded(cpu, conv, error)
    chunks = min(conv.n, _CHUNKS)
    each, left = divmod(conv.n, chunks)
    images = {"xp": (conv.n, conv.hp, conv.wp, conv.ci), "d": (conv.n, conv.oh, conv.ow, conv.co)}
    with Kernel(**images, scratch=(chunks, plan.size), s=(conv.n,), t=(conv.n,)) as kernel:
        xp, d, scratch, s, t = kernel.buffers
        with T.parallel(chunks) as chunk:
            plan.start(scratch, chunk)
            with serial(each) as i:
                plan.example(xp, d, scratch, chunk, chunk * each + i, s, t)
        if left:
            with T.parallel(left) as chunk:
                plan.example(xp, d, scratch, chunk, conv.n - left + chunk, s, t)
    return kernel.function


def _is_shifted(conv: Conv) -> bool:
    return _shifted_cost(conv) < _unfolded_cost(conv)


def _unfolded_cost(conv: Conv) -> int:
    return _product_cost(conv.pixels, conv.taps)


def _shifted_cost(conv: Conv) -> int:
    if conv.stride != (1, 1):
        return 2**62
    sums = _pairs(conv.oh * conv.wp) * conv.kh * conv.kw
    return _product_cost(conv.hp * conv.wp, conv.ci) + sums


def _product_cost(pixels: int, depth: int) -> int:
    """Pairs of pixels, and moving each number to its place, which is as long as 6 products."""
    return (_pairs(pixels) + 6 * pixels) * depth


def _pairs(pixels: int) -> int:
    """Pairs in tiles of 32 columns on or above the diagonal."""
    return pixels * (-(-pixels // 32) * 32 + 32) // 2


class _Gram(ABC):
    """What both ways share. Output pixels are numbered h · pitch + v, pixels last in memory."""

    def __init__(
        self, cpu: Cpu, conv: Conv, error: float, lines: int, line: int, pitch: int
    ) -> None:
        self.cpu, self.conv, self.error = cpu, conv, error
        self.lines, self.line, self.pitch = lines, line, pitch
        self.pixels = (lines - 1) * pitch + line
        self.widths = (cpu.lanes,) * (2 if self.pixels > cpu.lanes else 1)
        self.wide = sum(self.widths)
        self.rows = (16 if cpu.lanes == 16 else 8) // len(self.widths)
        self.length = self.round(self.pixels)
        # The adjoint [co, length] comes first in a chunk's scratch.
        self.size = conv.co * self.length

    @abstractmethod
    def prepare(self, xp: Any, scratch: Any, chunk: Any, i: Any) -> None:
        """Writes what `patch_squares` and `patches` read of example i."""

    @abstractmethod
    def patch_squares(self, scratch: Any, chunk: Any, q: Any) -> Any:
        """|x_q|² in float64 for the vector at q."""

    @abstractmethod
    def patches(self, scratch: Any, chunk: Any, p: Sequence[Any], q: Any) -> Tile:
        """⟨x_p, x_q⟩ for some p and the vectors from q on."""

    def round(self, pixels: int) -> int:
        """Up to whole tiles."""
        return -(-pixels // self.wide) * self.wide

    def reserve(self, size: int) -> int:
        """Where `size` more floats of a chunk's scratch begin."""
        at = self.size
        self.size += size
        return at

    def start(self, scratch: Any, chunk: Any) -> None:
        """Zeros all that no example writes: numbers past the last pixel pair to nothing."""
        for at, lanes in vectors(self.size, self.cpu.lanes):
            store(scratch, splat(0.0, lanes), chunk, at)

    def turn(
        self,
        source: Callable[[Any, Any, Any, int], Any],
        size: tuple[int, int, int],
        pitch: int,
        scratch: Any,
        chunk: Any,
        first: Any,
        length: int,
    ) -> None:
        """source(row, column, channel, lanes) of `size` → [channels, length] at `first`: pixels
        last, row after row of `pitch`, and zeros where there is none.
        """
        height, width, channels = size
        lanes = self.cpu.lanes
        for (block,) in grid(length // lanes):
            pixels = []
            for near in range(lanes):
                q = T.bind(block * lanes + near)
                h, v = q // pitch, q % pitch
                inside = T.bind(T.And(h < height, v < width))
                pixels.append((T.min(h, height - 1), T.min(v, width - 1), inside))
            for channel, wide in vectors(channels, lanes, unroll=1):
                rows = [
                    select(inside, source(h, v, channel, wide), splat(0.0, wide))
                    for h, v, inside in pixels
                ]
                for k, value in enumerate(transposed(rows)):
                    store(scratch, value, chunk, first + (channel + k) * length + block * lanes)

    def product(
        self,
        scratch: Any,
        chunk: Any,
        first: int,
        depth: int,
        length: int,
        p: Sequence[Any],
        q: Any,
    ) -> Tile:
        """⟨a_p, a_q⟩ for some p and the vectors from q on, a[depth, length] at `first`."""
        tile = Tile(len(p), self.widths)
        for (k,) in steps(depth):
            at = first + k * length
            tile.add_outer(
                [load(scratch, chunk, at + row) for row in p],
                [load(scratch, chunk, at + q + o, lanes=n) for o, n in tile.vectors()],
            )
        return tile

    def squares(self, scratch: Any, chunk: Any, first: int, depth: int, length: int, q: Any) -> Any:
        """|a_q|² in float64 for the vector at q."""
        total = Tile(1, (self.cpu.lanes,), "float64")
        for (k,) in steps(depth):
            value = load(scratch, chunk, first + k * length + q, lanes=self.cpu.lanes)
            wide = T.bind(widen(value, self.cpu.lanes))
            total.add(0, 0, wide * wide)
        return total.get(0, 0)

    def whole(self, number: int) -> Any:
        """An integer in all lanes."""
        return T.Broadcast(T.int32(number), self.cpu.lanes)

    def floor(self, terms: int) -> Any:
        """What covers that flushing took from `terms` squares of each pixel."""
        flushed = 4 * terms * self.conv.pixels * TINY
        return T.FloatImm("float64", flushed / gram_kappa(self.conv, self.error))

    def example(self, xp: Any, d: Any, scratch: Any, chunk: Any, i: Any, s: Any, t: Any) -> None:
        """Both results of one example."""
        conv, cpu = self.conv, self.cpu
        pitch = self.pitch if self.lines > 1 else conv.ow

        def adjoint(h: Any, v: Any, co: Any, lanes: int) -> Any:
            return load(d, i, h, v, co, lanes=lanes)

        self.turn(adjoint, (conv.oh, conv.ow, conv.co), pitch, scratch, chunk, 0, self.length)
        self.prepare(xp, scratch, chunk, i)
        adjoints, inputs = (Tile(1, (cpu.lanes,), "float64") for _ in range(2))
        for (block,) in grid(self.length // cpu.lanes):
            q = block * cpu.lanes
            adjoints.add(0, 0, self.squares(scratch, chunk, 0, conv.co, self.length, q))
            pixels = T.Ramp(q, 1, cpu.lanes)
            inside = pixels < self.whole(self.pixels)
            if self.lines > 1:  # between two lines there are pixels of no output
                inside = T.And(inside, pixels % self.whole(self.pitch) < self.whole(self.line))
            patch = self.patch_squares(scratch, chunk, q)
            none = splat(T.FloatImm("float64", 0.0), cpu.lanes)
            inputs.add(0, 0, select(inside, patch, none))
        total = Tile(1, self.widths, "float64")
        for segment in segments(self.line, self.rows):
            for h, block, column in grid(self.lines, segment.count, self.length // self.wide):
                first, q = h * self.pitch + segment.at(block), column * self.wide
                with T.If(q + self.wide > first), T.Then():
                    rows = [first + r for r in range(segment.size)]
                    x = self.patches(scratch, chunk, rows, q)
                    y = self.product(scratch, chunk, 0, conv.co, self.length, rows, q)
                    for row, vector, offset, lanes in x.cells():
                        once = x.get(row, vector)
                        here, there = splat(rows[row], lanes), T.Ramp(q + offset, 1, lanes)
                        pair = select(there == here, once, once + once)
                        upper = select(there < here, splat(0.0, lanes), pair)
                        own = widen(y.get(row, vector), lanes)
                        total.add(0, vector, widen(upper, lanes) * own)
        stretch = T.FloatImm("float64", 1 + _stretch(conv, self.error))
        store(s, T.Cast("float32", stretch * total.sum()), i)
        reach = (adjoints.sum() + self.floor(conv.co)) * (inputs.sum() + self.floor(conv.taps))
        up = T.FloatImm("float64", 1 + 8 * _UNIT)
        store(t, T.Cast("float32", reach * up), i)


class _Unfolded(_Gram):
    """Patches [taps, length] in scratch; all pixels are one line."""

    def __init__(self, cpu: Cpu, conv: Conv, error: float) -> None:
        super().__init__(cpu, conv, error, 1, conv.pixels, conv.pixels)
        self.at = self.reserve(conv.taps * self.length)

    def prepare(self, xp: Any, scratch: Any, chunk: Any, i: Any) -> None:
        conv, (sh, sw) = self.conv, self.conv.stride
        for kh, kw in grid(conv.kh, conv.kw):
            first = self.at + (kh * conv.kw + kw) * conv.ci * self.length

            def input_(h: Any, v: Any, ci: Any, lanes: int) -> Any:
                return load(xp, i, h * sh + kh, v * sw + kw, ci, lanes=lanes)  # noqa: B023

            size = (conv.oh, conv.ow, conv.ci)
            self.turn(input_, size, conv.ow, scratch, chunk, first, self.length)

    def patch_squares(self, scratch: Any, chunk: Any, q: Any) -> Any:
        return self.squares(scratch, chunk, self.at, self.conv.taps, self.length, q)

    def patches(self, scratch: Any, chunk: Any, p: Sequence[Any], q: Any) -> Tile:
        return self.product(scratch, chunk, self.at, self.conv.taps, self.length, p, q)


class _Shifted(_Gram):
    """Input pixels [ci, across], their Gram matrix [image, across] and their squares [across]."""

    def __init__(self, cpu: Cpu, conv: Conv, error: float) -> None:
        super().__init__(cpu, conv, error, conv.oh, conv.ow, conv.wp)
        self.image = conv.hp * conv.wp
        shift = (conv.kh - 1) * conv.wp + conv.kw - 1
        self.across = self.round(max(self.image, self.length + shift))
        self.inputs = self.reserve(conv.ci * self.across)
        self.gram = self.reserve(self.image * self.across)
        self.norms = self.reserve(self.across)

    def shifts(self) -> Iterator[int]:
        """How far each number of a patch is from its first."""
        for kh in range(self.conv.kh):
            for kw in range(self.conv.kw):
                yield kh * self.conv.wp + kw

    def prepare(self, xp: Any, scratch: Any, chunk: Any, i: Any) -> None:
        conv, lanes = self.conv, self.cpu.lanes

        def pixel(h: Any, v: Any, ci: Any, lanes: int) -> Any:
            return load(xp, i, h, v, ci, lanes=lanes)

        size = (conv.hp, conv.wp, conv.ci)
        self.turn(pixel, size, conv.wp, scratch, chunk, self.inputs, self.across)
        for (block,) in grid(self.across // lanes):
            q = block * lanes
            square = self.squares(scratch, chunk, self.inputs, conv.ci, self.across, q)
            store(scratch, T.Cast(f"float32x{lanes}", square), chunk, self.norms + q)
        for segment in segments(self.image, self.rows):
            for block, column in grid(segment.count, self.across // self.wide):
                first, q = segment.at(block), column * self.wide
                with T.If(q + self.wide > first), T.Then():
                    rows = [first + r for r in range(segment.size)]
                    tile = self.product(scratch, chunk, self.inputs, conv.ci, self.across, rows, q)
                    for row, vector, offset, _ in tile.cells():
                        at = self.gram + rows[row] * self.across + q + offset
                        store(scratch, tile.get(row, vector), chunk, at)

    def patch_squares(self, scratch: Any, chunk: Any, q: Any) -> Any:
        lanes = self.cpu.lanes
        terms = [
            widen(load(scratch, chunk, self.norms + q + shift, lanes=lanes), lanes)
            for shift in self.shifts()
        ]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def patches(self, scratch: Any, chunk: Any, p: Sequence[Any], q: Any) -> Tile:
        tile = Tile(len(p), self.widths)
        for shift in self.shifts():
            for row, vector, offset, lanes in tile.cells():
                at = self.gram + (p[row] + shift) * self.across + q + offset + shift
                tile.add(row, vector, load(scratch, chunk, at, lanes=lanes))
        return tile
