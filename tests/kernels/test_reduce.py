import numpy as np
import pytest

from myelin.kernels import reduce

RNG = np.random.default_rng(2)


@pytest.mark.parametrize("kind", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("outer", "extent", "inner"),
    [(1, 1, 1), (5, 7, 1), (5, 100, 1), (300, 1000, 1), (5, 3, 20), (60, 64, 5), (2, 40, 33)],
)
def test_reduction(cpu, call, kind, outer, extent, inner):
    x = RNG.standard_normal((outer, extent, inner)).astype(np.float32)
    value = call(reduce.reduction(cpu, outer, extent, inner, kind), x).reshape(outer, inner)
    true = getattr(np, kind)(x.astype(float), axis=1)
    np.testing.assert_allclose(value, true, rtol=1e-6, atol=1e-6 * np.abs(x).sum(1).max())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 33), (300, 10), (2, 200)])
def test_softmax(cpu, call, rows, columns):
    x = (RNG.standard_normal((rows, columns)) * 20).astype(np.float32)
    power = np.exp(x.astype(float) - x.max(1, keepdims=True))
    value = call(reduce.softmax(cpu, rows, columns), x)
    np.testing.assert_allclose(value, power / power.sum(1, keepdims=True), rtol=5e-6, atol=1e-30)
