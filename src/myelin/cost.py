"""What a kernel call costs: counted from its shapes, at rates that were measured.

Counted are vector instructions (`Work`): multiply-adds of products, by the kind of their loop, and
all the others; bytes are those of a call's arguments. One table has the rates of each CPU level
(`RATES`), one formula turns both into time (`Rates.milliseconds`). `python -m benchmarks.kernels`
checks it: predicted against measured, kernel by kernel and for whole gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from myelin.cpu import Cpu, Precision
from myelin.kernels.gram import gram_cost
from myelin.kernels.linear import tile_shape
from myelin.kernels.pool import Pool
from myelin.kernels.window import Conv

Algorithm = Literal["direct", "winograd"]
"""How a convolution or its gradient is computed."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel does. `gflop` are 10⁹ operations of the direct algorithm: the same for each.

    `how` names the algorithm, "" where there is but one. Multiply-adds, each of a whole vector:
    `products` of tiles in registers, `points` of Winograd's domain, `pairs` of Gram matrices,
    `dots` of two bf16 a lane. `steps` are all other vector instructions. `cold` are bytes of its
    arguments that no cache holds, because they were written long before or will be read long after.
    """

    gflop: float
    how: str = ""
    products: float = 0
    points: float = 0
    pairs: float = 0
    dots: float = 0
    steps: float = 0
    cold: int = 0


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
    l2_gbytes: float
    l3_gbytes: float
    memory_gbytes: float
    l2: int = 2 << 20
    l3: int = 8 << 20
    call_ms: float = 0.002

    def milliseconds(self, work: Work, size: int, *, threads: int = 2) -> float:
        """Multiply-adds, then the longer of other instructions and of moving `size` bytes."""
        kinds = (field.name for field in fields(Work) if field.name in _MULTIPLY_ADDS)
        products: float = sum(getattr(work, kind) / getattr(self, kind) for kind in kinds) / 1e6
        slower = 2 / threads
        others = slower * work.steps / self.steps / 1e6
        return self.call_ms + slower * products + max(others, self.moving(size, work.cold))

    def moving(self, size: int, cold: int = 0) -> float:
        """Milliseconds to read or write so many bytes, `cold` of them in no cache."""
        warm = max(0, size - cold)
        near, far = min(warm, self.l2), max(0, warm - self.l3)
        rest = warm - near - far
        return (
            near / self.l2_gbytes + rest / self.l3_gbytes + (far + cold) / self.memory_gbytes
        ) / 1e6


_MULTIPLY_ADDS = ("products", "points", "pairs", "dots")

_AVX512 = Rates(
    products=6.7,
    points=5.4,
    pairs=4.4,
    dots=5.5,
    steps=8.6,
    l2_gbytes=130.0,
    l3_gbytes=95.0,
    memory_gbytes=35.0,
)

RATES: Mapping[str, Rates] = {
    "x86-64-v3": _AVX512,
    "x86-64-v4": _AVX512,
    "znver4": _AVX512,
    "sapphirerapids": _AVX512,
}
"""Rates of each CPU level, fitted to the medians of the five models' kernels on an AMD Zen 4."""


# Convolutions. Winograd's transforms are counted in instructions a vector of channels.

_INPUT, _OUTPUT, _WEIGHT, _ADJOINT = 276, 172, 150, 170
_GRADIENT = 220
"""A vector's 9 taps from its 36 points, written to and read from a scratch first."""


def forward(cpu: Cpu, conv: Conv, how: Algorithm, precision: Precision = "float32") -> Work:
    """A convolution's outputs."""
    gflop = product_gflop(conv)
    inputs, outputs = _vectors(cpu, conv.ci), _vectors(cpu, conv.co)
    if how == "winograd":
        tiles = conv.n * _tiles(conv.oh, conv.ow)
        return Work(
            gflop=gflop,
            how=_how(how, precision),
            **_points(36 * tiles * conv.ci * outputs, precision),
            steps=tiles * (_INPUT * inputs + _OUTPUT * outputs) + _WEIGHT * conv.ci * outputs,
        )
    pixels = conv.n * conv.pixels
    return _direct(gflop, pixels * conv.taps * outputs, pixels * outputs, precision)


