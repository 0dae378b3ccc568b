"""Products that finish their results, against numpy on what the plain product gives."""

import numpy as np
import pytest
import test_conv as direct
from templates import data
from tvm import DataType

from myelin.kernels import conv as conv_kernels
from myelin.kernels import functions, linear, winograd
from myelin.kernels.conv import Conv
from myelin.kernels.epilogue import Epilogue
from myelin.kernels.tir import select, splat

SQUARE = {"kh": 3, "kw": 3, "padding": (1, 1, 1, 1)}
CONVS = {
    "strided": Conv(n=2, h=9, w=11, ci=2, co=40, kh=3, kw=3, stride=(2, 2), padding=(1, 1, 1, 1)),
    "scalar": Conv(n=2, h=4, w=4, ci=2, co=1, kh=2, kw=2),
    "ragged": Conv(n=2, h=9, w=11, ci=20, co=50, **SQUARE),
    "whole": Conv(n=3, h=8, w=12, ci=16, co=64, **SQUARE),
}
every_conv = pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)


def like(x, value):
    return splat(value, int(DataType(str(x.ty.dtype)).lanes))


def gated(value, a, b):
    """Where a is positive, tanh of the product, times b."""
    return select(a > like(a, 0.0), functions.tanh(value), like(a, 0.0)) * b


FINISH = Epilogue(function=gated, others=2)


def check(call, cpu, template, plain_inputs, shape, **options):
    a, b = data(*shape, seed=11), data(*shape, seed=12)
    plain = direct.results(call, template(cpu, **options), *plain_inputs)[0].reshape(shape)
    kernel = template(cpu, finish=FINISH, **options)
    (found,) = direct.results(call, kernel, *plain_inputs, a, b)
    expected = np.where(a > 0, np.tanh(plain.astype("d")), 0) * b
    assert np.abs(found.reshape(shape) - expected).max() <= 1e-6 * np.abs(b).max()
    unary = template(cpu, finish=Epilogue(function=functions.tanh), **options)
    (found,) = direct.results(call, unary, *plain_inputs)
    assert np.abs(found.reshape(shape) - np.tanh(plain.astype("d"))).max() <= 1e-6


every_size = pytest.mark.parametrize(
    ("m", "k", "n"), [(33, 20, 50), (3, 5, 1), (9, 1, 17), (64, 40, 64)]
)


def check_linear(call, cpu, templates, m, k, n):
    x, w, b, d = data(m, k), data(k, n, seed=1), data(n, seed=2), data(m, n, seed=3)
    sizes = {"m": m, "k": k, "n": n}
    check(call, cpu, templates.matmul, [x, w, b], (m, n), bias=True, **sizes)
    check(call, cpu, templates.matmul, [x, w], (m, n), bias=False, **sizes)
    check(call, cpu, templates.backward_data, [d, w], (m, k), **sizes)


def check_conv(call, cpu, templates, conv):
    xp, w, b, d = direct.arrays(conv)
    y, x = (conv.n, conv.oh, conv.ow, conv.co), (conv.n, conv.h, conv.w, conv.ci)
    check(call, cpu, templates.forward, [xp, w, b], y, conv=conv, bias=True)
    check(call, cpu, templates.backward_data, [d, w], x, conv=conv)


@every_size
def test_linear_products(m, k, n, cpu, call):
    check_linear(call, cpu, linear, m, k, n)


@every_conv
def test_convolutions(conv, cpu, call):
    check_conv(call, cpu, conv_kernels, conv)


@pytest.mark.parametrize("name", ["ragged", "whole"])
def test_winograd_convolutions(name, cpu, call):
    check_conv(call, cpu, winograd, CONVS[name])
