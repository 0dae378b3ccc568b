import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import data, few

from myelin.kernels import reduce


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 7), (5, 100), (300, 1000), (60, 64), (2, 33)]
)
def test_sums_of_rows(cpu, call, rows, columns):
    check_sums(cpu, call, rows, columns)


def check_sums(cpu, call, rows, columns):
    x = data(rows, columns)
    value = call(reduce.sum_rows(cpu, rows, columns), x)
    scale = np.abs(x).sum(1).max()
    np.testing.assert_allclose(value, x.astype(float).sum(1), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 33), (300, 10), (2, 200)])
def test_softmax(cpu, call, rows, columns):
    check_softmax(cpu, call, rows, columns)


def check_softmax(cpu, call, rows, columns):
    x = 20 * data(rows, columns)
    power = np.exp(x.astype(float) - x.max(1, keepdims=True))
    value = call(reduce.softmax(cpu, rows, columns), x)
    np.testing.assert_allclose(value, power / power.sum(1, keepdims=True), rtol=5e-6, atol=1e-30)


@pytest.mark.parametrize("check", [check_sums, check_softmax])
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 150)))
@few(6)
def test_any_shape(cpu, call, check, size):
    check(cpu, call, *size)
