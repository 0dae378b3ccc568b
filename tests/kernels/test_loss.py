import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from templates import data, few
from torch.nn import functional

from myelin.kernels import loss


def logits(*shape, seed=0):
    return 5 * data(*shape, seed=seed)


def adjoint(values, take):
    """Gradients of the sum of the losses of the examples, by PyTorch in float64."""
    z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    take(z).sum().backward()
    return z.grad.numpy()


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (5, 10), (256, 10), (4, 37), (3, 130)])
def test_cross_entropy(cpu, call, n, classes):
    check_cross_entropy(cpu, call, n, classes)


def check_cross_entropy(cpu, call, n, classes):
    z = logits(n, classes)
    y = np.random.default_rng(1).integers(0, classes, n).astype(np.int32)
    true = adjoint(
        z, lambda t: functional.cross_entropy(t, torch.tensor(y).long(), reduction="none")
    )
    value = call(loss.cross_entropy_adjoint(cpu, n, classes), z, y)
    np.testing.assert_allclose(value, true, rtol=2e-6, atol=3e-7)


def test_cross_entropy_of_wrong_labels_and_logits_is_nan_in_that_row_only(cpu, call):
    z, y = logits(5, 3), np.array([0, 3, -1, 2, 1], np.int32)
    z[4, 1] = np.nan
    value = call(loss.cross_entropy_adjoint(cpu, 5, 3), z, y)
    assert np.isnan(value).all(1).tolist() == [False, True, True, False, True]
    assert not np.isnan(value[[0, 3]]).any()


def test_cross_entropy_of_large_logits(cpu, call):
    z, y = np.array([[1e4, 0, -1e4]], np.float32), np.array([0], np.int32)
    assert not call(loss.cross_entropy_adjoint(cpu, 1, 3), z, y).any()


@pytest.mark.parametrize(("n", "outputs"), [(1, 1), (30, 1), (7, 20)])
def test_binary_cross_entropy(cpu, call, n, outputs):
    check_binary_cross_entropy(cpu, call, n, outputs)


def check_binary_cross_entropy(cpu, call, n, outputs):
    z = logits(n, outputs)
    y = np.random.default_rng(1).random((n, outputs), np.float32)
    true = adjoint(
        z,
        lambda t: functional.binary_cross_entropy_with_logits(
            t, torch.tensor(y).double(), reduction="none"
        ),
    )
    value = call(loss.binary_cross_entropy_adjoint(cpu, n, outputs), z, y)
    np.testing.assert_allclose(value, true, atol=3e-7)


@pytest.mark.parametrize(("n", "outputs"), [(1, 1), (30, 1), (7, 20)])
def test_mean_squared_error(cpu, call, n, outputs):
    check_mean_squared_error(cpu, call, n, outputs)


def check_mean_squared_error(cpu, call, n, outputs):
    z, y = logits(n, outputs), logits(n, outputs, seed=1)
    true = adjoint(
        z, lambda t: functional.mse_loss(t, torch.tensor(y).double(), reduction="none").mean(1)
    )
    value = call(loss.mean_squared_error_adjoint(cpu, n, outputs), z, y)
    np.testing.assert_allclose(value, true, rtol=1e-6, atol=1e-7)


CHECKS = [check_cross_entropy, check_binary_cross_entropy, check_mean_squared_error]


@pytest.mark.parametrize("check", CHECKS)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 70)))
@few(5)
def test_any_shape(cpu, call, check, size):
    check(cpu, call, *size)
