"""What a layer's norm and a kernel call cost, and what is chosen for it.

One table of measured machine constants a CPU level (`RATES`), one estimate of time from operations
and bytes (`Rates.milliseconds`), one choice: a convolution's per-example gradients are stored where
that is faster than Gram matrices, the best saving a byte first, until the memory budget of the
whole graph is spent. `Decision` says what was chosen and what it should take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from myelin.kernels.gram import gram_cost
from myelin.kernels.window import Conv

Method = Literal["product", "stored", "gram", "none"]

STORED_BYTES = 128 << 20
"""Default memory budget for the stored per-example gradients of all convolutions together."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Measured on two threads: 10⁹ float32 operations a second of products, of products whose rows
    are one vector (16 channels or fewer at 16 lanes), 10⁹ bytes a second in cache and in memory.
    """

    lanes: int
    gflops: float
    narrow_gflops: float
    cache_gbytes: float
    memory_gbytes: float
    cache: int = 24 << 20
    call_ms: float = 0.003

    def milliseconds(self, gflop: float, size: int, *, narrow: bool = False) -> float:
        """The longer of computing and moving `size` bytes, and the start of a call."""
        compute = 1e3 * gflop / (self.narrow_gflops if narrow else self.gflops)
        return max(compute, self.moving(size)) + self.call_ms

    def moving(self, size: int) -> float:
        """Milliseconds to read or write so many bytes."""
        return size / (self.cache_gbytes if size <= self.cache else self.memory_gbytes) / 1e6


_AVX512 = Rates(lanes=16, gflops=205.0, narrow_gflops=160.0, cache_gbytes=95.0, memory_gbytes=28.0)

RATES: Mapping[str, Rates] = {
    "x86-64-v3": Rates(
        lanes=8, gflops=205.0, narrow_gflops=160.0, cache_gbytes=95.0, memory_gbytes=28.0
    ),
    "x86-64-v4": _AVX512,
    "znver4": _AVX512,
    "sapphirerapids": _AVX512,
}
"""Rates of each CPU level, from the medians of the five models' kernels on an AMD Zen 4."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A kernel call of the gradient: whose layer it is, how its norm is taken, what it costs.

    `layer` is "" for what belongs to none (loss, clip factors); `bytes` are those of its arguments.
    """

    layer: str
    kernel: str
    method: Method
    gflop: float
    ms: float
    bytes: int


def store(convolutions: Mapping[str, Conv], level: str, budget: int) -> set[str]:
    """The names of those whose per-example gradients are stored, in `budget` bytes altogether."""
    savings = {name: _saving(conv, RATES[level]) for name, conv in convolutions.items()}
    by_worth = sorted(
        (name for name, saved in savings.items() if saved > 0),
        key=lambda name: (-savings[name] / _stored_bytes(convolutions[name]), name),
    )
    stored: set[str] = set()
    for name in by_worth:
        size = _stored_bytes(convolutions[name])
        if size <= budget:
            budget -= size
            stored.add(name)
    return stored


def product_gflop(conv: Conv) -> float:
    """10⁹ operations of a convolution, and of each of its gradients."""
    return 2e-9 * conv.n * conv.pixels * conv.weights


def gram_gflop(conv: Conv) -> float:
    """10⁹ operations of its norm from Gram matrices."""
    return 2e-9 * conv.n * gram_cost(conv)


def _saving(conv: Conv, rates: Rates) -> float:
    """Milliseconds that storing saves against Gram matrices and a weighted product."""
    narrow = conv.co <= rates.lanes
    product = product_gflop(conv)
    size = _stored_bytes(conv)
    activations = 4 * conv.n * (conv.hp * conv.wp * conv.ci + conv.pixels * conv.co)
    once = rates.milliseconds(product, activations, narrow=narrow)
    stored = once + rates.moving(size) + rates.milliseconds(0.0, size)  # written, then read
    gram = rates.milliseconds(gram_gflop(conv), activations) + once
    return gram - stored


def _stored_bytes(conv: Conv) -> int:
    return 4 * conv.n * conv.weights
