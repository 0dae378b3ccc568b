"""Linear layers in precision bf16x3: float32 numbers as sums of two bfloat16.

A number x is x₁ + x₂, x₁ = round(x) and x₂ = round(x - x₁); a product is x₁y₁ + x₁y₂ + x₂y₁, with
float32 sums. It misses x · y by at most 3 · 2⁻¹⁶ · |x · y| and a little more (`ERROR`): x₂ misses
x - x₁ by 2⁻¹⁶ · |x|, the same goes for y, and |x₂y₂| is no larger. So results are almost as exact
as in float32; where a CPU has bfloat16 in vectors only, they are slower to come by.

The templates are those of `myelin.kernels.mixed` with three parts along the depth, but for the
norm, which is that of float32: what example i adds is no longer than
c_i · |x_i| · |d_i| · ((1 + 2⁻¹⁶)² + 2⁻¹⁶).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from myelin.kernels import linear, mixed
from myelin.kernels.bf16 import ROUNDOFF, rounded
from myelin.kernels.factors import Split, whole
from myelin.kernels.linear import squared_norm, weighted_bias

__all__ = [
    "ERROR",
    "backward_data",
    "matmul",
    "squared_norm",
    "squared_norm_inflation",
    "weighted_bias",
    "weighted_gradient",
    "weighted_gradient_additions",
]

_ROUNDOFF = ROUNDOFF**2
ERROR = (1 + _ROUNDOFF) ** 2 - 1 + _ROUNDOFF
"""The largest relative error of a product, of numbers whose parts are not subnormal."""

_FLUSHED = 2.0**-18


def _rest(value: Any, lanes: int) -> Any:
    return value - rounded(value, lanes)


SPLIT = Split(left=(_rest, whole, whole), right=(whole, whole, _rest))

matmul = partial(mixed.matmul, split=SPLIT)
backward_data = partial(mixed.backward_data, split=SPLIT)
weighted_gradient = partial(mixed.weighted_gradient, split=SPLIT)


def squared_norm_inflation(k: int, n: int) -> float:
    """As in `linear`, of the numbers that are summed.

    Where a second part is subnormal it becomes zero, and the first may be too large by 2⁻¹²⁶. Of an
    x that is nothing against what `squared_norm` adds for each of its numbers. Of c_i · d_i it is
    at most √n · 2⁻¹²⁶ · |x_i|, and |x_i| < 2⁶⁴ where its square is finite: nothing, again, against
    2⁻¹⁹ of a threshold, which is at least a millionth: so much is added here.
    """
    inflation = 1 + linear.squared_norm_inflation(k, n)
    return inflation * (1 + ERROR) ** 2 * (1 + _FLUSHED) - 1


def weighted_gradient_additions(m: int) -> int:
    """As in `linear`, for three products an example, the absolute sum of which is 1.02 of one.

    In tiles no sum of an instruction holds more than 32 products, and there are three sums for
    every 32 examples or fewer: no longer a chain, as first additions, to zero, are exact.
    """
    return math.ceil(1.02 * linear.weighted_gradient_additions(3 * (m + 1)))
