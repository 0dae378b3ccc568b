"""Convolutions of bfloat16 operands, against float64 convolutions of operands PyTorch rounded."""

from dataclasses import replace

import numpy as np
import pytest
import test_conv as direct
import test_epilogue
import test_mixed
import test_winograd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import (
    assert_runtime_suffices,
    assert_same_bits_on_one_thread,
    assert_stored_norms,
    few,
)

from myelin.kernels import mixed_conv as kernels
from myelin.kernels.conv import Conv
from myelin.kernels.object import workspace_bytes

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
    if kernels.can(conv, "forward"):
        kernel = kernels.forward(cpu, conv, bias=True)
        (value,) = direct.results(call, kernel, xp, w, b)
        assert_near(value, y + b, y_scale)
        assert np.all(np.abs(value - true_y - b) <= LARGEST * y_scale)
        kernel = kernels.forward(cpu, conv, bias=False)
        assert_near(direct.results(call, kernel, xp, w)[0], y, y_scale)
    if kernels.can(conv, "backward_data"):
        kernel = kernels.backward_data(cpu, conv)
        (value,) = direct.results(call, kernel, d, w)
        assert_near(value, dx, dx_scale)
        assert np.all(np.abs(value - true_dx) <= LARGEST * dx_scale)
    kernel = kernels.stored_gradient(cpu, conv)
    g, s = direct.results(call, kernel, xp, d, count=2)
    scale = direct.gradients(conv, np.abs(xp), np.abs(d))
    assert_near(g, direct.gradients(conv, near[0], near[2]), scale)
    assert np.all(np.abs(g - direct.gradients(conv, xp, d)) <= LARGEST * scale)
    assert_stored_norms(conv, g, s)


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


def templates(conv, cpu, algorithm):
    return [
        algorithm.forward(cpu, conv, bias=True),
        algorithm.backward_data(cpu, conv),
        algorithm.stored_gradient(cpu, conv),
    ]


def algorithms(test):
    both = {"direct": kernels, "winograd": kernels.Winograd}
    return pytest.mark.parametrize("algorithm", both.values(), ids=both)(test)


@algorithms
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_example(algorithm, poison, cpu, call):
    conv = SHAPES["whole"]
    xp, w, b, d = direct.arrays(conv)
    forward, backward, stored = templates(conv, cpu, algorithm)

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
        assert np.delete(before, 1, 0).tobytes() == np.delete(after, 1, 0).tobytes()


@algorithms
def test_bits_do_not_depend_on_threads(algorithm, cpu, call):
    conv = SHAPES["whole"]
    xp, w, b, d = direct.arrays(conv)
    forward, backward, stored = templates(conv, cpu, algorithm)

    def everything():
        return [
            *direct.results(call, forward, xp, w, b),
            *direct.results(call, backward, d, w),
            *direct.results(call, stored, xp, d, count=2),
        ]

    assert_same_bits_on_one_thread(everything)


VECTORS = {
    "whole": SHAPES["whole"],
    "ragged": Conv(n=2, h=9, w=11, ci=16, co=48, **SQUARE),
    "narrow": Conv(n=11, h=3, w=4, ci=32, co=16, kh=3, kw=3),
    "border": Conv(n=3, h=7, w=5, ci=48, co=32, kh=3, kw=3, padding=(0, 1, 2, 0)),
    "flat": Conv(n=3, h=1, w=2, ci=16, co=32, **SQUARE),
    "deep": Conv(n=2, h=16, w=16, ci=128, co=128, **SQUARE),
}
of_whole_vectors = pytest.mark.parametrize("conv", VECTORS.values(), ids=VECTORS)


def tiled(image, size, rows, columns):
    """[n, rows, columns, size, size, channels]: tiles 4 apart, zeros beyond the image."""
    wide = 4 * max(rows, columns) + size
    image = np.pad(image, ((0, 0), (0, wide), (0, wide), (0, 0)))
    return np.stack(
        [
            np.stack(
                [image[:, 4 * r : 4 * r + size, 4 * c : 4 * c + size] for c in range(columns)], 1
            )
            for r in range(rows)
        ],
        1,
    )


