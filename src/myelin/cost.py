"""What a kernel call costs: counted from its shapes, at rates that were measured.

Counted are vector instructions (`Work`): multiply-adds of products, by the kind of their loop, and
all the others; bytes are those of a call's arguments. One table has the rates of each CPU level
(`RATES`), one formula turns both into time (`Rates.milliseconds`). `python -m benchmarks.kernels`
checks it: predicted against measured, kernel by kernel and for whole gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from myelin.cpu import Cpu, Precision
from myelin.kernels import amx, amx_conv
from myelin.kernels.conv import batch_shares
from myelin.kernels.gram import gram_cost
from myelin.kernels.linear import tile_shape
from myelin.kernels.operands import BF16, FLOAT32
from myelin.kernels.pool import Pool
from myelin.kernels.tiles import largest_divisor, run_length
from myelin.kernels.window import Conv, Product
from myelin.kernels.winograd import Sums, gradient_scratch

Algorithm = Literal[
    "direct", "winograd", "direct bf16", "winograd bf16", "tiles bf16", "tiles bf16x3"
]
"""How a convolution or its gradient is computed: directly, by Winograd or directly in tiles, of
which operands."""
WINOGRAD = ("winograd", "winograd bf16")
TILES = {"tiles bf16": amx_conv.BF16, "tiles bf16x3": amx_conv.BF16X3}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel does. `gflop` are 10⁹ operations of the direct algorithm: the same for each.

    `algorithm` names it, for a linear layer the precision of its operands; "" where there is but
    one. Multiply-adds, each of a whole vector:
    `products` of tiles in registers, `points` of Winograd's domain, `pairs` of Gram matrices,
    `dots` of two bf16 a lane; and, not of vectors, `tiles` are products of whole tiles. `steps` are
    all other vector instructions. Multiply-adds take `waiting` times as long as their rates say,
    where results are needed sooner than they are there. `cold` are bytes of its arguments that no
    cache holds, because they were written long before or will be read long after; `scratch` are
    bytes that it keeps besides.
    """

    gflop: float
    algorithm: str = ""
    products: float = 0
    points: float = 0
    pairs: float = 0
    dots: float = 0
    tiles: float = 0
    steps: float = 0
    waiting: float = 1
    cold: int = 0
    scratch: int = 0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What two threads do in a second: 10⁹ vector instructions of each kind of `Work`.

    Of a call's bytes the first `l2` move at `l2_gbytes` (10⁹ a second), those up to `l3` at
    `l3_gbytes`, the others at `memory_gbytes`.
    """

    products: float
    points: float
    pairs: float
    dots: float
    steps: float
    tiles: float = 0.0
    l2_gbytes: float = 130.0
    l3_gbytes: float = 95.0
    memory_gbytes: float = 35.0
    l2: int = 2 << 20
    l3: int = 8 << 20
    call_ms: float = 0.002

    def milliseconds(self, work: Work, size: int, *, threads: int = 2) -> float:
        """Multiply-adds, then the longer of other instructions and of moving `size` bytes."""
        counts = {kind: getattr(work, kind) for kind in _MULTIPLY_ADDS}
        products: float = sum(n / getattr(self, kind) for kind, n in counts.items() if n) / 1e6
        slower = 2 / threads
        others = slower * work.steps / self.steps / 1e6
        return (
            self.call_ms
            + slower * work.waiting * products
            + max(others, self.moving(size, work.cold))
        )

    def moving(self, size: int, cold: int = 0) -> float:
        """Milliseconds to read or write so many bytes, `cold` of them in no cache."""
        warm = max(0, size - cold)
        near, far = min(warm, self.l2), max(0, warm - self.l3)
        rest = warm - near - far
        return (
            near / self.l2_gbytes + rest / self.l3_gbytes + (far + cold) / self.memory_gbytes
        ) / 1e6


_MULTIPLY_ADDS = ("products", "points", "pairs", "dots", "tiles")

_AVX512 = Rates(products=7.1, points=5.7, pairs=4.7, dots=6.4, steps=9.1)

RATES: Mapping[str, Rates] = {
    "x86-64-v3": Rates(products=12.5, points=10.0, pairs=8.2, dots=0.0, steps=14.0),
    "x86-64-v4": _AVX512,
    "znver4": _AVX512,
    "sapphirerapids": Rates(
        products=10.4,
        points=7.1,
        pairs=4.2,
        dots=3.4,
        tiles=0.12,
        steps=6.9,
        l2_gbytes=43.0,
        l3_gbytes=58.0,
        memory_gbytes=34.0,
    ),
}
"""Rates of each CPU level, fitted to the medians of the five models' kernels: those of
sapphirerapids, in float32 and bf16 together, on an Intel Xeon with AMX, the others on an AMD Zen 4,
there before Gram norms turned pixels by shuffles, stored gradients were written past the caches
and linear layers packed where they read: most kernels are faster now than it says.
"""


# Convolutions. Winograd's transforms are counted in instructions a vector of channels.

_INPUT, _OUTPUT, _ADJOINT = 276, 172, 170
_WEIGHT, _TURNED_WEIGHT = 250, 500
_PACKING, _PACKING_TILES = 6, 24
_ALONE = 3
"""Products of tiles in the time of one whose result is needed at once."""
_STORED, _WEIGHTED = 340, 190
"""A vector's 9 taps from its 36 points, written to and read from a scratch first."""


