"""What a layer's norm and a kernel call cost, and what is chosen for it.

Times are those of `myelin.cost`. Each product of a convolution is computed by the fastest algorithm
that can (`algorithm`), of those whose operands the precision allows. A convolution's per-example
gradients are stored where that is faster than what needs no memory (`unstored`), the best saving a
byte first, until the memory budget of the whole graph is spent (`store`). `Decision` says what was
chosen for a kernel call, and what it should take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from myelin import cost
from myelin.cost import RATES, Algorithm
from myelin.cpu import Cpu, Precision
from myelin.kernels import amx, amx_conv, mixed_conv, winograd
from myelin.kernels import conv as direct
from myelin.kernels.window import Conv, Product

Method = Literal["product", "stored", "gram", "recomputed", "none"]

STORED_BYTES = 128 << 20
"""Default memory budget for the stored per-example gradients of all convolutions together."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A kernel call of the gradient or the update: whose layer, what was chosen, what it costs.

    `layer` is "" for what belongs to none (loss, clip factors, update). `method` is how the layer's
    norm is taken, `algorithm` how this kernel computes, "" where there is but one way. `threads` is
    1 where waking others would take longer. `gflop` are 10⁹ operations as the direct algorithm does
    them, `ms` is for the threads of the plan, `bytes` are those of the kernel's arguments.
    """

    layer: str
    kernel: str
    method: Method
    algorithm: str
    threads: int
    gflop: float
    ms: float
    bytes: int


CONV: Mapping[Algorithm, Any] = {
    "direct": direct,
    "winograd": winograd,
    "direct bf16": mixed_conv,
    "winograd bf16": mixed_conv.Winograd,
    "tiles bf16": amx_conv.BF16,
    "tiles bf16x3": amx_conv.BF16X3,
}
"""The templates of each algorithm."""

SCRATCH_BYTES = 256 << 20
"""What a kernel may keep besides its arguments: images of any size would else take any memory."""


@cache
def algorithm(cpu: Cpu, conv: Conv, product: Product, precision: Precision) -> Algorithm:
    """The fastest for a product of this convolution, of those that can compute it."""
    return min(_candidates(cpu, conv, product, precision), key=lambda found: found[1])[0]


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """A convolution's weight gradient and how it is computed.

    All of a layer's kernels and bounds are made from this one object: what is bounded is what is
    added.
    """

    conv: Conv
    algorithm: Algorithm

    @property
    def templates(self) -> Any:
        """The algorithm's templates."""
        return CONV[self.algorithm]

    @property
    def error(self) -> float:
        """How far a summed gradient is from the exact one, for its Gram norm."""
        return float(self.templates.gradient_error(self.conv))

    @property
    def additions(self) -> int:
        """Longest chain of float32 operations on its weighted sum over the examples."""
        return int(self.templates.weighted_gradient_additions(self.conv))


def store(
    convolutions: Mapping[str, Conv], cpu: Cpu, budget: int, precision: Precision = "float32"
) -> set[str]:
    """The names of those whose per-example gradients are stored, in `budget` bytes altogether."""
    savings = {name: _saving(cpu, conv, precision) for name, conv in convolutions.items()}
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


def unstored(cpu: Cpu, conv: Conv, precision: Precision) -> Method:
    """How a norm is best taken without storing gradients."""
    return _unstored(cpu, conv, precision)[0]


def recomputing(cpu: Cpu, conv: Conv, precision: Precision) -> Algorithm | None:
    """The algorithm that finds gradients twice, for their norms and for their sum, if there is one:
    its `squared_norm` is of the very numbers that its `weighted_gradient` sums.
    """
    name: Algorithm = "tiles bf16x3" if precision == "bf16x3" else "tiles bf16"
    if not CONV[name].can(conv, "stored_gradient") or not _has(cpu, name, precision):
        return None
    twice = (cost.squared_norm(cpu, conv, name), cost.weighted_gradient(cpu, conv, name))
    return name if all(work.scratch <= SCRATCH_BYTES for work in twice) else None


def _candidates(
    cpu: Cpu, conv: Conv, product: Product, precision: Precision
) -> list[tuple[Algorithm, float]]:
    """(algorithm, its milliseconds) of all that can compute a product, the plainest first."""
    size = 4 * conv.n * (conv.hp * conv.wp * conv.ci + conv.pixels * conv.co)
    size += _stored_bytes(conv) if product == "stored_gradient" else 4 * conv.weights
    found: list[tuple[Algorithm, float]] = []
    for name, templates in CONV.items():
        if name in cost.WINOGRAD and min(conv.ci, conv.co) < cpu.lanes:
            continue  # faster alone, but slower within a step
        if _has(cpu, name, precision) and templates.can(conv, product):
            work = getattr(cost, product)(cpu, conv, name)
            if work.scratch <= SCRATCH_BYTES:
                found.append((name, RATES[cpu.level].milliseconds(work, size)))
    return found


def _has(cpu: Cpu, name: Algorithm, precision: Precision) -> bool:
    """Whether there is such an algorithm at this level and in this precision."""
    if name in cost.TILES and amx.FEATURE not in cpu.features:
        return False
    return name in ("direct", "winograd") or name.partition(" ")[2] == precision


def _saving(cpu: Cpu, conv: Conv, precision: Precision) -> float:
    """Milliseconds that storing saves."""
    stored = min(ms for _, ms in _candidates(cpu, conv, "stored_gradient", precision))
    size = _stored_bytes(conv)
    again = RATES[cpu.level].moving(size, cold=size)  # what was stored is read
    return _unstored(cpu, conv, precision)[1] - stored - again


def _unstored(cpu: Cpu, conv: Conv, precision: Precision) -> tuple[Method, float]:
    """The best method that stores nothing, and its milliseconds."""
    milliseconds = RATES[cpu.level].milliseconds
    activations = 4 * conv.n * (conv.hp * conv.wp * conv.ci + conv.pixels * conv.co)
    weighted = min(ms for _, ms in _candidates(cpu, conv, "weighted_gradient", precision))
    found: list[tuple[Method, float]] = [
        ("gram", milliseconds(cost.gram(cpu, conv), activations) + weighted)
    ]
    if name := recomputing(cpu, conv, precision):
        twice = (cost.squared_norm(cpu, conv, name), cost.weighted_gradient(cpu, conv, name))
        found.append(("recomputed", sum(milliseconds(work, activations) for work in twice)))
    return min(found, key=lambda method: method[1])


def _stored_bytes(conv: Conv) -> int:
    return 4 * conv.n * conv.weights
