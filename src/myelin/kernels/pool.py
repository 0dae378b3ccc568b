"""Pooling of NHWC activations, and its gradients (semantics of PyTorch, ceil_mode off).

    max_forward(cpu, pool)       x[n,h,w,c] → y[n,oh,ow,c]
    max_backward(cpu, pool)      x, d[n,oh,ow,c] → dx[n,h,w,c]
    average_forward(cpu, pool)   x → y
    average_backward(cpu, pool)  d → dx

Global pooling is a window of the whole image. Padding is never a maximum and counts as zeros of an
average, or not at all without `count_padding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.tir import Kernel, load, local, select, serial, splat, store, tasks, vectors
from myelin.kernels.window import Window


@dataclass(frozen=True, kw_only=True)
class Pool(Window):
    """Pooling of c channels."""

    c: int
    count_padding: bool = True


def max_forward(cpu: Cpu, pool: Pool) -> Any:
    """x[n,h,w,c] → y[n,oh,ow,c], the largest number of each window; NaN where it holds one."""
    with Kernel(x=_input(pool), y=_output(pool)) as kernel:
        x, y = kernel.buffers
        for i, view in _views(pool):
            for c, lanes in vectors(pool.c, cpu.lanes):
                largest = _largest(x, i, view, c, lanes)[0]
                store(y, load(largest, 0, lanes=lanes), i, view.row, view.column, c)
    return kernel.function


def max_backward(cpu: Cpu, pool: Pool) -> Any:
    """x[n,h,w,c], d[n,oh,ow,c] → dx[n,h,w,c]: each d to the first largest number of its window."""
    with Kernel(x=_input(pool), d=_output(pool), dx=_input(pool)) as kernel:
        x, d, dx = kernel.buffers
        add = _adding(cpu, pool, dx)
        for i, view in _views(pool):
            for c, lanes in vectors(pool.c, cpu.lanes):
                place = _largest(x, i, view, c, lanes)[1]
                adjoint = T.bind(load(d, i, view.row, view.column, c, lanes=lanes))
                for tap, h, w in view.taps():
                    here = load(place, 0, lanes=lanes) == _count(tap, lanes)
                    add(select(here, adjoint, splat(0.0, lanes)), lanes, i, h, w, c)
    return kernel.function


def average_forward(cpu: Cpu, pool: Pool) -> Any:
    """x[n,h,w,c] → y[n,oh,ow,c], the mean of each window."""
    with Kernel(x=_input(pool), y=_output(pool)) as kernel:
        x, y = kernel.buffers
        for i, view in _views(pool):
            for c, lanes in vectors(pool.c, cpu.lanes):
                total = local(lanes)
                store(total, splat(0.0, lanes), 0)
                for _, h, w in view.taps():
                    store(total, load(total, 0, lanes=lanes) + load(x, i, h, w, c, lanes=lanes), 0)
                mean = load(total, 0, lanes=lanes) / splat(float(view.counted), lanes)
                store(y, mean, i, view.row, view.column, c)
    return kernel.function


def average_backward(cpu: Cpu, pool: Pool) -> Any:
    """d[n,oh,ow,c] → dx[n,h,w,c]: each d in equal parts to the numbers of its window."""
    with Kernel(d=_output(pool), dx=_input(pool)) as kernel:
        d, dx = kernel.buffers
        add = _adding(cpu, pool, dx)
        for i, view in _views(pool):
            for c, lanes in vectors(pool.c, cpu.lanes):
                adjoint = load(d, i, view.row, view.column, c, lanes=lanes)
                part = T.bind(adjoint / splat(float(view.counted), lanes))
                for _, h, w in view.taps():
                    add(part, lanes, i, h, w, c)
    return kernel.function


@dataclass(frozen=True, kw_only=True)
class _View:
    """One output pixel; of its window, height × width at (top, left) lie in the image."""

    row: Any
    column: Any
    top: Any
    left: Any
    height: int
    width: int
    counted: int

    def taps(self) -> Iterator[tuple[Any, Any, Any]]:
        """(number from 0, row, column) of every number of the window, row by row."""
        if self.height > 0 and self.width > 0:
            with serial(self.height) as h, serial(self.width) as w:
                yield h * self.width + w, self.top + h, self.left + w


def _views(pool: Pool) -> Iterator[tuple[Any, _View]]:
    """(example, view) of every output pixel.

    Windows that are cut by the border in the same way share a loop: no bound depends on a test.
    """
    work = pool.n * pool.pixels * pool.kh * pool.kw * -(-pool.c // 8)
    axes = [
        _cuts(pool.oh, pool.kh, pool.stride[0], pool.padding[0], pool.h),
        _cuts(pool.ow, pool.kw, pool.stride[1], pool.padding[1], pool.w),
    ]
    with tasks(pool.n, work) as i:
        for (rows, top, bottom), (columns, left, right) in product(*axes):
            with serial(len(rows)) as r, serial(len(columns)) as s:
                row, column = rows[0] + r, columns[0] + s
                size = max(0, bottom - top) * max(0, right - left)
                yield (
                    i,
                    _View(
                        row=row,
                        column=column,
                        top=row * pool.stride[0] - pool.padding[0] + top,
                        left=column * pool.stride[1] - pool.padding[1] + left,
                        height=bottom - top,
                        width=right - left,
                        counted=pool.kh * pool.kw if pool.count_padding else max(1, size),
                    ),
                )


def _cuts(out: int, kernel: int, stride: int, before: int, size: int) -> list[tuple[Any, int, int]]:
    """(positions, first tap inside, tap after the last inside) along one axis."""

    def cut(position: int) -> tuple[int, int]:
        start = position * stride - before
        return max(0, -start), min(kernel, size - start)

    return [(list(group), *inside) for inside, group in groupby(range(out), key=cut)]


def _largest(x: Any, i: Any, view: _View, c: Any, lanes: int) -> tuple[Any, Any]:
    """The largest numbers of a window, and the first tap of each that has it."""
    largest, place = local(lanes), local(lanes, dtype="int32")
    store(largest, splat(-math.inf, lanes), 0)
    store(place, _count(0, lanes), 0)
    for tap, h, w in view.taps():
        value = T.bind(load(x, i, h, w, c, lanes=lanes))
        best = load(largest, 0, lanes=lanes)
        # True for all but NaN, which is then taken. TVM turns a negated comparison around.
        ordinary = value <= splat(math.inf, lanes)
        for kept, new in ((place, _count(tap, lanes)), (largest, value)):
            more = select(value > best, new, load(kept, 0, lanes=lanes))
            store(kept, select(ordinary, more, new), 0)
    return largest, place


def _count(value: Any, lanes: int) -> Any:
    number = T.int32(value) if isinstance(value, int) else value
    return T.Broadcast(number, lanes) if lanes > 1 else number


def _adding(cpu: Cpu, pool: Pool, dx: Any) -> Callable[..., None]:
    """What adds a part to dx; where every number is in one window only, what writes it."""
    tiled = (pool.oh * pool.kh, pool.ow * pool.kw) == (pool.h, pool.w)
    if tiled and pool.stride == (pool.kh, pool.kw) and not any(pool.padding):
        return lambda part, _lanes, *index: store(dx, part, *index)
    _clear(cpu, pool, dx)
    return lambda part, lanes, *index: store(dx, load(dx, *index, lanes=lanes) + part, *index)


def _clear(cpu: Cpu, pool: Pool, dx: Any) -> None:
    work = pool.n * pool.h * pool.w * -(-pool.c // 8)
    with tasks(pool.n, work) as i, serial(pool.h) as h, serial(pool.w) as w:
        for c, lanes in vectors(pool.c, cpu.lanes):
            store(dx, splat(0.0, lanes), i, h, w, c)


def _input(pool: Pool) -> tuple[int, ...]:
    return pool.n, pool.h, pool.w, pool.c


def _output(pool: Pool) -> tuple[int, ...]:
    return pool.n, pool.oh, pool.ow, pool.c
