import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import data, few

from myelin.cpu import Cpu
from myelin.kernels import layout


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 3, 4, 5), (0, 2, 3, 1)),
        ((2, 4, 5, 3), (0, 3, 1, 2)),
        ((33, 47), (1, 0)),
        ((2, 1, 8, 8), (0, 2, 3, 1)),
        ((2, 3, 4, 5), (2, 3, 1, 0)),
        ((64, 16, 20), (1, 0, 2)),
        ((1,), (0,)),
        ((256, 3, 99), (0, 2, 1)),
        ((5, 40, 37), (0, 2, 1)),
        ((16, 3, 32), (2, 1, 0)),
    ],
)
def test_permute(cpu, call, shape, axes):
    check_permute(cpu, call, shape, axes)


@st.composite
def permutations(draw):
    shape = draw(st.lists(st.integers(1, 8) | st.integers(16, 40), min_size=1, max_size=4))
    return tuple(shape), tuple(draw(st.permutations(range(len(shape)))))


@given(permutations())
@few(10)
def test_any_permutation(cpu, call, case):
    check_permute(cpu, call, *case)


def check_permute(cpu, call, shape, axes):
    x = data(*shape)
    value = call(layout.permute(cpu, shape, axes), x)
    np.testing.assert_array_equal(value.ravel(), x.transpose(axes).ravel())


def test_nhwc_and_back(cpu, call):
    x = data(3, 5, 4, 6)
    there = call(layout.nhwc(cpu, 3, 5, 4, 6), x).reshape(3, 4, 6, 5)
    np.testing.assert_array_equal(there, x.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(call(layout.nchw(cpu, 3, 4, 6, 5), there).ravel(), x.ravel())


def test_concatenate_and_cut(cpu, call):
    check_parts(cpu, call, 5, [7, 1, 40])


@given(st.integers(1, 40), st.lists(st.integers(1, 70), min_size=1, max_size=4))
@few(5)
def test_any_parts(cpu, call, outer, widths):
    check_parts(cpu, call, outer, widths)


def check_parts(cpu, call, outer, widths):
    parts = [data(outer, width, seed=i) for i, width in enumerate(widths)]
    joined = call(layout.concatenate(cpu, outer, widths), *parts)
    np.testing.assert_array_equal(joined, np.concatenate(parts, 1))
    for number, part in enumerate(parts):
        start = sum(widths[:number])
        value = call(layout.cut(cpu, outer, sum(widths), start, widths[number]), joined)
        np.testing.assert_array_equal(value, part)


def test_wrong_axes_and_columns_are_refused():
    cpu = Cpu.native()
    with pytest.raises(ValueError, match="no permutation of 2 axes"):
        layout.permute(cpu, (2, 3), (0, 0))
    with pytest.raises(ValueError, match="do not lie in a width of 5"):
        layout.cut(cpu, 2, 5, 3, 3)
