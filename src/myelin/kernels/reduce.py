"""Reductions along one axis, and softmax."""

from __future__ import annotations

from typing import Any, Literal

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels import functions
from myelin.kernels.tir import (
    Kernel,
    blocks,
    load,
    local,
    number,
    serial,
    splat,
    store,
    tasks,
    total,
    vectors,
)

_LOWEST = -3.4028234663852886e38


def reduction(
    cpu: Cpu, outer: int, extent: int, inner: int, kind: Literal["sum", "mean", "max"]
) -> Any:
    """x[outer, extent, inner] → y[outer, inner], over the middle axis.

    With inner = 1 this reduces rows, and the kernel's parameters are x[outer, extent] and y[outer].

    Sums run in several chains that are added at the end. The maximum of a row that holds NaN is
    undefined but never an error; the adjoints that follow from such a row are NaN all the same.
    """
    initial = _LOWEST if kind == "max" else 0.0
    scale = 1.0 / extent if kind == "mean" else 1.0
    if inner == 1:
        with Kernel(x=(outer, extent), y=(outer,)) as kernel:
            x, y = kernel.buffers
            with tasks(outer, outer * -(-extent // cpu.lanes)) as row:
                value = _fold_row(cpu, x, row, extent, initial, kind)
                store(y, value if scale == 1 else value * number(scale), row)
        return kernel.function
    with Kernel(x=(outer, extent, inner), y=(outer, inner)) as kernel:
        x, y = kernel.buffers
        with tasks(outer, outer * extent * -(-inner // cpu.lanes)) as row:
            for at, lanes in blocks(inner, cpu.lanes):
                part = local(lanes)
                store(part, splat(initial, lanes), 0)
                with serial(extent) as i:
                    value = load(x, row, i, at, lanes=lanes)
                    store(part, _combine(kind, load(part, 0, lanes=lanes), value), 0)
                value = load(part, 0, lanes=lanes)
                store(y, value if scale == 1 else value * splat(scale, lanes), row, at)
    return kernel.function


def softmax(cpu: Cpu, rows: int, columns: int) -> Any:
    """x[rows, columns] → y[rows, columns] = e^x / Σ e^x of each row, shifted by its maximum."""
    with Kernel(x=(rows, columns), y=(rows, columns)) as kernel:
        x, y = kernel.buffers
        with tasks(rows, 30 * rows * -(-columns // cpu.lanes)) as row:
            normalise(cpu, x, y, row, columns)
    return kernel.function


def normalise(cpu: Cpu, x: Any, y: Any, row: Any, columns: int) -> None:
    """Writes the softmax of row `row` of x[·, columns] to y, inside an open kernel."""
    lanes = min(cpu.lanes, columns)
    top, sums = local(lanes), local(lanes)
    store(top, splat(_LOWEST, lanes), 0)
    store(sums, splat(0.0, lanes), 0)
    for at, width in vectors(columns, lanes):
        store(top, T.max(load(top, 0, lanes=width), load(x, row, at, lanes=width)), 0)
    highest = T.bind(total(top, lanes, T.max))
    for at, width in blocks(columns, lanes):
        power = T.bind(functions.exp(load(x, row, at, lanes=width) - splat(highest, width)))
        store(y, power, row, at)
        store(sums, load(sums, 0, lanes=width) + power, 0)
    scale = T.bind(number(1.0) / total(sums, lanes))
    for at, width in blocks(columns, lanes):
        store(y, load(y, row, at, lanes=width) * splat(scale, width), row, at)


def _fold_row(cpu: Cpu, x: Any, row: Any, extent: int, initial: float, kind: str) -> Any:
    lanes = min(cpu.lanes, extent)
    chains = min(4, -(-extent // lanes))
    parts = [local(lanes) for _ in range(chains)]
    for part in parts:
        store(part, splat(initial, lanes), 0)
    for position, (at, width) in enumerate(vectors(extent, lanes, chains)):
        part = parts[position % chains]
        value = load(x, row, at, lanes=width)
        store(part, _combine(kind, load(part, 0, lanes=width), value), 0)
    first = parts[0]
    for part in parts[1:]:
        value = _combine(kind, load(first, 0, lanes=lanes), load(part, 0, lanes=lanes))
        store(first, value, 0)
    return T.bind(total(first, lanes, lambda a, b: _combine(kind, a, b)))


def _combine(kind: str, a: Any, b: Any) -> Any:
    return T.max(a, b) if kind == "max" else a + b
