"""Normalisation kernels against PyTorch in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import data, few

from myelin.kernels import normalise

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(5)
EPSILON = 1e-5
VIEWS = [(1, 1, 1, 1), (3, 1, 1, 5), (2, 25, 4, 2), (5, 7, 3, 11), (70, 64, 8, 8), (2, 3, 1, 130)]


def normalised(x, view):
    """The true result, statistics over axes 1 and 3."""
    t = x.reshape(view)
    variance, mean = torch.var_mean(t, dim=(1, 3), correction=0, keepdim=True)
    return ((t - mean) / torch.sqrt(variance + EPSILON)).reshape(x.shape)


def error(found, true):
    return np.abs(found - true.reshape(found.shape)).max() / max(np.abs(true).max(), 1e-30)


@pytest.mark.parametrize("view", VIEWS)
def test_forward_and_backward(cpu, call, view):
    n, pixels, groups, each = view
    shape = (n, pixels, groups * each)
    x, d = ((RNG.standard_normal(shape) + 2).astype(np.float32) for _ in range(2))
    inputs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    true = normalised(inputs, view)
    true.backward(torch.tensor(d, dtype=torch.float64))
    stats, y = call(normalise.forward(cpu, *view, epsilon=EPSILON), x, outputs=2)
    assert error(y, true.detach().numpy()) <= 2e-6
    scratch, dx = call(normalise.backward(cpu, *view), y, d, stats, outputs=2)
    assert scratch.shape == stats.shape
    gradient = inputs.grad.numpy()
    # What is left where the terms cancel is relative to the terms.
    scale = np.abs(d).max() * stats[:, 1].max()
    assert np.abs(dx - gradient).max() <= 4e-6 * scale


@given(st.tuples(*(st.integers(1, most) for most in (5, 30, 5, 40))))
@few(8)
def test_any_shape(cpu, call, view):
    """A few numbers may lie together, and then what is left of them is relative to their mean."""
    n, pixels, groups, each = view
    shape = (n, pixels, groups * each)
    x, d = data(*shape) + 2, data(*shape, seed=1)
    inputs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    true = normalised(inputs, view)
    true.backward(torch.tensor(d, dtype=torch.float64))
    stats, y = call(normalise.forward(cpu, *view, epsilon=EPSILON), x, outputs=2)
    each_scale = torch.var(inputs.detach().reshape(view), dim=(1, 3), correction=0) + EPSILON
    scales = 1 / np.sqrt(np.repeat(each_scale.numpy(), each, axis=1))
    np.testing.assert_allclose(stats[:, 1], scales, rtol=2e-5)
    blown_up = (np.abs(x).max() * scales + 1)[:, None, :]
    assert np.all(np.abs(y - true.detach().numpy()) <= 1e-6 * blown_up)
    _, dx = call(normalise.backward(cpu, *view), y, d, stats, outputs=2)
    bound = np.abs(d).max() * scales[:, None, :] * blown_up
    assert np.all(np.abs(dx - inputs.grad.numpy()) <= 4e-6 * bound)


@given(st.tuples(*(st.integers(1, most) for most in (5, 30, 70))))
@few(8)
def test_scales_of_any_shape(cpu, call, view):
    check_stored_scale(cpu, call, view)


@pytest.mark.parametrize("view", [(1, 1, 1), (3, 9, 5), (70, 64, 33)])
def test_stored_scale(cpu, call, view):
    check_stored_scale(cpu, call, view)


def check_stored_scale(cpu, call, view):
    x, d = data(*view), data(*view, seed=1)
    g, s = call(normalise.stored_scale(cpu, *view), x, d, outputs=2)
    assert error(g, (x.astype(float) * d).sum(1)) <= 2e-6
    squares = (g.astype(float) ** 2).sum((1, 2))
    assert (squares <= s * (1 + normalise.stored_scale_inflation())).all()
    assert (s <= squares * (1 + 1e-6)).all()


def test_a_scale_whose_square_is_flushed_still_has_a_norm(cpu, call):
    x, d = np.full((1, 1, 4), 1e-30, np.float32), np.full((1, 1, 4), 1e3, np.float32)
    g, s = call(normalise.stored_scale(cpu, 1, 1, 4), x, d, outputs=2)
    assert s[0] >= (g.astype(float) ** 2).sum() > 0
