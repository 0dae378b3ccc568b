"""Kernels that only move data: permutations of axes, joining and cutting along the last axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from myelin.cpu import Cpu
from myelin.kernels.tiles import grid
from myelin.kernels.tir import Kernel, blocks, load, pieces, serial, store, tasks, transposed


def permute(cpu: Cpu, shape: Sequence[int], axes: Sequence[int]) -> Any:
    """x[shape] → y, where axis i of y is axis axes[i] of x (as numpy's transpose).

    Axes that stay together are merged, so the kernel's parameters may have fewer axes: the bytes
    are the same.
    """
    extents, order = merge(shape, axes)
    out = tuple(extents[axis] for axis in order)
    last = len(order) - 1
    # Where y's last axis is not x's, squares along both are turned in registers.
    turned = order.index(last)
    square = cpu.lanes if turned < last and min(out[turned], out[last]) >= cpu.lanes else 1
    # A square takes about as many shuffles as it has vectors, four times.
    work = math.prod(extents) // (cpu.lanes if turned == last else max(1, square // 4))
    with Kernel(x=tuple(extents), y=out) as kernel, ExitStack() as loops:
        x, y = kernel.buffers
        index: dict[int, Any] = {}

        def read(lanes: int = 1) -> Any:
            """Neighbours along x's last axis, from what belongs at `index` of y on."""
            return load(x, *(index[order.index(axis)] for axis in range(last + 1)), lanes=lanes)

        def write(value: Any) -> None:
            store(y, value, *(index[axis] for axis in range(last + 1)))

        for axis in range(last):
            if axis != turned or square == 1:
                loop = serial(out[axis]) if index else tasks(out[axis], work)
                index[axis] = loops.enter_context(loop)
        if turned == last:
            for first, size in blocks(out[last], 4 * cpu.lanes):
                for at, lanes in pieces(size, cpu.lanes):
                    index[last] = first + at
                    write(read(lanes))
        elif square == 1:
            for first, size in blocks(out[last], 8):
                for at in range(size):
                    index[last] = first + at
                    write(read())
        else:
            loop = serial if index else lambda extent: tasks(extent, work)
            for row, height in blocks(out[turned], square, loop):
                for column, width in blocks(out[last], square):
                    if height == width:
                        rows = []
                        for i in range(width):
                            index |= {turned: row, last: column + i}
                            rows.append(read(height))
                        for i, value in enumerate(transposed(rows)):
                            index |= {turned: row + i, last: column}
                            write(value)
                    else:
                        for i, j in grid(height, width):
                            index |= {turned: row + i, last: column + j}
                            write(read())
    return kernel.function


def nhwc(cpu: Cpu, n: int, c: int, h: int, w: int) -> Any:
    """x[n, c, h, w] → y[n, h, w, c]."""
    return permute(cpu, (n, c, h, w), (0, 2, 3, 1))


def nchw(cpu: Cpu, n: int, h: int, w: int, c: int) -> Any:
    """x[n, h, w, c] → y[n, c, h, w]."""
    return permute(cpu, (n, h, w, c), (0, 3, 1, 2))


def concatenate(cpu: Cpu, outer: int, widths: Sequence[int]) -> Any:
    """x_0[outer, widths[0]], x_1[outer, widths[1]], … → y[outer, Σ widths]."""
    width = sum(widths)
    names = {f"x_{i}": (outer, own) for i, own in enumerate(widths)}
    with Kernel(**names, y=(outer, width)) as kernel:
        *xs, y = kernel.buffers
        with tasks(outer, outer * -(-width // cpu.lanes)) as row:
            start = 0
            for x, own in zip(xs, widths, strict=True):
                _copy(cpu, (x, row, 0), (y, row, start), own)
                start += own
    return kernel.function


def cut(cpu: Cpu, outer: int, width: int, start: int, size: int) -> Any:
    """x[outer, width] → y[outer, size] = x[:, start : start + size]."""
    if not 0 <= start < start + size <= width:
        raise ValueError(f"columns {start} … {start + size} do not lie in a width of {width}")
    with Kernel(x=(outer, width), y=(outer, size)) as kernel:
        x, y = kernel.buffers
        with tasks(outer, outer * -(-size // cpu.lanes)) as row:
            _copy(cpu, (x, row, start), (y, row, 0), size)
    return kernel.function


def merge(shape: Sequence[int], axes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Merges axes that stay neighbours in a permutation and drops those of size 1; gives (shape,
    axes).
    """
    if sorted(axes) != list(range(len(shape))):
        raise ValueError(f"axes {tuple(axes)} are no permutation of {len(shape)} axes")
    groups: list[list[int]] = []
    for axis in axes:
        if shape[axis] == 1:
            continue
        if groups and _follows(shape, groups[-1][-1], axis):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    if not groups:
        return [1], [0]
    ordered = sorted(groups)
    return [math.prod(shape[a] for a in group) for group in ordered], [
        ordered.index(group) for group in groups
    ]


def _follows(shape: Sequence[int], before: int, axis: int) -> bool:
    """True when nothing but axes of size 1 lies between."""
    return axis > before and all(shape[a] == 1 for a in range(before + 1, axis))


def _copy(cpu: Cpu, source: tuple[Any, Any, int], target: tuple[Any, Any, int], size: int) -> None:
    for first, extent in blocks(size, 4 * cpu.lanes):
        for at, lanes in pieces(extent, cpu.lanes):
            value = load(source[0], source[1], source[2] + first + at, lanes=lanes)
            store(target[0], value, target[1], target[2] + first + at)
