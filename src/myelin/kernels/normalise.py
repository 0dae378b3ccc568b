"""Group and layer normalisation without scale and shift, its adjoint, and scales' own gradients.

A value is seen as x[n, pixels, groups, each]: statistics are over pixels and the `each` numbers of
a group. An image in channels-last order is this as it lies; a layer norm is one group.

    forward(cpu, n, pixels, groups, each, epsilon=…)    x → stats[n, 2, c], y, c = groups · each
    backward(cpu, n, pixels, groups, each)              y, d, stats, scratch → dx
    stored_scale(cpu, n, pixels, c)                     x, d → g[n, c], s[n]

stats holds every channel's mean and 1 / √(variance + ε), as its group has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.tir import (
    TINY,
    Kernel,
    blocks,
    gamma,
    load,
    local,
    number,
    pieces,
    serial,
    splat,
    store,
    tasks,
)


def forward(cpu: Cpu, n: int, pixels: int, groups: int, each: int, *, epsilon: float) -> Any:
    """x[n, pixels, groups · each] → stats, y = (x − mean) / √(variance + ε)."""
    c, share = groups * each, number(1 / (pixels * each))
    with Kernel(x=(n, pixels, c), stats=(n, 2, c), y=(n, pixels, c)) as kernel:
        x, stats, y = kernel.buffers
        with tasks(n, 6 * n * pixels * -(-c // cpu.lanes)) as i:

            def centred(p: Any, at: Any, lanes: int) -> Any:
                value = load(x, i, p, at, lanes=lanes)
                return T.bind(value - load(stats, i, 0, at, lanes=lanes))

            def square(p: Any, at: Any, lanes: int) -> Any:
                value = centred(p, at, lanes)
                return value * value

            _sum_pixels(cpu, stats, (i, 0), pixels, c, lambda *at: load(x, i, *at[:2], lanes=at[2]))
            _share(stats, (i, 0), groups, each, lambda total: total * share)
            _sum_pixels(cpu, stats, (i, 1), pixels, c, square)
            _share(
                stats,
                (i, 1),
                groups,
                each,
                lambda total: number(1.0) / T.sqrt(total * share + number(epsilon)),
            )
            for p, at, lanes in _vectors(cpu, pixels, c):
                scale = load(stats, i, 1, at, lanes=lanes)
                store(y, centred(p, at, lanes) * scale, i, p, at)
    return kernel.function


def backward(cpu: Cpu, n: int, pixels: int, groups: int, each: int) -> Any:
    """y, d [n, pixels, groups · each], stats, scratch → dx = (d − mean(d) − y · mean(d · y)) / √….

    Scratch holds both means of every channel's group.
    """
    c, share = groups * each, number(1 / (pixels * each))
    images, sums = (n, pixels, c), (n, 2, c)
    with Kernel(y=images, d=images, stats=sums, scratch=sums, dx=images) as kernel:
        y, d, stats, scratch, dx = kernel.buffers
        with tasks(n, 6 * n * pixels * -(-c // cpu.lanes)) as i:

            def adjoint(p: Any, at: Any, lanes: int) -> Any:
                return load(d, i, p, at, lanes=lanes)

            def slope(p: Any, at: Any, lanes: int) -> Any:
                return adjoint(p, at, lanes) * load(y, i, p, at, lanes=lanes)

            for row, value in enumerate((adjoint, slope)):
                _sum_pixels(cpu, scratch, (i, row), pixels, c, value)
                _share(scratch, (i, row), groups, each, lambda total: total * share)
            for p, at, lanes in _vectors(cpu, pixels, c):
                mean, tilt = (load(scratch, i, row, at, lanes=lanes) for row in range(2))
                centred = adjoint(p, at, lanes) - mean - load(y, i, p, at, lanes=lanes) * tilt
                store(dx, centred * load(stats, i, 1, at, lanes=lanes), i, p, at)
    return kernel.function


def stored_scale(cpu: Cpu, n: int, pixels: int, c: int) -> Any:
    """x, d [n, pixels, c] → g[n, c] = Σ_p x · d, the gradient of a scale an example; s = ‖g‖²."""
    with Kernel(x=(n, pixels, c), d=(n, pixels, c), g=(n, 1, c), s=(n,)) as kernel:
        x, d, g, s = kernel.buffers
        with tasks(n, 2 * n * pixels * -(-c // cpu.lanes)) as i:
            _sum_pixels(
                cpu,
                g,
                (i, 0),
                pixels,
                c,
                lambda p, at, lanes: (
                    load(x, i, p, at, lanes=lanes) * load(d, i, p, at, lanes=lanes)
                ),
            )
            norm = local(1, dtype="float64")
            store(norm, T.float64(TINY), 0)
            with serial(c) as channel:
                value = T.bind(T.Cast("float64", load(g, i, 0, channel)))
                store(norm, load(norm, 0) + value * value, 0)
            store(s, T.Cast("float32", load(norm, 0)), i)
    return kernel.function


def stored_scale_inflation() -> float:
    """Bound of ‖g‖² / s − 1: squares and sums are float64, rounded to float32 once."""
    return gamma(2)


def _sum_pixels(
    cpu: Cpu,
    out: Any,
    row: Sequence[Any],
    pixels: int,
    c: int,
    value: Callable[[Any, Any, int], Any],
) -> None:
    """out[row, channel] = Σ_p value(p, channel)."""
    for first, size in blocks(c, 4 * cpu.lanes):
        sums = [(local(lanes), at, lanes) for at, lanes in pieces(size, cpu.lanes)]
        for part, _, lanes in sums:
            store(part, splat(0.0, lanes), 0)
        with serial(pixels) as p:
            for part, at, lanes in sums:
                store(part, load(part, 0, lanes=lanes) + value(p, first + at, lanes), 0)
        for part, at, lanes in sums:
            store(out, load(part, 0, lanes=lanes), *row, first + at)


def _share(
    out: Any, row: Sequence[Any], groups: int, each: int, finish: Callable[[Any], Any]
) -> None:
    """Replaces every channel's number by finish(sum over the channels of its group)."""
    with serial(groups) as group:
        total = local(1)
        store(total, number(0.0), 0)
        with serial(each) as channel:
            store(total, load(total, 0) + load(out, *row, group * each + channel), 0)
        value = T.bind(finish(load(total, 0)))
        with serial(each) as channel:
            store(out, value, *row, group * each + channel)


def _vectors(cpu: Cpu, pixels: int, c: int) -> Iterator[tuple[Any, Any, int]]:
    """(pixel, channel, lanes) of every vector of an example."""
    with serial(pixels) as p:
        for first, size in blocks(c, 4 * cpu.lanes):
            for at, lanes in pieces(size, cpu.lanes):
                yield p, first + at, lanes
