"""Adjoints of the losses at the logits, for each example by itself: no average over the batch."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels import functions
from myelin.kernels.reduce import normalise
from myelin.kernels.tir import Kernel, blocks, load, number, select, splat, store, tasks


def cross_entropy_adjoint(cpu: Cpu, n: int, classes: int) -> Any:
    """logits[n, classes], y int32[n] → d[n, classes] = softmax(logits) − onehot(y).

    The label is compared, never used as an index. One outside of 0 … classes − 1 gives a row of
    NaN, which clipping drops.
    """
    with Kernel(logits=(n, classes), y=((n,), "int32"), d=(n, classes)) as kernel:
        logits, y, d = kernel.buffers
        # About thirty operations a vector for the exponential.
        with tasks(n, 30 * n * -(-classes // cpu.lanes)) as row:
            normalise(cpu, logits, d, row, classes)
            label = T.bind(load(y, row))
            valid = T.And(label >= 0, label < classes)
            for at, width in blocks(classes, cpu.lanes):
                target = splat(label, width) == T.Ramp(at, 1, width) if width > 1 else label == at
                hot = select(target, splat(1.0, width), splat(0.0, width))
                value = load(d, row, at, lanes=width) - hot
                store(d, select(splat(valid, width), value, splat(float("nan"), width)), row, at)
    return kernel.function


def binary_cross_entropy_adjoint(cpu: Cpu, n: int, outputs: int) -> Any:
    """logits[n, outputs], y[n, outputs] in 0 … 1 → d[n, outputs] = sigmoid(logits) − y."""
    return _each(cpu, n, outputs, lambda logits, y: functions.sigmoid(logits) - y, work=30)


def mean_squared_error_adjoint(cpu: Cpu, n: int, outputs: int) -> Any:
    """logits[n, outputs], y[n, outputs] → d[n, outputs] = 2 / outputs · (logits − y): the mean is
    over the outputs.
    """
    return _each(cpu, n, outputs, lambda logits, y: (logits - y) * number(2.0 / outputs), work=1)


def _each(cpu: Cpu, n: int, outputs: int, adjoint: Any, *, work: int) -> Any:
    with Kernel(logits=(n, outputs), y=(n, outputs), d=(n, outputs)) as kernel:
        logits, y, d = kernel.buffers
        with tasks(n, work * n * -(-outputs // cpu.lanes)) as row:
            for at, lanes in blocks(outputs, cpu.lanes):
                value = adjoint(load(logits, row, at, lanes=lanes), load(y, row, at, lanes=lanes))
                store(d, value, row, at)
    return kernel.function