def by_points(conv, xp, w, d):
    """Outputs and gradients in float64, rounded in the domain of points as the kernels do."""
    inputs, adjoint, weight = test_winograd.transforms()
    rows, columns = -(-conv.oh // 4), -(-conv.ow // 4)

    def points(transform, values, axes):
        return rounded(np.einsum(axes, transform, transform, values.astype("d")).astype("f"))

    v = points(inputs, tiled(xp, 6, rows, columns), "pi,qj,nrsijc->nrspqc")
    u = points(weight, w, "pi,qj,ijco->pqco")
    z = points(adjoint, tiled(d, 4, rows, columns), "pi,qj,nrsijo->nrspqo")
    y = np.einsum("pi,qj,nrspqo->nrisjo", adjoint, adjoint, np.einsum("nrspqc,pqco->nrspqo", v, u))
    y = y.reshape(conv.n, 4 * rows, 4 * columns, conv.co)[:, : conv.oh, : conv.ow]
    g = np.einsum("nrspqc,nrspqo->npqco", v, z)
    return y, np.einsum("pi,qj,npqco->nijco", weight, weight, g).reshape(conv.n, -1)


def assert_rounded(value, expected, true):
    """Those of rounded operands, of which one in thousands was rounded the other way."""
    error = value.reshape(true.shape) - expected
    assert np.sqrt((error**2).mean()) <= 1e-3 * np.sqrt((true**2).mean())
    assert_like(value, true)


def assert_like(value, true):
    """The tolerance of bfloat16 by Winograd: see `mixed_conv.Winograd`."""
    error = value.reshape(true.shape) - true
    assert np.sqrt((error**2).mean()) <= 0.02 * np.sqrt((true**2).mean())
    assert np.abs(error).max() <= 0.04 * np.abs(true).max()


@of_whole_vectors
def test_winograd_products_are_those_of_rounded_operands(conv, cpu, call):
    check_winograd(conv, cpu, call)


@pytest.mark.slow
@given(
    conv=test_winograd.convs(),
    channels=st.tuples(*[st.sampled_from([16, 32, 48])] * 2),
)
@few(5)
def test_winograd_products_of_any_shape(cpu, call, conv, channels):
    ci, co = channels
    check_winograd(replace(conv, ci=ci, co=co), cpu, call)


def check_winograd(conv, cpu, call):
    xp, w, b, d = direct.arrays(conv)
    forward, backward, stored = templates(conv, cpu, kernels.Winograd)
    true_y, true_dx = direct.output_and_input_gradient(conv, xp, w, d)
    expected_y, expected_g = by_points(conv, xp, w, d)
    assert_rounded(direct.results(call, forward, xp, w, b)[0] - b, expected_y, true_y)
    assert_like(direct.results(call, backward, d, w)[0], true_dx)
    g, s = direct.results(call, stored, xp, d, count=2)
    true_g = direct.gradients(conv, xp, d)
    assert_rounded(g, expected_g, true_g)
    assert_stored_norms(conv, g, s)
    (total,) = direct.results(call, kernels.Winograd.batch_gradient(cpu, conv), xp, d)
    assert_rounded(total, expected_g.sum(0), true_g.sum(0))


@test_winograd.of_many_tiles
def test_many_tiles_at_once_are_those_of_rounded_operands(conv, block, cpu, call):
    """A pair of channels is one element, so half as much fills the cache."""
    small = test_winograd.overfull(cpu, conv.ci // 2)
    forward, backward, _ = templates(conv, small, kernels.Winograd)
    for kernel in (forward, backward):
        assert test_winograd.at_once(kernel, conv.ci // 2) == block
    xp, w, b, d = direct.arrays(conv)
    true_y, true_dx = direct.output_and_input_gradient(conv, xp, w, d)
    expected_y, _ = by_points(conv, xp, w, d)
    assert_rounded(direct.results(call, forward, xp, w, b)[0] - b, expected_y, true_y)
    assert_like(direct.results(call, backward, d, w)[0], true_dx)


@algorithms
def test_the_object_needs_nothing_that_the_runtime_lacks(algorithm, cpu):
    found = dict(zip(PRODUCTS, templates(SHAPES["whole"], cpu, algorithm), strict=True))
    assert_runtime_suffices(found, cpu)
    assert workspace_bytes(found, cpu) == 0


@test_epilogue.every_conv
def test_products_finish_their_results(conv, cpu, call):
    test_epilogue.check_conv(call, cpu, kernels, conv)
