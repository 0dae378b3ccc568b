"""Convolutions of bfloat16 operands, against float64 convolutions of operands PyTorch rounded."""

import numpy as np
import pytest
import test_conv as direct
import test_mixed
import tvm
from hypothesis import HealthCheck, given, settings

from myelin.kernels import conv as plain
from myelin.kernels import mixed_conv as kernels
from myelin.kernels import object as kernel_object
from myelin.kernels.conv import Conv

cpu = test_mixed.cpu
rounded = test_mixed.rounded

SQUARE = {"kh": 3, "kw": 3, "padding": (1, 1, 1, 1)}
SHAPES = {
    **direct.SHAPES,
    "whole": Conv(n=3, h=8, w=12, ci=32, co=64, **SQUARE),
    "ragged": Conv(n=2, h=9, w=11, ci=20, co=50, **SQUARE),
    "strided": Conv(n=2, h=8, w=9, ci=16, co=32, kh=3, kw=3, stride=(2, 2), padding=(1, 1, 1, 1)),
}
every_shape = pytest.mark.parametrize("conv", SHAPES.values(), ids=SHAPES)
PRODUCTS = ("forward", "backward_data", "stored_gradient")

LARGEST = 2.0**-6.9
"""The error of a product of two rounded numbers: twice that of one, 2⁻⁸, and what is left over."""


def able(conv, product):
    """Whether it can be computed directly: pairs need even numbers of channels."""
    return {
        "forward": all(s % 2 == 0 for s in (conv.wp * conv.ci, conv.kw * conv.ci))
        and conv.stride[1] * conv.ci % 2 == 0,
        "backward_data": conv.co % 2 == 0,
        "stored_gradient": True,
    }[product]


def assert_near(value, expected, scale):
    """Sums in float32: `scale` is that of absolute values."""
    assert np.all(np.abs(value.reshape(expected.shape) - expected) <= 3e-6 * scale + 1e-30)


def sizes(conv, xp, w, b, d):
    """What rounding errors of outputs and input gradients are relative to."""
    y, dx = direct.output_and_input_gradient(conv, *(np.abs(a) for a in (xp, w, d)))
    return y + np.abs(b), dx


def check(conv, cpu, call):
    xp, w, b, d = direct.arrays(conv)
    near = [rounded(a) for a in (xp, w, d)]
    y, dx = direct.output_and_input_gradient(conv, *near)
    true_y, true_dx = direct.output_and_input_gradient(conv, xp, w, d)
    y_scale, dx_scale = sizes(conv, xp, w, b, d)
    if able(conv, "forward"):
        kernel = kernels.forward(cpu, conv, bias=True, algorithm="direct")
        (value,) = direct.results(call, kernel, xp, w, b)
        assert_near(value, y + b, y_scale)
        assert np.all(np.abs(value - true_y - b) <= LARGEST * y_scale)
        kernel = kernels.forward(cpu, conv, bias=False, algorithm="direct")
        assert_near(direct.results(call, kernel, xp, w)[0], y, y_scale)
    if able(conv, "backward_data"):
        kernel = kernels.backward_data(cpu, conv, algorithm="direct")
        (value,) = direct.results(call, kernel, d, w)
        assert_near(value, dx, dx_scale)
        assert np.all(np.abs(value - true_dx) <= LARGEST * dx_scale)
    kernel = kernels.stored_gradient(cpu, conv, algorithm="direct")
    g, s = direct.results(call, kernel, xp, d, count=2)
    scale = direct.gradients(conv, np.abs(xp), np.abs(d))
    assert_near(g, direct.gradients(conv, near[0], near[2]), scale)
    assert np.all(np.abs(g - direct.gradients(conv, xp, d)) <= LARGEST * scale)
    assert_bounded(conv, g, s)


def assert_bounded(conv, g, s):
    """The norm is of the numbers that are stored, which are those that are summed."""
    exact = (g.astype("d") ** 2).sum(1)
    assert np.all(exact <= s * (1 + plain.stored_norm_inflation(conv)))
    flushed = conv.weights * 2.0**-125
    assert np.all(s <= exact * (1 + plain.stored_norm_inflation(conv)) + flushed)


@every_shape
def test_direct_products_are_those_of_rounded_operands(conv, cpu, call):
    check(conv, cpu, call)


@given(conv=direct.convs())
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_shape(cpu, call, conv):
    check(conv, cpu, call)


def test_operands_are_rounded(cpu, call):
    conv = SHAPES["strided"]
    xp, w, _, _ = direct.arrays(conv)
    (value,) = direct.results(call, kernels.forward(cpu, conv, bias=False), xp, w)
    y, _ = direct.output_and_input_gradient(conv, xp, w, np.zeros_like(value))
    assert np.abs(value - y).max() > 1e-4 * np.abs(y).max()


def templates(conv, cpu, algorithm=None):
    return [
        kernels.forward(cpu, conv, bias=True, algorithm=algorithm),
        kernels.backward_data(cpu, conv, algorithm=algorithm),
        kernels.stored_gradient(cpu, conv, algorithm=algorithm),
    ]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_example(poison, cpu, call):
    conv = SHAPES["strided"]
    xp, w, b, d = direct.arrays(conv)
    forward, backward, stored = templates(conv, cpu, "direct")

    def everything():
        g, s = direct.results(call, stored, xp, d, count=2)
        return [
            *direct.results(call, forward, xp, w, b),
            *direct.results(call, backward, d, w),
            g,
            s[:, None],
        ]

    clean = everything()
    xp[1, 4, 4, 0] = d[1, 2, 2, 3] = poison
    for before, after in zip(clean, everything(), strict=True):
        assert not np.isfinite(after[1]).all()
        assert before[0].tobytes() == after[0].tobytes()


def test_bits_do_not_depend_on_threads(cpu, call):
    conv = SHAPES["ragged"]
    xp, w, b, d = direct.arrays(conv)
    configure = tvm.get_global_func("runtime.config_threadpool")
    forward, backward, stored = templates(conv, cpu, "direct")

    def everything():
        return [
            *direct.results(call, forward, xp, w, b),
            *direct.results(call, backward, d, w),
            *direct.results(call, stored, xp, d, count=2),
        ]

    two = everything()
    configure(1, 1)
    try:
        one = everything()
    finally:
        configure(1, 2)
    assert [a.tobytes() for a in one] == [a.tobytes() for a in two]


def test_what_is_faster_in_float32_stays_so(cpu):
    large = Conv(n=64, h=32, w=32, ci=64, co=64, **SQUARE)
    strided = Conv(n=64, h=32, w=32, ci=64, co=64, stride=(2, 2), **SQUARE)
    small = Conv(n=64, h=8, w=8, ci=256, co=256, **SQUARE)
    colours = Conv(n=64, h=32, w=32, ci=3, co=64, **SQUARE)
    found = {
        name: [kernels.choose(cpu, conv, product) for product in PRODUCTS]
        for name, conv in {
            "large": large,
            "strided": strided,
            "small": small,
            "colours": colours,
        }.items()
    }
    assert found == {
        "large": ["float32"] * 3,
        "strided": ["direct"] * 3,
        "small": ["float32", "float32", "direct"],
        "colours": ["float32", "direct", "direct"],
    }


def test_the_object_needs_nothing_that_the_runtime_lacks(cpu):
    conv = SHAPES["ragged"]
    found = dict(zip(PRODUCTS, templates(conv, cpu, "direct"), strict=True))
    code = kernel_object.build(found, cpu)
    assert kernel_object.undefined(code) <= kernel_object.ALLOWED
    assert kernel_object.workspace_bytes(found, cpu) == 0
