"""What a layer's norm and a kernel call cost, and what is chosen for it.

Times are those of `myelin.cost`. A convolution's per-example gradients are stored where that is
faster than Gram matrices, the best saving a byte first, until the memory budget of the whole graph
is spent. `Decision` says what was chosen and what it should take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from myelin import cost
from myelin.cost import RATES, Algorithm
from myelin.cpu import Cpu, Precision
from myelin.kernels import mixed_conv, winograd
from myelin.kernels.window import Conv

Method = Literal["product", "stored", "gram", "none"]

STORED_BYTES = 128 << 20
"""Default memory budget for the stored per-example gradients of all convolutions together."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A kernel call of the gradient: whose layer it is, what was chosen, what it costs.

    `layer` is "" for what belongs to none (loss, clip factors). `method` is how the layer's norm is
    taken, `algorithm` how this kernel computes, "" where there is but one way. `threads` is 1 where
    waking others would take longer. `gflop` are 10⁹ operations as the direct algorithm does them,
    `ms` is for two threads, `bytes` are those of the kernel's arguments.
    """

    layer: str
    kernel: str
    method: Method
    algorithm: str
    threads: int
    gflop: float
    ms: float
    bytes: int


def product(cpu: Cpu, conv: Conv) -> Algorithm:
    """How a convolution's outputs and the adjoints of its inputs are computed."""
    return "winograd" if winograd.suits(cpu, conv) else "direct"


def gradient(cpu: Cpu, conv: Conv) -> Algorithm:
    """How the gradients of its weight are computed."""
    return "winograd" if winograd.suits_gradient(cpu, conv) else "direct"


def convolution(
    cpu: Cpu, conv: Conv, which: mixed_conv.Product, precision: Precision
) -> tuple[Algorithm, Precision]:
    """How a product of a convolution is computed, and with operands of which precision."""
    if precision == "bf16":
        chosen = mixed_conv.choose(cpu, conv, which)
        if chosen != "float32":
            return chosen, "bf16"
    how = gradient(cpu, conv) if which == "stored_gradient" else product(cpu, conv)
    return how, "float32"


def store(convolutions: Mapping[str, Conv], level: str, budget: int) -> set[str]:
    """The names of those whose per-example gradients are stored, in `budget` bytes altogether."""
    cpu = Cpu.named(level)
    savings = {name: _saving(cpu, conv) for name, conv in convolutions.items()}
    by_worth = sorted(
        (name for name, saved in savings.items() if saved > 0),
        key=lambda name: (-savings[name] / _stored_bytes(convolutions[name]), name),
    )
    stored: set[str] = set()
    for name in by_worth:
        size = _stored_bytes(convolutions[name])
        if size <= budget:
            budget -= size
            stored.add(name)
    return stored


def _saving(cpu: Cpu, conv: Conv) -> float:
    """Milliseconds that storing saves against Gram matrices and a weighted product."""
    rates = RATES[cpu.level]
    size = _stored_bytes(conv)
    activations = 4 * conv.n * (conv.hp * conv.wp * conv.ci + conv.pixels * conv.co)
    once = rates.milliseconds(cost.gradient(cpu, conv, gradient(cpu, conv)), activations)
    stored = once + rates.moving(size) + rates.moving(size, cold=size)  # written, later read
    return rates.milliseconds(cost.gram(cpu, conv), activations) + once - stored


def _stored_bytes(conv: Conv) -> int:
    return 4 * conv.n * conv.weights