def forward(cpu: Cpu, conv: Conv, algorithm: Algorithm) -> Work:
    """A convolution's outputs."""
    inputs, outputs = _vectors(cpu, conv.ci), _vectors(cpu, conv.co)
    pixels = conv.n * conv.pixels
    if algorithm in WINOGRAD:
        tiles = conv.n * _tiles(conv.oh, conv.ow)
        return _transformed(cpu, conv, algorithm, tiles, conv.ci, conv.co, _WEIGHT)
    if algorithm in TILES:
        return _in_tiles(conv, algorithm, "forward")
    return _direct(conv, algorithm, pixels * conv.taps * outputs, pixels * (inputs + outputs))


def backward_data(cpu: Cpu, conv: Conv, algorithm: Algorithm) -> Work:
    """The adjoint of a convolution's inputs."""
    inputs, outputs = _vectors(cpu, conv.ci), _vectors(cpu, conv.co)
    if algorithm in WINOGRAD:
        tiles = conv.n * _tiles(conv.h, conv.w)
        return _transformed(cpu, conv, algorithm, tiles, conv.co, conv.ci, _TURNED_WEIGHT)
    if algorithm in TILES:
        return _in_tiles(conv, algorithm, "backward_data")
    pixels = conv.n * conv.pixels
    steps = 4 * pixels * outputs + conv.n * conv.h * conv.w * inputs + 2 * conv.weights
    return _direct(conv, algorithm, pixels * conv.kh * conv.kw * conv.co * inputs, steps)


def stored_gradient(cpu: Cpu, conv: Conv, algorithm: Algorithm) -> Work:
    """All examples' gradients of a convolution, written for later."""
    if algorithm in TILES:
        return _in_tiles(conv, algorithm, "stored_gradient")
    return _gradient(cpu, conv, algorithm, _STORED, conv.n)


def weighted_gradient(cpu: Cpu, conv: Conv, algorithm: Algorithm) -> Work:
    """The weighted sum of all examples' gradients of a convolution."""
    if algorithm in TILES:
        return _in_tiles(conv, algorithm, "weighted_gradient")
    return _gradient(cpu, conv, algorithm, _WEIGHTED, conv.n, sums=Sums(conv=conv))


