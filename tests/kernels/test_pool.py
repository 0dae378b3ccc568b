import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from templates import few
from torch.nn import functional

from myelin.kernels import pool as kernels
from myelin.kernels.epilogue import Epilogue
from myelin.kernels.pool import Pool

RNG = np.random.default_rng(5)
POOLS = {
    "two": Pool(n=3, h=8, w=8, c=32, kh=2, kw=2, stride=(2, 2)),
    "overlapping": Pool(n=2, h=13, w=13, c=16, kh=2, kw=2),
    "odd": Pool(n=2, h=7, w=9, c=21, kh=3, kw=2, stride=(2, 3)),
    "padded": Pool(n=2, h=7, w=8, c=3, kh=3, kw=3, stride=(2, 2), padding=(1, 1, 1, 1)),
    "uncounted": Pool(
        n=2, h=5, w=6, c=9, kh=5, kw=4, stride=(1, 2), padding=(2, 1, 2, 1), count_padding=False
    ),
    "global": Pool(n=2, h=6, w=5, c=70, kh=6, kw=5),
    "one": Pool(n=1, h=1, w=1, c=1, kh=1, kw=1),
}


def torch_pool(pool, kind, x, d):
    """What PyTorch gives forward and backward."""
    t = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
    sizes = {
        "kernel_size": (pool.kh, pool.kw),
        "stride": pool.stride,
        "padding": pool.padding[:2],
    }
    if kind == "max":
        y = functional.max_pool2d(t, **sizes)
    else:
        y = functional.avg_pool2d(t, **sizes, count_include_pad=pool.count_padding)
    y.backward(torch.from_numpy(d).permute(0, 3, 1, 2))
    return y.detach().permute(0, 2, 3, 1).numpy(), t.grad.permute(0, 2, 3, 1).numpy()


def check_max(pool, cpu, call):
    # Few distinct values: nearly every window holds ties.
    rng = np.random.default_rng(6)
    x = rng.integers(-1, 2, (pool.n, pool.h, pool.w, pool.c)).astype("f")
    d = rng.integers(-8, 8, (pool.n, pool.oh, pool.ow, pool.c)).astype("f")
    y, dx = torch_pool(pool, "max", x, d)
    assert np.array_equal(call(kernels.max_forward(cpu, pool), x), y)
    assert np.array_equal(call(kernels.max_backward(cpu, pool), x, y, d), dx)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_max_pooling_is_that_of_torch(pool, cpu, call):
    check_max(pool, cpu, call)


def test_max_pooling_hands_nan_on_as_torch_does(cpu, call):
    pool = POOLS["overlapping"]
    x = RNG.standard_normal((pool.n, pool.h, pool.w, pool.c)).astype("f")
    x[0, 5, 5] = np.nan
    x[0, 5, 7, 3] = np.nan
    x[1, 2, 2, 1] = -np.inf
    x[1, 4:6, 4:6, 2] = -np.inf
    d = RNG.integers(-8, 8, (pool.n, pool.oh, pool.ow, pool.c)).astype("f")
    y, dx = torch_pool(pool, "max", x, d)
    assert np.isnan(y).sum() > 4
    assert np.array_equal(call(kernels.max_forward(cpu, pool), x), y, equal_nan=True)
    assert np.array_equal(call(kernels.max_backward(cpu, pool), x, y, d), dx)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_adjoints_are_finished_once_they_are_whole(pool, cpu, call):
    x, other = (RNG.standard_normal((pool.n, pool.h, pool.w, pool.c)).astype("f") for _ in range(2))
    d = RNG.integers(-8, 8, (pool.n, pool.oh, pool.ow, pool.c)).astype("f")
    # Not linear, and not zero at zero: what is finished too early, or never, would show.
    finish = Epilogue(function=lambda value, a: value * value + a, others=1)
    y, dx = torch_pool(pool, "max", x, d)
    assert np.array_equal(
        call(kernels.max_backward(cpu, pool, finish=finish), x, y, d, other), dx * dx + other
    )
    dx = torch_pool(pool, "average", x, d)[1]
    found = call(kernels.average_backward(cpu, pool, finish=finish), d, other)
    assert np.allclose(found, dx * dx + other, rtol=1e-5, atol=1e-5)


def check_average(pool, cpu, call):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((pool.n, pool.h, pool.w, pool.c)).astype("f")
    d = rng.standard_normal((pool.n, pool.oh, pool.ow, pool.c)).astype("f")
    y, dx = torch_pool(pool, "average", x, d)
    assert np.allclose(call(kernels.average_forward(cpu, pool), x), y, rtol=0, atol=1e-6)
    assert np.allclose(call(kernels.average_backward(cpu, pool), d), dx, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_average_pooling_is_that_of_torch(pool, cpu, call):
    check_average(pool, cpu, call)


@st.composite
def pools(draw):
    """Padding as PyTorch has it: the same on both sides, at most half a window."""
    kh, kw = draw(st.tuples(*[st.integers(1, 5)] * 2))
    top, left = draw(st.integers(0, kh // 2)), draw(st.integers(0, kw // 2))
    return Pool(
        n=draw(st.integers(1, 3)),
        h=draw(st.integers(max(1, kh - 2 * top), 11)),
        w=draw(st.integers(max(1, kw - 2 * left), 11)),
        c=draw(st.integers(1, 40)),
        kh=kh,
        kw=kw,
        stride=draw(st.tuples(*[st.integers(1, 4)] * 2)),
        padding=(top, left, top, left),
        count_padding=draw(st.booleans()),
    )


@given(pools())
@few(8)
def test_any_shape(cpu, call, pool):
    check_max(pool, cpu, call)
    check_average(pool, cpu, call)


def test_asymmetric_padding_is_never_a_maximum(cpu, call):
    pool = Pool(n=1, h=3, w=3, c=2, kh=2, kw=2, stride=(2, 2), padding=(0, 0, 1, 1))
    x = -1 - RNG.random((1, 3, 3, 2)).astype("f")
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf)
    wanted = padded.reshape(1, 2, 2, 2, 2, 2).max(axis=(2, 4))
    assert np.array_equal(call(kernels.max_forward(cpu, pool), x), wanted)


@pytest.mark.parametrize(
    ("change", "reason"), [({"h": 0}, "at least 1"), ({"kh": 9}, "larger than the padded image")]
)
def test_impossible_sizes_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        Pool(**{"n": 1, "h": 4, "w": 4, "c": 1, "kh": 2, "kw": 2, **change})
