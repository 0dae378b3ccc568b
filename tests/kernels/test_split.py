"""Products of numbers split into two bfloat16, against float64."""

import numpy as np
import pytest
import test_mixed
import torch
from hypothesis import given
from templates import assert_runtime_suffices, assert_summed_norms, counted, data, few

from myelin.kernels import linear, mixed, split

cpu = test_mixed.cpu


def parts(values):
    """Both bfloat16 of a number, by PyTorch, as float64."""
    values = torch.tensor(values)
    first = values.to(torch.bfloat16)
    rest = (values - first.float()).to(torch.bfloat16)
    return first.double().numpy(), rest.double().numpy()


def product(a, b):
    """What is computed, in float64: three products of four."""
    (a1, a2), (b1, b2) = parts(a), parts(b)
    return a1 @ b1 + a1 @ b2 + a2 @ b1


def assert_exact(value, a, b, extra=0.0):
    scale = np.abs(a.astype("d")) @ np.abs(b.astype("d")) + np.abs(extra)
    assert np.all(np.abs(value - product(a, b) - extra) <= 1e-6 * scale + 1e-30)
    true = a.astype("d") @ b + extra
    assert np.all(np.abs(value - true) <= (split.ERROR + 1e-6) * scale + 1e-30)


def check(cpu, call, m, k, n):
    w, b = data(k, n), data(n)
    x, d, c, poisoned_x, poisoned_d = counted(m, k, n)
    assert_exact(call(split.matmul(cpu, m, k, n, bias=True), x, w, b), x, w, b.astype("d"))
    assert_exact(call(split.matmul(cpu, m, k, n, bias=False), x, w), x, w)
    assert_exact(call(split.backward_data(cpu, m, k, n), d, w), d, np.ascontiguousarray(w.T))
    value = call(split.weighted_gradient(cpu, m, k, n), poisoned_x, poisoned_d, c)
    assert_exact(value, np.ascontiguousarray(x.T), c[:, None] * d)


@few(12)
@given(test_mixed.sizes)
def test_products_match_float64(cpu, call, size):
    check(cpu, call, *size)


@test_mixed.layers
def test_layers(cpu, call, m, k, n):
    check(cpu, call, m, k, n)


def test_it_is_a_hundred_times_as_exact_as_bf16(cpu, call):
    m, k, n = 64, 300, 50
    x, w = data(m, k), data(k, n)
    true = x.astype("d") @ w

    def error(template):
        return np.sqrt(((call(template(cpu, m, k, n, bias=False), x, w) - true) ** 2).mean())

    assert error(split.matmul) < error(mixed.matmul) / 100
    assert error(linear.matmul) < error(split.matmul)
    assert 3 * 2.0**-16 < split.ERROR < 3.001 * 2.0**-16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (30, 1), (100, 10)])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e-37])
def test_squared_norm_bounds_the_gradient_that_is_summed(cpu, call, k, n, bias, scale):
    """1e-37: second parts are subnormal, and become zero."""
    m = 6
    x, d = np.float32(scale) * data(m, k), data(m, n, seed=1)
    if scale < 1:
        d *= np.float32(1e18)
    x[3], d[4] = 0, 0
    assert_summed_norms(split, cpu, call, x, d, bias)
    assert split.squared_norm_inflation(k, n) < 2e-4


def test_chains_count_three_products_an_example():
    assert split.weighted_gradient_additions(64) >= 3 * 64 // 32 + 32
    assert split.weighted_gradient_additions(1) >= 3


def test_chains_of_tiles_are_no_longer():
    """c_i · d_i is rounded, then products are added to the first and sums to the first sum."""
    for m in range(1, 1000):
        products, sums = min(m, 32), -(-m // 32)
        for templates, factor, terms in ((mixed, 1.0, 1), (split, 1.02, 3)):
            roundings = 1 + (products - 1) + (terms * sums - 1)
            assert templates.weighted_gradient_additions(m) >= factor * roundings


def test_the_object_needs_nothing_that_the_runtime_lacks(cpu):
    kernels = {
        "a": split.matmul(cpu, 33, 50, 70, bias=True),
        "b": split.backward_data(cpu, 33, 50, 70),
        "c": split.weighted_gradient(cpu, 33, 50, 70),
    }
    assert_runtime_suffices(kernels, cpu)
