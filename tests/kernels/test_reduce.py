import numpy as np
import pytest

from myelin.kernels import reduce

RNG = np.random.default_rng(2)


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (5, 7), (5, 100), (300, 1000), (60, 64), (2, 33)]
)
def test_sums_of_rows(cpu, call, rows, columns):
    x = RNG.standard_normal((rows, columns)).astype(np.float32)
    value = call(reduce.sum_rows(cpu, rows, columns), x)
    scale = np.abs(x).sum(1).max()
    np.testing.assert_allclose(value, x.astype(float).sum(1), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 33), (300, 10), (2, 200)])
def test_softmax(cpu, call, rows, columns):
    x = (RNG.standard_normal((rows, columns)) * 20).astype(np.float32)
    power = np.exp(x.astype(float) - x.max(1, keepdims=True))
    value = call(reduce.softmax(cpu, rows, columns), x)
    np.testing.assert_allclose(value, power / power.sum(1, keepdims=True), rtol=5e-6, atol=1e-30)
