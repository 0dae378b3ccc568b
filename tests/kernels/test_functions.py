import numpy as np
import pytest
from scipy import special

from myelin.kernels import functions
from myelin.kernels.elementwise import map as elementwise

FUNCTIONS = {
    "exp": np.exp,
    "tanh": np.tanh,
    "sigmoid": special.expit,
    "erf": special.erf,
}
SMALLEST = 2.0**-126
N = 1 << 16


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return request.param


@pytest.fixture
def compiled(cpu, call, function):
    return lambda x: call(elementwise(cpu, [x.shape], x.shape, getattr(functions, function)), x)


def test_relative_error_over_all_magnitudes(function, compiled):
    powers = 2.0 ** np.linspace(-126, 127.999, N // 4)
    x = np.concatenate([powers, -powers, np.linspace(-110, 110, N // 2)]).astype(np.float32)
    value = compiled(x).astype(float)
    with np.errstate(all="ignore"):
        true = FUNCTIONS[function](x.astype(float))
        narrow = true.astype(np.float32)
    normal = np.isfinite(narrow) & (np.abs(true) >= SMALLEST)
    assert normal.sum() > N // 4
    error = np.abs(value[normal] - true[normal]) / np.abs(true[normal])
    assert error.max() <= 4 * 2.0**-23, x[normal][error.argmax()]
    # Too large for float32 is infinite; too small is zero or subnormal.
    np.testing.assert_array_equal(value[~np.isfinite(narrow)], narrow[~np.isfinite(narrow)])
    assert np.all(np.abs(value[np.abs(true) < SMALLEST]) <= SMALLEST)


def test_special_values(function, compiled):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    with np.errstate(all="ignore"):
        true = FUNCTIONS[function](x)
    np.testing.assert_array_equal(compiled(x), true)
