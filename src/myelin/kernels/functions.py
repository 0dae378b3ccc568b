"""Transcendental functions as polynomials, on scalars or vectors of float32, used while a `tir.Kernel` is open.

Library functions would be slow (one call a lane), depend on the machine and take time that tells their argument. Each
function here is within 4 units in the last place of the true value over all float32 (tested), gives NaN for NaN and
the limits at infinity, and takes and gives zero for subnormal numbers. Coefficients: Cephes (exp, log), Eigen (tanh, erf).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import DataType
from tvm.script.ir_builder import tirx as T

from myelin.kernels.tir import number, select, splat

_SMALLEST_NORMAL = 2.0**-126


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
    return select(is_nan(x), x, select(x > _like(x, 88.72283906), _like(x, float("inf")), y))


def log(x: Any) -> Any:
    """Natural logarithm: -inf for zero and subnormals, NaN below zero."""
    x = T.bind(x)
    bits = T.bind(_bits(x))
    mantissa = T.bind(_float((bits & _integer(x, 0x007FFFFF)) | _integer(x, 0x3F000000)))  # 0.5 … 1
    low = mantissa < _like(x, 0.707106781186547524)
    exponent = _cast((bits >> _integer(x, 23)) - _integer(x, 126), "float32")
    exponent = T.bind(select(low, exponent - _like(x, 1.0), exponent))
    m = T.bind(select(low, mantissa + mantissa, mantissa) - _like(x, 1.0))
    square = T.bind(m * m)
    p = _polynomial(
        m,
        (
            *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1),
            *(1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1),
            3.3333331174e-1,
        ),
    )
    small = p * m * square + exponent * _like(x, -2.12194440e-4) - square * _like(x, 0.5)
    y = T.bind(m + small + exponent * _like(x, 0.693359375))
    y = select(x < _like(x, _SMALLEST_NORMAL), _like(x, float("-inf")), y)
    y = select(x <= _like(x, -_SMALLEST_NORMAL), _like(x, float("nan")), y)
    return select(is_nan(x), x, select(x == _like(x, float("inf")), x, y))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    x = T.bind(x)
    inside = T.bind(_clamp(x, -7.90531110763549805, 7.90531110763549805))
    square = T.bind(inside * inside)
    p = _polynomial(
        square,
        (
            *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11),
            *(5.12229709037114e-08, 1.48572235717979e-05, 6.37261928875436e-04),
            4.89352455891786e-03,
        ),
    )
    q = _polynomial(
        square,
        (
            *(1.19825839466702e-06, 1.18534705686654e-04),
            *(2.26843463243900e-03, 4.89352518554385e-03),
        ),
    )
    y = select(_magnitude(x) < _like(x, 4e-4), x, inside * p / q)
    return select(is_nan(x), x, y)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    return _like(x, 1.0) / (_like(x, 1.0) + exp(_like(x, 0.0) - x))


def erf(x: Any) -> Any:
    """Error function."""
    x = T.bind(x)
    inside = T.bind(_clamp(x, -4.0, 4.0))
    square = T.bind(inside * inside)
    p = _polynomial(
        square,
        (
            *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06),
            *(-5.69250639462346e-05, -7.34990630326855e-04, -2.95459980854025e-03),
            -1.60960333262415e-02,
        ),
    )
    q = _polynomial(
        square,
        (
            *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
            *(-7.37332916720468e-03, -1.42647390514189e-02),
        ),
    )
    return select(is_nan(x), x, inside * p / q)


def is_nan(x: Any) -> Any:
    """True where x is NaN. Asked of the bits: the compiler simplifies `x != x` to false."""
    return (_bits(x) & _integer(x, 0x7FFFFFFF)) > _integer(x, 0x7F800000)


def is_finite(x: Any) -> Any:
    """True where x is neither NaN nor infinite."""
    return (_bits(x) & _integer(x, 0x7FFFFFFF)) < _integer(x, 0x7F800000)


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


def _magnitude(x: Any) -> Any:
    return _float(_bits(x) & _integer(x, 0x7FFFFFFF))


def _bits(x: Any) -> Any:
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
