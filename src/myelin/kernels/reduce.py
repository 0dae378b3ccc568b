"""Sums of rows, and softmax."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels import functions
from myelin.kernels.tir import (
    Kernel,
    blocks,
    load,
    local,
    number,
    splat,
    store,
    tasks,
    total,
    vectors,
)

_LOWEST = -3.4028234663852886e38


def sum_rows(cpu: Cpu, rows: int, columns: int) -> Any:
    """x[rows, columns] → y[rows], each row in several chains that are added at the end."""
    with Kernel(x=(rows, columns), y=(rows,)) as kernel:
        x, y = kernel.buffers
        with tasks(rows, rows * -(-columns // cpu.lanes)) as row:
            lanes = min(cpu.lanes, columns)
            chains = min(4, -(-columns // lanes))
            parts = [local(lanes) for _ in range(chains)]
            for part in parts:
                store(part, splat(0.0, lanes), 0)
            for position, (at, width) in enumerate(vectors(columns, lanes, chains)):
                part = parts[position % chains]
                value = load(x, row, at, lanes=width)
                store(part, load(part, 0, lanes=width) + value, 0)
            first = parts[0]
            for part in parts[1:]:
                store(first, load(first, 0, lanes=lanes) + load(part, 0, lanes=lanes), 0)
            store(y, T.bind(total(first, lanes)), row)
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
