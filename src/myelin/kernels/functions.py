"""Transcendental functions as polynomials, on scalars or vectors of float32, used while a
`tir.Kernel` is open.

Library functions would be slow (one call a lane), depend on the machine and take time that tells
their argument. Here the relative error is at most 4·2⁻²³ over all float32 (tested; exp within 1
unit in the last place), NaN gives NaN, and infinities give the limits. Subnormal numbers count as
zero where flushing is on, as it is in the enclave. Coefficients of exp are those of Cephes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import DataType
from tvm.script.ir_builder import tirx as T

from myelin.kernels.tir import number, select, splat

# P and Q of f(x) ≈ x · P(x²) / Q(x²), highest power first: least squares on the relative error,
# reweighted towards minimax, with f'(0) fixed, so that small x are as good as exact. Both errors
# are below 2⁻²⁵.
_Rational = tuple[Sequence[float], Sequence[float]]
_TANH: _Rational = (
    (
        *(-1.2262301611003635e-11, 3.067195431510981e-08, 2.8046213073086717e-05),
        *(0.003870326037523017, 0.1368153046939714, 1.0),
    ),
    (
        *(1.2899907384787113e-06, 0.0003942098586512278, 0.02725321898488966),
        *(0.4701486295553922, 1.0),
    ),
)
_ERF: _Rational = (
    (
        *(2.0456852918665633e-06, 0.0002842407335154516, 0.003756313299214236),
        *(0.05271926452561163, 0.19024648407221595, 1.1283791670955126),
    ),
    (
        *(3.8012508201780606e-05, 0.0011594589917553711, 0.014951212610525602),
        *(0.11403527487146843, 0.5019344854317215, 1.0),
    ),
)


def exp(x: Any) -> Any:
    """e to the x."""
    x = T.bind(x)
    inside = T.bind(_clamp(x, -88.0, 89.0))
    n = T.bind(T.floor(inside * _like(x, 1.44269504088896341) + _like(x, 0.5)))
    r = T.bind(inside - n * _like(x, 0.693359375) - n * _like(x, -2.12194440e-4))
    p = _polynomial(
        r,
        (
            *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
            *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
        ),
    )
    y = p * (r * r) + r + _like(x, 1.0)
    # 2ⁿ in two factors, because 2¹²⁸ is infinite and e^88.7 is not.
    whole = T.bind(_cast(n, "int32"))
    half = T.bind(whole >> _integer(x, 1))
    y = T.bind(y * _power_of_two(half) * _power_of_two(whole - half))
    y = select(x < _like(x, -87.33654475), _like(x, 0.0), y)
    return select(
        is_nan(x),
        _like(x, float("nan")),
        select(x > _like(x, 88.72283906), _like(x, float("inf")), y),
    )


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return _odd_rational(x, 9.02, _TANH)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return _like(x, 1.0) / (_like(x, 1.0) + exp(_like(x, 0.0) - x))


def erf(x: Any) -> Any:
    """Error function."""
    return _odd_rational(x, 3.93, _ERF)


def is_nan(x: Any) -> Any:
    """True where x is NaN. Asked of the bits: the compiler simplifies `x != x` to false."""
    return (bits(x) & _integer(x, 0x7FFFFFFF)) > _integer(x, 0x7F800000)


def is_finite(x: Any) -> Any:
    """True where x is neither NaN nor infinite."""
    return (bits(x) & _integer(x, 0x7FFFFFFF)) < _integer(x, 0x7F800000)


def _odd_rational(x: Any, limit: float, coefficients: _Rational) -> Any:
    """x · P(x²) / Q(x²) up to ±limit, then ±1."""
    x = T.bind(x)
    inside = T.bind(_clamp(x, -limit, limit))
    square = T.bind(inside * inside)
    y = inside * _polynomial(square, coefficients[0]) / _polynomial(square, coefficients[1])
    y = select(x > _like(x, limit), _like(x, 1.0), y)
    y = select(x < _like(x, -limit), _like(x, -1.0), y)
    return select(is_nan(x), _like(x, float("nan")), y)


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    """Horner's scheme, highest power first."""
    value = _like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _like(x, coefficient)
    return T.bind(value)


def _clamp(x: Any, low: float, high: float) -> Any:
    """NaN becomes `low`."""
    return T.min(T.max(x, _like(x, low)), _like(x, high))


def _power_of_two(n: Any) -> Any:
    return _float((n + _integer(n, 127)) << _integer(n, 23))


def bits(x: Any) -> Any:
    """A float32's bits as int32."""
    return T.reinterpret(_type("int32", x), x)


def _float(bits: Any) -> Any:
    return T.reinterpret(_type("float32", bits), bits)


def _cast(x: Any, kind: str) -> Any:
    return T.Cast(_type(kind, x), x)


def _like(x: Any, value: float) -> Any:
    return splat(number(value), _width(x))


def _integer(x: Any, value: int) -> Any:
    return splat(T.int32(value), _width(x))


def _type(kind: str, x: Any) -> str:
    return kind if _width(x) == 1 else f"{kind}x{_width(x)}"


def _width(x: Any) -> int:
    return int(DataType(str(x.ty.dtype)).lanes)
