"""Optimiser steps on the flat weights, in place, with PyTorch's semantics.

`hyper[1]` is the number of the step (1, 2, …). Rates and decay are constants of the kernel, so they
are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.tir import Kernel, blocks, load, number, pieces, splat, store, tasks

HYPER = 16
"""Floats in `hyper` (docs/image.md)."""
# Steps that Adam's bias correction counts: more than any job does.
_STEP_BITS = 31


def sgd(
    cpu: Cpu,
    d: int,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Any:
    """weights[d], state[d] (16 unused floats without momentum), gradient[d], hyper[16] → weights
    and state.

    g = gradient + weight_decay · w; buf = momentum · buf + g; w −= lr · (buf, or g + momentum · buf
    by Nesterov).
    """
    with Kernel(
        weights=(d,), state=(d if momentum else HYPER,), gradient=(d,), hyper=(HYPER,)
    ) as kernel:
        weights, state, gradient, _ = kernel.buffers
        for at, lanes in _vectors(cpu, d):
            w = T.bind(load(weights, at, lanes=lanes))
            g = load(gradient, at, lanes=lanes)
            if weight_decay:
                g = g + w * number(weight_decay)
            g = T.bind(g)
            step = g
            if momentum:
                step = T.bind(load(state, at, lanes=lanes) * number(momentum) + g)
                store(state, step, at)
                if nesterov:
                    step = g + step * number(momentum)
            store(weights, w - step * number(lr), at)
    return kernel.function


def adam(
    cpu: Cpu,
    d: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Any:
    """weights[d], state[2·d] (first moments, then second), gradient[d], hyper[16] → weights and
    state.

    g = gradient + weight_decay · w (as `torch.optim.Adam`, not decoupled).

    """
    with Kernel(weights=(d,), state=(2 * d,), gradient=(d,), hyper=(HYPER,)) as kernel:
        weights, state, gradient, hyper = kernel.buffers
        steps = T.bind(T.Cast("int32", load(hyper, 1)))
        one = T.float64(1.0)
        rate = T.bind(T.Cast("float32", T.float64(lr) / (one - _power(betas[0], steps))))
        root = T.bind(T.Cast("float32", T.sqrt(one - _power(betas[1], steps))))
        for at, lanes in _vectors(cpu, d):
            w = T.bind(load(weights, at, lanes=lanes))
            g = load(gradient, at, lanes=lanes)
            if weight_decay:
                g = g + w * number(weight_decay)
            g = T.bind(g)
            first = load(state, at, lanes=lanes) * number(betas[0]) + g * number(1 - betas[0])
            first = T.bind(first)
            second = load(state, at + d, lanes=lanes) * number(betas[1])
            second = T.bind(second + g * g * number(1 - betas[1]))
            store(state, first, at)
            store(state, second, at + d)
            deviation = T.sqrt(second) / splat(root, lanes) + splat(eps, lanes)
            store(weights, w - splat(rate, lanes) * first / deviation, at)
    return kernel.function


def _vectors(cpu: Cpu, d: int) -> Any:
    """Runs over d floats, on all threads when there are many."""
    loop: Callable[[int], Any] = lambda extent: tasks(extent, 4 * -(-d // cpu.lanes))  # noqa: E731
    for first, size in blocks(d, 4 * cpu.lanes, loop):
        for at, lanes in pieces(size, cpu.lanes):
            yield first + at, lanes


def _power(base: float, exponent: Any) -> Any:
    """base^exponent in float64 for an integer below 2³¹, by squaring; no branch."""
    result = T.float64(1.0)
    factor = base
    for bit in range(_STEP_BITS):
        chosen = T.Select((exponent >> bit) & 1 != 0, T.float64(factor), T.float64(1.0))
        result = T.bind(result * chosen)
        factor = factor * factor
    return result
