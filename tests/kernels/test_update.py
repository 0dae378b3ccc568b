import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from templates import few

from myelin.cpu import Cpu
from myelin.kernels import object as kernel_object
from myelin.kernels import update
from myelin.kernels.bounds import prove

STEPS = 25


def follow(cpu, kernel, optimiser, d, state):
    """Runs both for some steps from the same weights; returns ours and PyTorch's."""
    import tvm

    prove(kernel)
    rng = np.random.default_rng(11)
    step = kernel_object.library({"kernel": kernel}, cpu)["kernel"]
    weights = rng.standard_normal(d).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(weights))
    reference = optimiser([parameter])
    ours = tvm.runtime.tensor(weights)
    held = tvm.runtime.tensor(np.zeros(state, np.float32))
    for number in range(1, STEPS + 1):
        gradient = rng.standard_normal(d).astype(np.float32)
        parameter.grad = torch.tensor(gradient)
        reference.step()
        hyper = np.zeros(16, np.float32)
        hyper[1] = number
        step(ours, held, tvm.runtime.tensor(gradient), tvm.runtime.tensor(hyper))
    return ours.numpy(), parameter.detach().numpy()


@pytest.mark.parametrize("d", [1, 77, 70_003])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.01},
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
        {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    ],
)
def test_sgd_follows_pytorch(cpu, d, options):
    check_sgd(cpu, d, options)


rates = st.floats(1e-3, 0.1)
decays = st.sampled_from([0.0, 0.01])


@given(
    d=st.integers(1, 200),
    lr=rates,
    momentum=st.floats(0, 0.95),
    weight_decay=decays,
    nesterov=st.booleans(),
)
@few(8)
def test_any_sgd(cpu, d, momentum, nesterov, **options):
    check_sgd(cpu, d, {**options, "momentum": momentum, "nesterov": nesterov and momentum > 0})


def check_sgd(cpu, d, options):
    state = d if options.get("momentum") else 16
    kernel = update.sgd(cpu, d, **options)
    ours, true = follow(cpu, kernel, lambda p: torch.optim.SGD(p, **options), d, state)
    np.testing.assert_allclose(ours, true, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("d", [1, 77, 70_003])
@pytest.mark.parametrize(
    "options", [{"lr": 0.01}, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}]
)
def test_adam_follows_pytorch(cpu, d, options):
    check_adam(cpu, d, options)


@given(
    d=st.integers(1, 200),
    lr=rates,
    weight_decay=decays,
    betas=st.tuples(st.floats(0, 0.95), st.floats(0.9, 0.999)),
    eps=st.sampled_from([1e-8, 1e-4]),
)
@few(5)
def test_any_adam(cpu, d, **options):
    check_adam(cpu, d, options)


def check_adam(cpu, d, options):
    kernel = update.adam(cpu, d, **options)
    ours, true = follow(cpu, kernel, lambda p: torch.optim.Adam(p, **options), d, 2 * d)
    np.testing.assert_allclose(ours, true, rtol=1e-5, atol=3e-6)


def test_adam_corrects_bias_at_a_late_step():
    """One step from zero moments, numbered as if many had gone before."""
    cpu = Cpu.native()
    step = kernel_object.library({"kernel": update.adam(cpu, 1, lr=1.0, eps=0.0)}, cpu)["kernel"]
    import tvm

    for number in (1, 2, 1000, 1_000_000):
        hyper = np.zeros(16, np.float32)
        hyper[1] = number
        arrays = [np.zeros(1), np.zeros(2), np.ones(1), hyper]
        tensors = [tvm.runtime.tensor(a.astype(np.float32)) for a in arrays]
        step(*tensors)
        first, second = 0.1 / (1 - 0.9**number), 0.001 / (1 - 0.999**number)
        assert tensors[0].numpy()[0] == pytest.approx(-first / second**0.5, rel=1e-6)
