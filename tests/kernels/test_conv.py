import numpy as np
import pytest
import torch
import tvm
from torch.nn import functional

from myelin.cpu import LEVELS, machine_features
from myelin.kernels import conv as kernels
from myelin.kernels.bounds import prove
from myelin.kernels.conv import Conv
from myelin.kernels.object import library

PRESENT = [cpu for cpu in LEVELS if not cpu.missing(machine_features())]
CPUS = [
    pytest.param(
        cpu,
        id=cpu.level,
        marks=pytest.mark.skipif(cpu not in PRESENT, reason=f"no {cpu.level} here"),
    )
    for cpu in LEVELS
]
RNG = np.random.default_rng(7)

SHAPES = {
    "mnist-1": Conv(n=3, h=28, w=28, ci=1, co=16, kh=8, kw=8, stride=(2, 2), padding=(2, 2, 2, 2)),
    "mnist-2": Conv(n=3, h=12, w=12, ci=16, co=32, kh=4, kw=4, stride=(2, 2)),
    "rgb": Conv(n=2, h=9, w=9, ci=3, co=40, kh=3, kw=3, padding=(1, 1, 1, 1)),
    "wide": Conv(n=2, h=8, w=8, ci=20, co=64, kh=3, kw=3, padding=(1, 1, 1, 1)),
    "classes": Conv(n=11, h=5, w=7, ci=33, co=10, kh=1, kw=1),
    "shortcut": Conv(n=9, h=6, w=5, ci=8, co=17, kh=1, kw=1, stride=(2, 2)),
    "one": Conv(n=1, h=1, w=1, ci=1, co=1, kh=1, kw=1),
    "row": Conv(n=2, h=1, w=31, ci=2, co=3, kh=1, kw=9, stride=(1, 4), padding=(0, 3, 0, 5)),
    "sparse": Conv(n=2, h=10, w=11, ci=5, co=7, kh=3, kw=2, stride=(4, 3), padding=(0, 1, 3, 0)),
    "bottom": Conv(n=2, h=3, w=3, ci=2, co=2, kh=2, kw=2, padding=(0, 0, 4, 4)),
}


def normal(*shape):
    return RNG.standard_normal(shape).astype("f")


def run(function, cpu, *arguments):
    """Proves and runs a kernel; returns the arguments it has beyond these, all NaN before."""
    prove(function)
    shapes = [tuple(int(e) for e in p.ty.shape) for p in function.params]
    for given_, shape in zip(arguments, shapes, strict=False):
        assert given_.shape == shape
    unwritten = [np.full(shape, np.nan, "f") for shape in shapes[len(arguments) :]]
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in [*arguments, *unwritten]]
    library({"kernel": function}, cpu)["kernel"](*tensors)
    return [t.numpy() for t in tensors[len(arguments) :]]


def bordered(conv, x):
    top, left, bottom, right = conv.padding
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


def patches(conv, x):
    """float64 [n, pixels, kh*kw*ci] in the weight's order."""
    xp = torch.from_numpy(bordered(conv, x).astype("d")).permute(0, 3, 1, 2)
    columns = functional.unfold(xp, (conv.kh, conv.kw), stride=conv.stride)
    n = conv.n
    return (
        columns.view(n, conv.ci, conv.kh * conv.kw, conv.pixels)
        .permute(0, 3, 2, 1)
        .reshape(n, conv.pixels, conv.taps)
        .numpy()
    )


def gradients(conv, x, d):
    """Per-example weight gradients in float64, each by torch from a batch of one."""
    found = []
    for i in range(conv.n):
        xp = torch.from_numpy(bordered(conv, x[i : i + 1]).astype("d")).permute(0, 3, 1, 2)
        w = torch.zeros(conv.co, conv.ci, conv.kh, conv.kw, dtype=torch.float64, requires_grad=True)
        y = functional.conv2d(xp, w, stride=conv.stride)
        y.backward(torch.from_numpy(d[i : i + 1].astype("d")).permute(0, 3, 1, 2))
        found.append(w.grad.permute(2, 3, 1, 0).reshape(-1).numpy())
    return np.array(found)


def close(value, expected, scale=None):
    scale = np.abs(expected).max() if scale is None else scale
    assert value.shape == expected.shape
    assert np.abs(value - expected).max() <= 2e-6 * scale + 1e-30


def check(conv, cpu):
    x, w = normal(conv.n, conv.h, conv.w, conv.ci), normal(conv.kh, conv.kw, conv.ci, conv.co)
    b, d = normal(conv.co), normal(conv.n, conv.oh, conv.ow, conv.co)
    c = RNG.uniform(0, 1, conv.n).astype("f")
    c[0] = 0
    (xp,) = run(kernels.pad(cpu, conv), cpu, x)
    assert np.array_equal(xp, bordered(conv, x))

    p = patches(conv, x)
    y = p @ w.reshape(conv.taps, conv.co).astype("d")
    shape = (conv.n, conv.oh, conv.ow, conv.co)
    (plain,) = run(kernels.forward(cpu, conv, bias=False), cpu, xp, w)
    close(plain, y.reshape(shape))
    (biased,) = run(kernels.forward(cpu, conv, bias=True), cpu, xp, w, b)
    close(biased, (y + b).reshape(shape))

    _, dx = run(kernels.backward_data(cpu, conv), cpu, d, w)
    wanted = torch.zeros(conv.n, conv.ci, conv.h, conv.w, dtype=torch.float64, requires_grad=True)
    top, left, bottom, right = conv.padding
    out = functional.conv2d(
        functional.pad(wanted, (left, right, top, bottom)),
        torch.from_numpy(w.astype("d")).permute(3, 2, 0, 1),
        stride=conv.stride,
    )
    out.backward(torch.from_numpy(d.astype("d")).permute(0, 3, 1, 2))
    close(dx, wanted.grad.permute(0, 2, 3, 1).numpy(), scale=1 + float(wanted.grad.abs().max()))

    each = gradients(conv, x, d)
    squared = (each**2).sum(1)
    g, s = run(kernels.stored_gradient(cpu, conv), cpu, xp, d)
    close(g, each)
    exact = (g.astype("d") ** 2).sum(1)
    bound = kernels.stored_norm_inflation(conv)
    assert np.all(np.abs(s / exact - 1) <= bound)
    _, s, t = run(kernels.gram_norm(cpu, conv), cpu, xp, d)
    reach = (
        np.linalg.norm(p, axis=2) * np.linalg.norm(d.reshape(conv.n, -1, conv.co), axis=2)
    ).sum(1)
    assert np.allclose(t, reach**2, rtol=1e-5)
    assert np.all(squared <= s + kernels.gram_kappa(conv) * t)
    assert np.all(np.abs(s - squared) <= kernels.gram_kappa(conv) * t)
    _, total = run(kernels.weighted_gradient(cpu, conv), cpu, xp, d, c)
    close(
        total.reshape(-1), c.astype("d") @ each, scale=np.abs(each).max() + np.abs(c @ each).max()
    )


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("conv", SHAPES.values(), ids=SHAPES)
def test_all_templates_agree_with_torch(conv, cpu):
    check(conv, cpu)
