"""One kernel for any chain of elementwise operations, with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from myelin.cpu import Cpu
from myelin.kernels.tir import Kernel, blocks, load, pieces, serial, splat, store, tasks

Shape = tuple[int, ...]


def map(  # noqa: A001
    cpu: Cpu,
    shapes: Sequence[Shape],
    out_shape: Shape,
    fn: Callable[..., Any],
    *,
    operations: int = 1,
) -> Any:
    """x_0[shapes[0]], x_1[shapes[1]], … → y[out_shape] = fn(x_0, x_1, …), element by element.

    Shapes broadcast to `out_shape` as in numpy. `fn` takes and gives scalars or vectors of float32
    (operators, `T.max`, `tir.select`, `functions`); it is called once for each vector width.
    `operations` says roughly how many instructions it takes, so that small kernels stay on one
    thread. Axes that run together are merged, so the parameters of the kernel may have fewer axes
    than `shapes`: the bytes are the same.
    """
    out, inputs = collapse(out_shape, shapes)
    names = {f"x_{i}": shape for i, shape in enumerate(inputs)}
    work = (operations + len(inputs)) * math.prod(out[:-1]) * -(-out[-1] // cpu.lanes)
    with Kernel(**names, y=out) as kernel:
        *xs, y = kernel.buffers
        for index, lanes in _vectors(cpu, out, work):
            values = []
            for x, shape in zip(xs, inputs, strict=True):
                at = [0 if extent == 1 else i for extent, i in zip(shape, index, strict=True)]
                narrow = shape[-1] == 1 and out[-1] > 1
                values.append(splat(load(x, *at), lanes) if narrow else load(x, *at, lanes=lanes))
            store(y, fn(*values), *index)
    return kernel.function


def collapse(out_shape: Shape, shapes: Sequence[Shape]) -> tuple[Shape, list[Shape]]:
    """Merges neighbouring axes that every input either has whole or repeats; the ranks become
    equal.
    """
    rank = max(len(out_shape), 1)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    out = (1,) * (rank - len(out_shape)) + tuple(out_shape)
    for shape, original in zip(padded, shapes, strict=True):
        if len(shape) != rank or any(a not in (1, b) for a, b in zip(shape, out, strict=True)):
            raise ValueError(f"shape {tuple(original)} does not broadcast to {tuple(out_shape)}")

    def kind(axis: int) -> tuple[bool, ...]:
        return tuple(shape[axis] == out[axis] for shape in padded)

    groups: list[list[int]] = []
    for axis in range(rank):
        if out[axis] == 1 and rank > 1:
            continue
        if groups and kind(groups[-1][-1]) == kind(axis):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    groups = groups or [[rank - 1]]

    def merged(shape: Shape) -> Shape:
        return tuple(math.prod(shape[axis] for axis in group) for group in groups)

    return merged(out), [merged(shape) for shape in padded]


def _vectors(cpu: Cpu, shape: Shape, work: int) -> Iterator[tuple[list[Any], int]]:
    """Runs over all elements; gives the index of each vector and its lanes."""
    *outer, last = shape
    block = 4 * cpu.lanes
    with ExitStack() as loops:
        index = []
        for position, extent in enumerate(outer):
            loop = tasks(extent, work) if position == 0 else serial(extent)
            index.append(loops.enter_context(loop))

        def innermost(extent: int) -> Any:
            return serial(extent) if outer else tasks(extent, work)

        for first, size in blocks(last, block, innermost):
            for at, lanes in pieces(size, cpu.lanes):
                yield [*index, first + at], lanes
