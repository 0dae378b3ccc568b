"""Products of bfloat16 operands, against float64 products of operands that PyTorch rounded."""

import numpy as np
import pytest
import test_epilogue
import torch
from hypothesis import given
from hypothesis import strategies as st
from templates import (
    assert_close,
    assert_runtime_suffices,
    assert_summed_norms,
    counted,
    data,
    few,
)

from myelin.cpu import LEVELS, machine_features
from myelin.kernels import mixed
from myelin.kernels.tir import Kernel, load, pieces, store

sizes = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70))
layers = pytest.mark.parametrize(
    ("m", "k", "n"),
    [(256, 30, 1), (64, 128, 10), (33, 100, 50), (1, 17, 33), (70, 65, 97), (3, 1, 1)],
)


@pytest.fixture
def cpu():
    able = [cpu for cpu in LEVELS if "bf16" in cpu.precisions]
    for level in able:
        if not level.missing(machine_features()):
            return level
    pytest.skip(f"this machine has none of the levels {', '.join(c.level for c in able)}")


def rounded(values):
    """To bfloat16 by PyTorch, as float64."""
    return torch.tensor(values).to(torch.bfloat16).double().numpy()


def check(cpu, call, m, k, n):
    w, b = data(k, n), data(n)
    x, d, c, poisoned_x, poisoned_d = counted(m, k, n)
    rx, rw, rd = rounded(x), rounded(w), rounded(d)
    scale = np.abs(rx) @ np.abs(rw) + np.abs(b)
    assert_close(call(mixed.matmul(cpu, m, k, n, bias=True), x, w, b), rx @ rw + b, scale)
    assert_close(call(mixed.matmul(cpu, m, k, n, bias=False), x, w), rx @ rw, scale)
    scale = np.abs(rd) @ np.abs(rw.T)
    assert_close(call(mixed.backward_data(cpu, m, k, n), d, w), rd @ rw.T, scale)
    weighted = rounded(c[:, None] * d)
    value = call(mixed.weighted_gradient(cpu, m, k, n), poisoned_x, poisoned_d, c)
    assert_close(value, rx.T @ weighted, np.abs(rx.T) @ np.abs(weighted))


@few(12)
@given(sizes)
def test_products_match_float64_of_rounded_operands(cpu, call, size):
    check(cpu, call, *size)


@layers
def test_layers(cpu, call, m, k, n):
    check(cpu, call, m, k, n)


def test_the_error_against_unrounded_operands_is_that_of_bfloat16(cpu, call):
    m, k, n = 64, 300, 50
    x, w = data(m, k), data(k, n)
    error = call(mixed.matmul(cpu, m, k, n, bias=False), x, w) - x.astype(float) @ w
    scale = np.abs(x.astype(float)) @ np.abs(w)
    assert np.all(np.abs(error) <= 2.0**-6.9 * scale)
    assert np.abs(error).max() > 1e-4, "operands were rounded"


def test_examples_do_not_meet_in_a_product(cpu, call):
    """What is not finite in one row of x or d stays in that row."""
    m, k, n = 9, 37, 21
    x, w, d = data(m, k), data(k, n), data(m, n, seed=1)
    y, dx = mixed.matmul(cpu, m, k, n, bias=False), mixed.backward_data(cpu, m, k, n)
    expected = call(y, x, w), call(dx, d, w)
    x[4, 5], d[4, 20] = np.inf, np.nan
    for found, before in zip((call(y, x, w), call(dx, d, w)), expected, strict=True):
        others = np.arange(m) != 4
        assert np.array_equal(found[others], before[others])
        assert not np.isfinite(found[4]).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (30, 1), (100, 10), (784, 50)])
def test_squared_norm_bounds_the_gradient_that_is_summed(cpu, call, k, n, bias):
    m = 20
    x, d = data(m, k), data(m, n, seed=1)
    x[3], d[4] = 0, 0
    value = assert_summed_norms(mixed, cpu, call, x, d, bias)
    assert mixed.squared_norm_inflation(k, n) < 0.01
    outputs = (d.astype(float) ** 2).sum(1)
    exact = (rounded(x) ** 2).sum(1) * outputs + (outputs if bias else 0)
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-30)


SPECIAL = [
    *(0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.00390625, 3.38e38, 3.4e38, -3.4e38, np.inf),
    *(-np.inf, np.nan, 1e-30, 2.0**-126),
]


def test_the_two_ways_of_rounding_agree(cpu, call):
    """The norm rounds in integers, the product by an instruction; both as PyTorch does."""
    from myelin.kernels.bf16 import rounded as in_integers

    bits = np.random.default_rng(0).integers(0, 1 << 32, 500, dtype=np.uint32)
    random = bits.view(np.float32)
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF8FFFFF], np.uint32).view(np.float32)
    x = np.concatenate([np.array(SPECIAL, np.float32), random, odd])
    x = x[~((np.abs(x) < 2.0**-126) & (x != 0))]  # subnormal numbers become zero in products only
    with Kernel(x=(len(x),), y=(len(x),)) as kernel:
        source, target = kernel.buffers
        for at, lanes in pieces(len(x), 16):
            store(target, in_integers(load(source, at, lanes=lanes), lanes), at)
    one = np.ones((1, 1), np.float32)
    ours = call(kernel.function, x)
    product = call(mixed.matmul(cpu, len(x), 1, 1, bias=False), x[:, None], one)[:, 0]
    for found in (ours, product):
        np.testing.assert_array_equal(found, rounded(x).astype(np.float32))


def test_the_object_needs_nothing_that_the_runtime_lacks(cpu):
    kernels = {
        "a": mixed.matmul(cpu, 33, 50, 70, bias=True),
        "b": mixed.backward_data(cpu, 33, 50, 70),
        "c": mixed.weighted_gradient(cpu, 33, 50, 70),
    }
    assert_runtime_suffices(kernels, cpu)


@test_epilogue.every_size
def test_products_finish_their_results(m, k, n, cpu, call):
    test_epilogue.check_linear(call, cpu, mixed, m, k, n)
