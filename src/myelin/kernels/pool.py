"""Pooling of NHWC activations, and its gradients (semantics of PyTorch, ceil_mode off).

    max_forward(cpu, pool)       x[n,h,w,c] → y[n,oh,ow,c]
    max_backward(cpu, pool)      x, y, d[n,oh,ow,c], others → dx[n,h,w,c]
    average_forward(cpu, pool)   x → y
    average_backward(cpu, pool)  d, others → dx

Others are those of an `Epilogue`.

Global pooling is a window of the whole image. Padding is never a maximum and counts as zeros of an
average, or not at all without `count_padding`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.functions import bits
from myelin.kernels.tir import Kernel, load, local, select, serial, splat, store, tasks, vectors
from myelin.kernels.window import Window


@dataclass(frozen=True, kw_only=True)
class Pool(Window):
    """Pooling of c channels."""

    c: int
    count_padding: bool = True

    @property
    def tiled(self) -> bool:
        """Whether every number of the image is in exactly one window."""
        whole = (self.oh * self.kh, self.ow * self.kw) == (self.h, self.w)
        return whole and self.stride == (self.kh, self.kw) and not any(self.padding)


def max_forward(cpu: Cpu, pool: Pool) -> Any:
    """x[n,h,w,c] → y[n,oh,ow,c], the largest number of each window; NaN where it holds one."""
    with Kernel(x=_input(pool), y=_output(pool)) as kernel:
        x, y = kernel.buffers
        with _examples(pool) as i:
            for view in _views(pool):
                for c, lanes in vectors(pool.c, cpu.lanes):
                    store(y, _largest(x, i, view, c, lanes), i, view.row, view.column, c)
    return kernel.function


def max_backward(cpu: Cpu, pool: Pool, *, finish: Epilogue = PLAIN) -> Any:
    """x[n,h,w,c], y = max_forward(x), d[n,oh,ow,c], others → dx[n,h,w,c], finished: each d to the
    first number of its window with the bits of y.
    """
    shapes = {"x": _input(pool), "y": _output(pool), "d": _output(pool)}
    with Kernel(**shapes, **finish.parameters(_input(pool)), dx=_input(pool)) as kernel:
        x, y, d, *others, dx = kernel.buffers
        with _examples(pool) as i, _sums(cpu, pool, dx, i, finish.into(dx, others)) as add:
            for view in _views(pool):
                for c, lanes in vectors(pool.c, cpu.lanes):
                    largest = T.bind(bits(load(y, i, view.row, view.column, c, lanes=lanes)))
                    left = local(lanes)
                    store(left, load(d, i, view.row, view.column, c, lanes=lanes), 0)
                    for h, w in view.taps():
                        here = bits(load(x, i, h, w, c, lanes=lanes)) == largest
                        adjoint = T.bind(load(left, 0, lanes=lanes))
                        store(left, select(here, splat(0.0, lanes), adjoint), 0)
                        add(select(here, adjoint, splat(0.0, lanes)), lanes, h, w, c)
    return kernel.function


def average_forward(cpu: Cpu, pool: Pool) -> Any:
    """x[n,h,w,c] → y[n,oh,ow,c], the mean of each window."""
    with Kernel(x=_input(pool), y=_output(pool)) as kernel:
        x, y = kernel.buffers
        with _examples(pool) as i:
            for view in _views(pool):
                for c, lanes in vectors(pool.c, cpu.lanes):
                    total = local(lanes)
                    store(total, splat(0.0, lanes), 0)
                    for h, w in view.taps():
                        value = load(x, i, h, w, c, lanes=lanes)
                        store(total, load(total, 0, lanes=lanes) + value, 0)
                    mean = load(total, 0, lanes=lanes) / splat(float(view.counted), lanes)
                    store(y, mean, i, view.row, view.column, c)
    return kernel.function


def average_backward(cpu: Cpu, pool: Pool, *, finish: Epilogue = PLAIN) -> Any:
    """d[n,oh,ow,c], others → dx[n,h,w,c], finished: each d in equal parts to the numbers of its
    window.
    """
    shapes = {"d": _output(pool), **finish.parameters(_input(pool))}
    with Kernel(**shapes, dx=_input(pool)) as kernel:
        d, *others, dx = kernel.buffers
        with _examples(pool) as i, _sums(cpu, pool, dx, i, finish.into(dx, others)) as add:
            for view in _views(pool):
                for c, lanes in vectors(pool.c, cpu.lanes):
                    adjoint = load(d, i, view.row, view.column, c, lanes=lanes)
                    part = T.bind(adjoint / splat(float(view.counted), lanes))
                    for h, w in view.taps():
                        add(part, lanes, h, w, c)
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

    def taps(self) -> Iterator[tuple[Any, Any]]:
        """(row, column) of every number of the window, row by row."""
        if self.height > 0 and self.width > 0:
            with serial(self.height) as h, serial(self.width) as w:
                yield self.top + h, self.left + w


def _examples(pool: Pool) -> Any:
    """A loop over examples."""
    most = max(pool.pixels * pool.kh * pool.kw, pool.h * pool.w)
    return tasks(pool.n, pool.n * most * -(-pool.c // 8))


def _views(pool: Pool) -> Iterator[_View]:
    """Every output pixel of an example.

    Windows that are cut by the border in the same way share a loop: no bound depends on a test.
    """
    axes = [
        _cuts(pool.oh, pool.kh, pool.stride[0], pool.padding[0], pool.h),
        _cuts(pool.ow, pool.kw, pool.stride[1], pool.padding[1], pool.w),
    ]
    for (rows, top, bottom), (columns, left, right) in product(*axes):
        with serial(len(rows)) as r, serial(len(columns)) as s:
            row, column = rows[0] + r, columns[0] + s
            size = max(0, bottom - top) * max(0, right - left)
            yield _View(
                row=row,
                column=column,
                top=row * pool.stride[0] - pool.padding[0] + top,
                left=column * pool.stride[1] - pool.padding[1] + left,
                height=bottom - top,
                width=right - left,
                counted=pool.kh * pool.kw if pool.count_padding else max(1, size),
            )


def _cuts(out: int, kernel: int, stride: int, before: int, size: int) -> list[tuple[Any, int, int]]:
    """(positions, first tap inside, tap after the last inside) along one axis."""

    def cut(position: int) -> tuple[int, int]:
        start = position * stride - before
        return max(0, -start), min(kernel, size - start)

    return [(list(group), *inside) for inside, group in groupby(range(out), key=cut)]


def _largest(x: Any, i: Any, view: _View, c: Any, lanes: int) -> Any:
    """The largest numbers of a window, NaN where it holds one."""
    largest = local(lanes)
    store(largest, splat(-math.inf, lanes), 0)
    for h, w in view.taps():
        value = T.bind(load(x, i, h, w, c, lanes=lanes))
        best = load(largest, 0, lanes=lanes)
        # True for all but NaN, which is then taken. TVM turns a negated comparison around.
        ordinary = value <= splat(math.inf, lanes)
        store(largest, select(ordinary, select(value > best, value, best), value), 0)
    return load(largest, 0, lanes=lanes)


@contextmanager
def _sums(
    cpu: Cpu, pool: Pool, dx: Any, i: Any, write: Callable[..., None]
) -> Iterator[Callable[..., None]]:
    """Gives add(part, lanes, h, w, c) for dx[i]; writes what was added, finished.

    The sums of an example are made where its results will be, while they are in the cache; where
    every number is in one window only, there is nothing to add.
    """
    if pool.tiled:
        yield lambda part, _lanes, *index: write(part, i, *index)
        return

    def each() -> Iterator[tuple[Any, ...]]:
        with serial(pool.h) as h, serial(pool.w) as w:
            for c, lanes in vectors(pool.c, cpu.lanes):
                yield lanes, h, w, c

    for lanes, *index in each():
        store(dx, splat(0.0, lanes), i, *index)
    yield lambda part, lanes, *index: store(dx, load(dx, i, *index, lanes=lanes) + part, i, *index)
    for lanes, *index in each():
        write(load(dx, i, *index, lanes=lanes), i, *index)


def _input(pool: Pool) -> tuple[int, ...]:
    return pool.n, pool.h, pool.w, pool.c


def _output(pool: Pool) -> tuple[int, ...]:
    return pool.n, pool.oh, pool.ow, pool.c