def backward_data(cpu: Cpu, conv: Conv, how: Algorithm, precision: Precision = "float32") -> Work:
    """The adjoint of a convolution's inputs."""
    gflop = product_gflop(conv)
    inputs, outputs = _vectors(cpu, conv.ci), _vectors(cpu, conv.co)
    if how == "winograd":
        tiles = conv.n * _tiles(conv.h, conv.w)
        return Work(
            gflop=gflop,
            how=_how(how, precision),
            **_points(36 * tiles * conv.co * inputs, precision),
            steps=tiles * (_INPUT * outputs + _OUTPUT * inputs) + _WEIGHT * conv.co * inputs,
        )
    pixels = conv.n * conv.pixels
    steps = 2 * pixels * outputs + conv.n * conv.h * conv.w * inputs + 2 * conv.weights
    return _direct(gflop, pixels * conv.kh * conv.kw * conv.co * inputs, steps, precision)


def gradient(cpu: Cpu, conv: Conv, how: Algorithm, precision: Precision = "float32") -> Work:
    """All examples' gradients of a convolution, to be stored or summed."""
    gflop = product_gflop(conv)
    inputs, outputs = _vectors(cpu, conv.ci), _vectors(cpu, conv.co)
    if how == "winograd":
        tiles = conv.n * _tiles(conv.oh, conv.ow)
        return Work(
            gflop=gflop,
            how=_how(how, precision),
            **_points(36 * tiles * conv.ci * outputs, precision),
            steps=tiles * (_INPUT * inputs + _ADJOINT * outputs)
            + _GRADIENT * conv.n * conv.ci * outputs,
        )
    products = conv.n * conv.pixels * conv.taps * outputs
    return _direct(gflop, products, 4 * conv.n * conv.taps * outputs, precision)


def gram(cpu: Cpu, conv: Conv) -> Work:
    """Norms of a convolution's gradients from Gram matrices."""
    products = conv.n * gram_cost(conv)
    return Work(gflop=2e-9 * products, how="gram", pairs=products / cpu.lanes)


def product_gflop(conv: Conv) -> float:
    """10⁹ operations of a convolution, and of each of its gradients."""
    return 2e-9 * conv.n * conv.pixels * conv.weights


def _direct(gflop: float, products: float, steps: float, precision: Precision) -> Work:
    if precision == "bf16":
        how = _how("direct", precision)
        return Work(gflop=gflop, how=how, dots=products / 2, steps=steps)
    return Work(gflop=gflop, how="direct", products=products, steps=steps)


def _points(products: float, precision: Precision) -> dict[str, Any]:
    return {"dots": products / 2} if precision == "bf16" else {"points": products}


def _how(how: Algorithm, precision: Precision) -> str:
    """What people read: operands are those of float32 unless it says others."""
    return f"{how} {precision}" if precision == "bf16" else how


def _tiles(height: int, width: int) -> int:
    return -(-height // 4) * -(-width // 4)


def _vectors(cpu: Cpu, numbers: int) -> int:
    """Vectors of a row of so many numbers, the last one partly empty."""
    return -(-numbers // cpu.lanes)


# Everything else


def matrix(
    cpu: Cpu,
    rows: int,
    depth: int,
    columns: int,
    precision: Precision = "float32",
    *,
    scalar: bool = False,
) -> Work:
    """A product [rows, depth] · [depth, columns]; its right factor is packed, one number after the
    other (`scalar`) where it is turned around on the way.
    """
    tile, width = tile_shape(cpu, rows, columns)
    panels, wide = -(-columns // width), _vectors(cpu, width)
    products = -(-rows // tile) * panels * max(tile * wide, _LEAST) * depth
    steps = panels * depth * (4 * width if scalar else 2 * wide)
    gflop, cold = 2e-9 * rows * depth * columns, 4 * depth * columns
    if precision != "float32":
        parts = 3 if precision == "bf16x3" else 1
        return Work(gflop=gflop, dots=parts * products / 2, steps=parts * steps, cold=cold)
    return Work(gflop=gflop, products=products, steps=steps, cold=cold)


_LEAST = 8
"""Multiply-adds at once that hide the time of one."""


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
    cold = 8 * inputs * pool.c if backward else 0
    return Work(gflop=1e-9 * taps * outputs * pool.c, steps=steps, cold=cold)


def statistics(cpu: Cpu, rows: int, channels: int, instructions: int) -> Work:
    """Passes of sums over rows of channels, so many instructions for each vector."""
    steps = instructions * rows * _vectors(cpu, channels)
    return Work(gflop=1e-9 * instructions * rows * channels, steps=steps)
