"""The error of every convolution of the benchmarks' models, against PyTorch in float64.

On the best level of this machine, in float32 and with whole batches: algorithms and how much they
take at once depend on all of these.
"""

import numpy as np
import pytest
import test_conv as direct
import torch
from torch.nn import functional

from benchmarks.models import CASES
from myelin import clipping, nn, planner
from myelin.cpu import Cpu
from myelin.graph import Objective, layers
from myelin.importers import load
from myelin.kernels.clipping import weighted_sum

CONVOLUTIONAL = [case for case in CASES if not case.name.startswith("mlp")]


@pytest.fixture
def cpu():
    return Cpu.native()


@pytest.mark.slow
@pytest.mark.parametrize("case", CONVOLUTIONAL, ids=lambda case: case.name.split()[0])
def test_every_convolution_is_accurate(case, cpu, call):
    found = convolutions(case, cpu)
    assert found
    for conv, method in found:
        errors = {
            **errors_of_products(conv, cpu, call),
            **errors_of_sums(conv, method, cpu, call),
        }
        assert max(errors.values()) <= 1e-5, (conv, errors)


def convolutions(case, cpu):
    """(convolution, how its norm is taken) of a step, each once."""
    model = load(case.layers(nn), case.shape)
    objective = Objective(
        names=tuple(model.shapes),
        loss="cross-entropy",
        clipping="per-example",
        precision="float32",
        level=cpu.level,
        stored_bytes=planner.STORED_BYTES,
    )
    module = model.relax(case.batch)
    how = dict(clipping.methods(module, objective))
    return list(
        dict.fromkeys(
            (clipping.convolution(layer), how[layer.name])
            for layer in layers(module["main"], objective)
            if layer.kind == "conv2d"
        )
    )


def errors_of_products(conv, cpu, call):
    """Of a layer's output, and of the gradient of its input."""
    xp, w, b, d = direct.arrays(conv)
    y, dx = direct.output_and_input_gradient(conv, xp, w, d)
    forward = templates(conv, "forward", cpu).forward(cpu, conv, bias=True)
    backward = templates(conv, "backward_data", cpu).backward_data(cpu, conv)
    return {
        "forward": error(direct.results(call, forward, xp, w, b)[0], y + b),
        "backward_data": error(direct.results(call, backward, d, w)[0], dx),
    }


def errors_of_sums(conv, method, cpu, call):
    """Of Σ c_i g_i, from gradients that were stored or found in the sum, and of Σ g_i."""
    xp, _, _, d = direct.arrays(conv)
    c = np.linspace(0, 1, conv.n, dtype="f")
    if method == "stored":
        kernel = templates(conv, "stored_gradient", cpu).stored_gradient(cpu, conv)
        each = direct.results(call, kernel, xp, d, count=2)[0]
        total = call(weighted_sum(cpu, conv.n, conv.weights), each, c)
    else:
        kernel = templates(conv, "weighted_gradient", cpu).weighted_gradient(cpu, conv)
        (total,) = direct.results(call, kernel, xp, d, c)
    kernel = templates(conv, "batch_gradient", cpu).batch_gradient(cpu, conv)
    (whole,) = direct.results(call, kernel, xp, d)
    return {
        method: error(total, weighted(conv, xp, d, c)),
        "batch_gradient": error(whole, weighted(conv, xp, d, np.ones_like(c))),
    }


def templates(conv, product, cpu):
    return planner.CONV[planner.algorithm(cpu, conv, product, "float32")]


def weighted(conv, xp, d, c):
    w = torch.zeros(conv.co, conv.ci, conv.kh, conv.kw, dtype=torch.float64, requires_grad=True)
    y = functional.conv2d(direct.channels_first(xp), w, stride=conv.stride)
    y.backward(direct.channels_first(c[:, None, None, None].astype("d") * d))
    return w.grad.permute(2, 3, 1, 0).numpy()


def error(value, expected):
    """The largest, relative to the largest number."""
    return np.abs(value.reshape(expected.shape) - expected).max() / np.abs(expected).max()