def batch_gradient(cpu: Cpu, conv: Conv, algorithm: Algorithm) -> Work:
    """The sum of all examples' gradients of a convolution, of which none is found alone."""
    if algorithm in TILES:
        return _in_tiles(conv, algorithm, "batch_gradient")
    if algorithm in WINOGRAD:
        sums = Sums(conv=conv)
        runs = sums.runs * sums.example_shares
        return _gradient(cpu, conv, algorithm, _WEIGHTED, runs, sums=sums)
    shares = batch_shares(conv)
    each = conv.n // shares
    runs = shares * (-(-each // run_length(each)) + 1)
    work = _gradient(cpu, conv, algorithm, _WEIGHTED, runs)
    return replace(work, scratch=4 * shares * conv.weights)


def squared_norm(cpu: Cpu, conv: Conv, algorithm: Algorithm) -> Work:
    """The norms of all examples' gradients of a convolution, none of which is kept."""
    del cpu
    return _in_tiles(conv, algorithm, "squared_norm")


def gram(cpu: Cpu, conv: Conv) -> Work:
    """Norms of a convolution's gradients from Gram matrices."""
    products = conv.n * gram_cost(conv)
    return Work(gflop=2e-9 * products, algorithm="gram", pairs=products / cpu.lanes)


def _in_tiles(conv: Conv, algorithm: Algorithm, kind: Product | Literal["squared_norm"]) -> Work:
    counted = TILES[algorithm].count(conv, kind)
    stored = 4 * conv.n * conv.weights if kind == "stored_gradient" else 0
    return _work(
        conv,
        algorithm,
        tiles=counted.products,
        steps=counted.others,
        # Measured when a line was read before it was written. The counts of direct and
        # Winograd gradients have what that takes in their other instructions.
        cold=3 * stored,
        scratch=counted.scratch,
    )


def _transformed(
    cpu: Cpu, conv: Conv, algorithm: Algorithm, tiles: int, depth: int, channels: int, weight: int
) -> Work:
    inputs, outputs = _vectors(cpu, depth), _vectors(cpu, channels)
    rows = largest_divisor(largest_divisor(tiles), 8)
    return _multiplied(
        conv,
        algorithm,
        36 * tiles * depth * outputs,
        tiles * (_INPUT * inputs + _OUTPUT * outputs) + weight * depth * outputs,
        waiting=_waiting(rows * min(2, outputs)),
        scratch=4 * 36 * depth * channels // (2 if algorithm == "winograd bf16" else 1),
    )


def _gradient(
    cpu: Cpu, conv: Conv, algorithm: Algorithm, taps: int, found: int, *, sums: Sums | None = None
) -> Work:
    """`taps` instructions make a vector's nine from its points, for each of `found` gradients."""
    inputs, outputs = _vectors(cpu, conv.ci), _vectors(cpu, conv.co)
    if algorithm in WINOGRAD:
        tiles = conv.n * _tiles(conv.oh, conv.ow)
        adjoints, totals = (sums.channel_shares, sums.example_shares) if sums else (1, 0)
        operands = BF16 if algorithm == "winograd bf16" else FLOAT32
        return _multiplied(
            conv,
            algorithm,
            36 * tiles * conv.ci * outputs,
            tiles * (_INPUT * inputs + adjoints * _ADJOINT * outputs)
            + taps * found * conv.ci * outputs
            + 2 * totals * conv.weights / cpu.lanes,
            waiting=_waiting(min(8, conv.ci) * min(2, outputs)),
            scratch=gradient_scratch(cpu, conv, sums=sums, operands=operands),
        )
    products = conv.n * conv.pixels * conv.taps * outputs
    return _direct(conv, algorithm, products, 4 * found * conv.taps * outputs)


def _multiplied(
    conv: Conv, algorithm: Algorithm, points: float, steps: float, *, waiting: float, scratch: int
) -> Work:
    """Products in the domain of points."""
    kinds = {"dots": points / 2} if algorithm == "winograd bf16" else {"points": points}
    return _work(conv, algorithm, **kinds, steps=steps, waiting=waiting, scratch=scratch)


def _direct(conv: Conv, algorithm: Algorithm, products: float, steps: float) -> Work:
    if algorithm == "direct bf16":
        packing = _PACKING * conv.n * (conv.hp * conv.wp * conv.ci + conv.pixels * conv.co) / 16
        return _work(conv, algorithm, dots=products / 2, steps=steps + packing)
    return _work(conv, algorithm, products=products, steps=steps)


def _work(conv: Conv, algorithm: Algorithm, **counts: Any) -> Work:
    gflop = 2e-9 * conv.n * conv.pixels * conv.weights
    return Work(gflop=gflop, algorithm=algorithm, **counts)


def _tiles(height: int, width: int) -> int:
    return -(-height // 4) * -(-width // 4)


def _vectors(cpu: Cpu, numbers: int) -> int:
    """Vectors of a row of so many numbers, the last one partly empty."""
    return -(-numbers // cpu.lanes)


_LEAST = 8
"""Multiply-adds at once that hide the time of one."""


def _waiting(at_once: int) -> float:
    """How much longer multiply-adds take of which only so many run at once."""
    return max(at_once, _LEAST) / at_once


# Everything else


def matrix(
    cpu: Cpu,
    rows: int,
    depth: int,
    columns: int,
    precision: Precision = "float32",
    *,
    scalar: bool = False,
    chained: bool = False,
) -> Work:
    """A product [rows, depth] · [depth, columns]; its right factor is packed once, with more
    instructions (`scalar`) where it is turned around on the way. `chained`: its sums are short.
    """
    gflop, cold = 2e-9 * rows * depth * columns, 4 * depth * columns
    parts = 3 if precision == "bf16x3" else 1
    if precision != "float32" and amx.FEATURE in cpu.features:
        return Work(
            gflop=gflop,
            algorithm=precision,
            tiles=amx.products(rows, columns, depth) * parts,
            waiting=_ALONE if chained else 1,
            steps=_PACKING_TILES * parts * (rows + columns) * _vectors(cpu, depth),
            cold=cold,
        )
    tile, width = tile_shape(cpu, rows, columns)
    panels, wide = -(-columns // width), _vectors(cpu, width)
    products = -(-rows // tile) * panels * tile * wide * depth
    waiting = _waiting(tile * wide)
    steps = panels * depth * (4 * width if scalar else 2 * wide)
    if precision != "float32":
        return Work(
            gflop=gflop,
            algorithm=precision,
            dots=parts * products / 2,
            waiting=waiting,
            steps=parts * steps,
            cold=cold,
        )
    return Work(gflop=gflop, products=products, waiting=waiting, steps=steps, cold=cold)


def elementwise(cpu: Cpu, numbers: int, instructions: int) -> Work:
    """A pass over so many numbers with so many instructions for each vector of them."""
    steps = instructions * _vectors(cpu, numbers)
    return Work(gflop=1e-9 * instructions * numbers, steps=steps)


def copy(cpu: Cpu, numbers: int, *, scalar: bool = False, cold: int = 0) -> Work:
    """A copy, number by number where its order changes."""
    steps = 3 * numbers if scalar else 2 * _vectors(cpu, numbers)
    return Work(gflop=0.0, steps=steps, cold=cold)


def pooling(cpu: Cpu, pool: Pool, *, backward: bool) -> Work:
    """A pass of windows; backward reads what forward read long ago."""
    taps = pool.kh * pool.kw
    outputs, inputs = pool.n * pool.pixels, pool.n * pool.h * pool.w
    steps = 3 * taps * outputs * _vectors(cpu, pool.c)
    if backward and not pool.tiled:
        steps += 3 * inputs * _vectors(cpu, pool.c)  # cleared before, and read and written after
    cold = 8 * inputs * pool.c if backward else 0
    return Work(gflop=1e-9 * taps * outputs * pool.c, steps=steps, cold=cold)


def statistics(cpu: Cpu, rows: int, channels: int, instructions: int) -> Work:
    """Passes of sums over rows of channels, so many instructions for each vector."""
    steps = instructions * rows * _vectors(cpu, channels)
    return Work(gflop=1e-9 * instructions * rows * channels, steps=steps)
