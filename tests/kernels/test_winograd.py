import numpy as np
import pytest
import test_conv as direct
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myelin.kernels import conv as kernels
from myelin.kernels import winograd
from myelin.kernels.conv import Conv
from myelin.kernels.object import ALLOWED, build, undefined, workspace_bytes

SQUARE = {"kh": 3, "kw": 3, "padding": (1, 1, 1, 1)}
SHAPES = {
    "whole": Conv(n=3, h=8, w=12, ci=32, co=64, **SQUARE),
    "ragged": Conv(n=2, h=9, w=11, ci=20, co=50, **SQUARE),
    "scalars": Conv(n=3, h=7, w=5, ci=1, co=1, kh=3, kw=3, padding=(0, 1, 2, 0)),
    "narrow": Conv(n=11, h=3, w=4, ci=17, co=3, kh=3, kw=3),
}
every_shape = pytest.mark.parametrize("conv", SHAPES.values(), ids=SHAPES)


def outputs(conv, cpu, call):
    xp, w, b, d = direct.arrays(conv)
    return [
        *direct.results(call, winograd.forward(cpu, conv, bias=True), xp, w, b),
        *direct.results(call, winograd.backward_data(cpu, conv), d, w),
        *direct.results(call, winograd.stored_gradient(cpu, conv), xp, d, count=2),
    ]


def assert_accurate(value, expected):
    error = np.abs(value.reshape(expected.shape) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


def check(conv, cpu, call):
    """All kernels against torch in float64, and the norm against what is stored."""
    xp, w, b, d = direct.arrays(conv)
    y, dx, g, s = outputs(conv, cpu, call)
    expected_y, expected_dx = direct.output_and_input_gradient(conv, xp, w, d)
    assert_accurate(y, expected_y + b)
    assert_accurate(dx, expected_dx)
    assert_accurate(g, direct.gradients(conv, xp, d))
    exact = (g.astype("d") ** 2).sum(1)
    assert np.all(exact <= s * (1 + kernels.stored_norm_inflation(conv)))
    assert np.all(s <= exact * (1 + kernels.stored_norm_inflation(conv)))


@every_shape
def test_every_kernel_is_accurate(conv, cpu, call):
    check(conv, cpu, call)


@st.composite
def convs(draw):
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    return Conv(
        n=draw(st.integers(1, 6)),
        h=draw(st.integers(3, 14)),
        w=draw(st.integers(3, 14)),
        ci=draw(st.integers(1, 36)),
        co=draw(st.integers(1, 70)),
        kh=3,
        kw=3,
        padding=padding,
    )


@given(conv=convs())
@settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape(cpu, call, conv):
    check(conv, cpu, call)


def test_deep_layers_stay_accurate(cpu, call):
    """The deepest sums of the tables' models: 256 channels."""
    conv = Conv(n=2, h=8, w=8, ci=256, co=256, **SQUARE)
    check(conv, cpu, call)


def test_bits_do_not_depend_on_threads(cpu, call):
    conv = SHAPES["ragged"]
    configure = tvm.get_global_func("runtime.config_threadpool")
    two = outputs(conv, cpu, call)
    configure(1, 1)
    try:
        one = outputs(conv, cpu, call)
    finally:
        configure(1, 2)
    assert [a.tobytes() for a in one] == [a.tobytes() for a in two]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_example(poison, cpu, call):
    conv = SHAPES["whole"]
    xp, _, _, d = direct.arrays(conv)
    kernel = winograd.stored_gradient(cpu, conv)
    clean, norms = direct.results(call, kernel, xp, d, count=2)
    xp[1, 4, 4, 0] = poison
    spoiled, spoiled_norms = direct.results(call, kernel, xp, d, count=2)
    assert not np.isfinite(spoiled_norms[1])
    for before, after in ((clean, spoiled), (norms, spoiled_norms)):
        assert np.array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0))


def test_it_is_taken_where_it_is_faster(cpu):
    large = Conv(n=64, h=32, w=32, ci=64, co=64, **SQUARE)
    small = Conv(n=64, h=4, w=4, ci=64, co=64, **SQUARE)
    assert winograd.suits(cpu, large)
    assert winograd.suits_gradient(cpu, large)
    assert winograd.suits(cpu, small)
    assert not winograd.suits_gradient(cpu, small)
    for other in (
        Conv(n=64, h=32, w=32, ci=3, co=64, **SQUARE),
        Conv(n=64, h=32, w=32, ci=64, co=64, stride=(2, 2), **SQUARE),
        Conv(n=64, h=32, w=32, ci=64, co=64, kh=5, kw=3),
        Conv(n=64, h=5, w=5, ci=64, co=64, **SQUARE),
    ):
        assert not winograd.suits(cpu, other)
    assert len(kernels.forward(cpu, large, bias=False).params) == 6


def test_the_object_needs_nothing_that_the_runtime_lacks(cpu):
    conv = SHAPES["ragged"]
    templates = {
        "forward": winograd.forward(cpu, conv, bias=True),
        "backward_data": winograd.backward_data(cpu, conv),
        "stored_gradient": winograd.stored_gradient(cpu, conv),
    }
    assert undefined(build(templates, cpu)) <= ALLOWED
    assert workspace_bytes(templates, cpu) == 0
