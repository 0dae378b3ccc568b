import numpy as np
import pytest
import torch
from torch.nn import functional

from myelin.kernels import loss

RNG = np.random.default_rng(5)


def logits(*shape):
    return (RNG.standard_normal(shape) * 5).astype(np.float32)


def adjoint(values, take):
    """Gradients of the sum of the losses of the examples, by PyTorch in float64."""
    z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    take(z).sum().backward()
    return z.grad.numpy()


@pytest.mark.parametrize(("n", "classes"), [(1, 1), (5, 10), (256, 10), (4, 37), (3, 130)])
def test_cross_entropy(cpu, call, n, classes):
    z, y = logits(n, classes), RNG.integers(0, classes, n).astype(np.int32)
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
    z, y = logits(n, outputs), RNG.random((n, outputs)).astype(np.float32)
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
    z, y = logits(n, outputs), logits(n, outputs)
    true = adjoint(
        z, lambda t: functional.mse_loss(t, torch.tensor(y).double(), reduction="none").mean(1)
    )
    value = call(loss.mean_squared_error_adjoint(cpu, n, outputs), z, y)
    np.testing.assert_allclose(value, true, rtol=1e-6, atol=1e-7)
