from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from templates import assert_close, assert_same_bits_on_one_thread, counted, data, few

from myelin.kernels import linear
from myelin.kernels.tir import is_parallel

sizes = st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70))
# Sizes of layers that people train, and edges: one output, one example, more than one tile, right
# factors packed in several blocks for several shares of the rows.
layers = pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (256, 30, 1),
        (64, 128, 10),
        (33, 100, 50),
        (1, 17, 33),
        (70, 65, 97),
        (3, 9, 530),
        (95, 150, 600),
        (70, 64, 97),
    ],
)


def check_product(cpu, call, m, k, n):
    x, w, b, d = data(m, k), data(k, n, seed=1), data(n, seed=2), data(m, n, seed=3)
    exact = x.astype(float), w.astype(float), d.astype(float)
    scale = np.abs(exact[0]) @ np.abs(exact[1]) + np.abs(b)
    assert_close(
        call(linear.matmul(cpu, m, k, n, bias=True), x, w, b), exact[0] @ exact[1] + b, scale
    )
    assert_close(call(linear.matmul(cpu, m, k, n, bias=False), x, w), exact[0] @ exact[1], scale)
    scale = np.abs(exact[2]) @ np.abs(exact[1].T)
    assert_close(call(linear.backward_data(cpu, m, k, n), d, w), exact[2] @ exact[1].T, scale)


def check_gradient(cpu, call, m, k, n):
    x, d, c, poisoned_x, poisoned_d = counted(m, k, n)
    weighted = c[:, None].astype(float) * d
    value = call(linear.weighted_gradient(cpu, m, k, n), poisoned_x, poisoned_d, c)
    assert_close(value, x.astype(float).T @ weighted, np.abs(x.T) @ np.abs(weighted))
    value = call(linear.weighted_bias(cpu, m, n), poisoned_d, c)
    assert_close(value, weighted.sum(0), np.abs(weighted).sum(0))


@few(8)
@given(sizes)
def test_products_match_float64(cpu, call, size):
    check_product(cpu, call, *size)


@few(8)
@given(sizes)
def test_gradients_match_float64_and_drop_uncounted_examples(cpu, call, size):
    check_gradient(cpu, call, *size)


@pytest.mark.parametrize(("m", "k", "n"), [(70, 65, 97), (64, 128, 10)])
def test_weights_that_no_cache_holds_are_packed(cpu, call, m, k, n):
    small = replace(cpu, cache=4 * k * n - 1)
    packed, plain = (linear.matmul(c, m, k, n, bias=True) for c in (small, cpu))
    assert packed.script() != plain.script()
    check_product(small, call, m, k, n)


@layers
def test_layers(cpu, call, m, k, n):
    check_product(cpu, call, m, k, n)
    check_gradient(cpu, call, m, k, n)


def test_all_examples_dropped_gives_exact_zeros(cpu, call):
    x, d, c = np.full((5, 7), np.nan), np.full((5, 3), np.inf), np.zeros(5)
    floats = [a.astype(np.float32) for a in (x, d, c)]
    assert not call(linear.weighted_gradient(cpu, 5, 7, 3), *floats).any()
    assert not call(linear.weighted_bias(cpu, 5, 3), *floats[1:]).any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (30, 1), (100, 10), (784, 50)])
def test_squared_norm_is_an_upper_bound_with_its_inflation(cpu, call, k, n, bias):
    x, d = data(20, k), data(20, n, seed=1)
    x[3], d[4] = 0, 0
    squares = (x.astype(float) ** 2).sum(1), (d.astype(float) ** 2).sum(1)
    true = squares[0] * squares[1] + (squares[1] if bias else 0)
    value = call(linear.squared_norm(cpu, 20, k, n, bias=bias), x, d).astype(float)
    inflation = linear.squared_norm_inflation(k, n)
    assert np.all(true <= value * (1 + inflation) + 2.0**-125)
    np.testing.assert_allclose(value, true, rtol=1e-5, atol=1e-30)
    assert inflation < 1e-3


def test_squared_norm_does_not_lose_tiny_adjoints_beside_huge_inputs(cpu, call):
    """Squares below 2⁻¹²⁶ are flushed; times |x|² they are a norm of 4."""
    x, d = np.full((1, 1), 1e19, np.float32), np.full((1, 16), 1e-19, np.float32)
    kernel = linear.squared_norm(cpu, 1, 1, 16, bias=False)
    assert torch.set_flush_denormal(True)
    try:
        value = call(kernel, x, d)
    finally:
        torch.set_flush_denormal(False)
    assert value[0] >= (x.astype(float) ** 2).sum() * (d.astype(float) ** 2).sum()


def test_additions_bound_the_chain():
    assert linear.weighted_gradient_additions(1) == 3
    assert linear.weighted_gradient_additions(32) == 34
    assert linear.weighted_gradient_additions(256) == 41


def test_bits_do_not_depend_on_threads(cpu, call):
    m, k, n = 100, 300, 90
    x, d, c = data(m, k), data(m, n, seed=1), np.abs(data(m, seed=2))
    kernel = linear.weighted_gradient(cpu, m, k, n)
    assert_same_bits_on_one_thread(lambda: [call(kernel, x, d, c)])
    w, small = data(k, n, seed=3), replace(cpu, cache=0)
    products = [
        (linear.matmul(cpu, m, k, n, bias=False), x, w),
        (linear.matmul(small, m, k, n, bias=False), x, w),
        (linear.backward_data(cpu, m, k, n), d, w),
    ]
    assert all(is_parallel(kernel) for kernel, *_ in products)
    assert_same_bits_on_one_thread(lambda: [call(*product) for product in products])


@pytest.mark.parametrize(("m", "k", "n"), [(256, 16, 520), (104, 48, 520), (32, 96, 520)])
def test_few_rows_and_columns_are_shared_out_too(cpu, call, m, k, n):
    """One strip of inputs, one panel of columns, a few tiles of rows."""
    assert is_parallel(linear.weighted_gradient(cpu, m, k, n))
    assert is_parallel(linear.backward_data(cpu, m, k, n))
    check_product(cpu, call, m, k, n)
    check_gradient(cpu, call, m, k, n)
