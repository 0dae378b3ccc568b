"""Clip factors and clipped sums.

c_i = mask_i · min(1, C / n̂_i), where n̂_i is an upper bound of the true norm of example i's
gradient: every squared norm is first raised by what rounding can have taken away. A norm that is
not finite gives exactly 0, and an example with c_i = 0 adds exactly zero to every sum, whatever its
gradient holds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.functions import is_finite
from myelin.kernels.tiles import largest_divisor, widen
from myelin.kernels.tir import (
    Kernel,
    blocks,
    gamma,
    load,
    number,
    select,
    serial,
    splat,
    store,
    tasks,
    vectors,
    workspace,
)
from myelin.kernels.update import HYPER


def clip_factors(
    cpu: Cpu,
    n: int,
    terms: int,
    grams: int = 0,
    *,
    inflation: Sequence[float],
    kappa: Sequence[float] = (),
) -> Any:
    """mask[n], hyper[16], s_1[n] … s_terms[n], then (s[n], t[n]) of each gram layer → c[n], with C
    = hyper[0].

    n̂² = Σ s_j · (1 + inflation_j) + Σ (s_g + kappa_g · t_g), raised by the rounding of this sum
    itself. `inflation` is what the kernel that made s_j states (`linear.squared_norm_inflation`);
    `kappa` bounds the error of a gram norm's square relative to t = |X|²·|D|². A kernel takes at
    most 14 arguments: add up further layers with `norm_sum`, whose result is a term with inflation
    0.
    """
    with Kernel(mask=(n,), hyper=(HYPER,), **_norm_buffers(n, terms, grams), c=(n,)) as kernel:
        mask, hyper, *norms, c = kernel.buffers
        threshold = T.bind(load(hyper, 0))
        for at, lanes in blocks(n, cpu.lanes):
            square = _upper_bound(norms, at, lanes, terms, inflation, kappa)
            factor = splat(threshold, lanes) / T.sqrt(square)
            factor = T.min(factor, splat(1.0, lanes))
            counted = T.And(is_finite(square), load(mask, at, lanes=lanes) > splat(0.0, lanes))
            store(c, select(counted, factor, splat(0.0, lanes)), at)
    return kernel.function


def norm_sum(
    cpu: Cpu,
    n: int,
    terms: int,
    grams: int = 0,
    *,
    inflation: Sequence[float],
    kappa: Sequence[float] = (),
) -> Any:
    """s_1[n] … s_terms[n], then (s[n], t[n]) of each gram layer → u[n], an upper bound of the sum
    of squared norms.
    """
    with Kernel(**_norm_buffers(n, terms, grams), u=(n,)) as kernel:
        *norms, u = kernel.buffers
        for at, lanes in blocks(n, cpu.lanes):
            store(u, _upper_bound(norms, at, lanes, terms, inflation, kappa), at)
    return kernel.function


def weighted_sum(cpu: Cpu, n: int, m: int) -> Any:
    """g[n, m], c[n] → out[m] = Σ_i c_i · g_i, added in float64 and rounded once.

    A small sum is dealt out by examples, as the gradients were when they were written: each thread
    finds its own near it. Of a large one no cache holds the gradients.
    """
    shares = largest_divisor(n, _SHARES) if m <= _SMALL else 1
    with Kernel(g=(n, m), c=(n,), out=(m,)) as kernel:
        g, c, out = kernel.buffers

        def loop(extent: int) -> Any:
            return tasks(extent, 3 * n * -(-m // cpu.lanes))

        parts = workspace(shares, m, dtype="float64")
        with loop(shares) as share:
            each = n // shares
            for first, size in blocks(m, _columns(cpu, m), loop if shares == 1 else serial):
                for at, lanes in vectors(size, cpu.lanes):
                    store(parts, splat(T.float64(0.0), lanes), share, first + at)
                for near, rows in blocks(each, _ROWS):
                    start = share * each + near
                    weights = [T.bind(load(c, start + i)) for i in range(rows)]
                    for at, lanes in vectors(size, cpu.lanes, 2):
                        value = load(parts, share, first + at, lanes=lanes)
                        for i, weight in enumerate(weights):
                            kept = select(
                                splat(weight, lanes) != splat(0.0, lanes),
                                load(g, start + i, first + at, lanes=lanes),
                                splat(0.0, lanes),
                            )
                            factor = splat(T.Cast("float64", weight), lanes)
                            value = value + widen(kept, lanes) * factor
                        store(parts, value, share, first + at)
        for first, size in blocks(m, 16 * cpu.lanes, loop):
            for at, lanes in vectors(size, cpu.lanes):
                value = load(parts, 0, first + at, lanes=lanes)
                for share in range(1, shares):
                    value = value + load(parts, share, first + at, lanes=lanes)
                kind = "float32" if lanes == 1 else f"float32x{lanes}"
                store(out, T.Cast(kind, value), first + at)
    return kernel.function


_SHARES = 8
_SMALL = 1 << 14  # numbers of a sum whose parts leave room for gradients in the caches

# Rows that one pass over a block of `weighted_sum` adds.
_ROWS = 8


def _columns(cpu: Cpu, m: int) -> int:
    """Columns of a block of `weighted_sum`: about two pages of each row, and even work for threads.

    Narrower blocks of a large matrix take a page of memory from every row for a few numbers: a
    quarter of the speed.
    """
    count = max(8, 2 * round(m / 4096))
    return -(-m // (count * cpu.lanes)) * cpu.lanes


def weighted_sum_additions(_n: int) -> int:
    """Bounds the float32 roundings of `weighted_sum` over the examples: one, and one for float64's
    share.
    """
    return 2


def _norm_buffers(n: int, terms: int, grams: int) -> dict[str, tuple[int, ...]]:
    names = [f"s_{j}" for j in range(terms)]
    names += [f"{kind}_gram_{j}" for j in range(grams) for kind in ("s", "t")]
    return dict.fromkeys(names, (n,))


def _upper_bound(
    norms: Sequence[Any],
    at: Any,
    lanes: int,
    terms: int,
    inflation: Sequence[float],
    kappa: Sequence[float],
) -> Any:
    """Adds squared norms so that the result is at least the true sum."""
    grams = (len(norms) - terms) // 2
    if len(inflation) != terms or len(kappa) != grams:
        raise ValueError(
            f"{terms} norms need as many inflations, {grams} gram norms as many kappas;"
            f" got {len(inflation)} and {len(kappa)}"
        )
    # Each term sees at most this many roundings here, the root and the division by it included.
    own = gamma(terms + 2 * grams + 8)
    # A product that was flushed to zero lost less than the smallest normal number.
    bound = splat(len(norms) * 2.0**-125, lanes)
    for norm, excess in zip(norms[:terms], inflation, strict=True):
        factor = number(_round_up((1 + excess) * (1 + own)))
        bound = bound + load(norm, at, lanes=lanes) * factor
    for j, excess in enumerate(kappa):
        square = load(norms[terms + 2 * j], at, lanes=lanes)
        largest = load(norms[terms + 2 * j + 1], at, lanes=lanes)
        # Cancellation can leave a negative square. TVM's max would make 0 of NaN, so what is not
        # finite goes around it.
        raised = T.bind(square + largest * number(_round_up(excess * (1 + own))))
        positive = select(is_finite(raised), T.max(raised, splat(0.0, lanes)), raised)
        bound = bound + positive * number(_round_up(1 + own))
    return T.bind(bound)


def _round_up(value: float) -> float:
    """The smallest float32 that is at least `value` (positive)."""
    nearest = float(struct.unpack("<f", struct.pack("<f", value))[0])
    if nearest >= value:
        return nearest
    bits = struct.unpack("<I", struct.pack("<f", nearest))[0] + 1
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])
