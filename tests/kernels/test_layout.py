import numpy as np
import pytest

from myelin.cpu import Cpu
from myelin.kernels import layout

RNG = np.random.default_rng(4)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 3, 4, 5), (0, 2, 3, 1)),
        ((2, 4, 5, 3), (0, 3, 1, 2)),
        ((33, 47), (1, 0)),
        ((2, 1, 8, 8), (0, 2, 3, 1)),
        ((2, 3, 4, 5), (2, 3, 1, 0)),
        ((64, 16, 20), (1, 0, 2)),
        ((1,), (0,)),
        ((256, 3, 99), (0, 2, 1)),
        ((5, 40, 37), (0, 2, 1)),
        ((16, 3, 32), (2, 1, 0)),
    ],
)
def test_permute(cpu, call, shape, axes):
    x = normal(*shape)
    value = call(layout.permute(cpu, shape, axes), x)
    np.testing.assert_array_equal(value.ravel(), x.transpose(axes).ravel())


def test_nhwc_and_back(cpu, call):
    x = normal(3, 5, 4, 6)
    there = call(layout.nhwc(cpu, 3, 5, 4, 6), x).reshape(3, 4, 6, 5)
    np.testing.assert_array_equal(there, x.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(call(layout.nchw(cpu, 3, 4, 6, 5), there).ravel(), x.ravel())


def test_concatenate_and_cut(cpu, call):
    parts = [normal(5, width) for width in (7, 1, 40)]
    joined = call(layout.concatenate(cpu, 5, [7, 1, 40]), *parts)
    np.testing.assert_array_equal(joined, np.concatenate(parts, 1))
    for start, part in zip((0, 7, 8), parts, strict=True):
        value = call(layout.cut(cpu, 5, 48, start, part.shape[1]), joined)
        np.testing.assert_array_equal(value, part)


def test_wrong_axes_and_columns_are_refused():
    cpu = Cpu.native()
    with pytest.raises(ValueError, match="no permutation of 2 axes"):
        layout.permute(cpu, (2, 3), (0, 0))
    with pytest.raises(ValueError, match="do not lie in a width of 5"):
        layout.cut(cpu, 2, 5, 3, 3)
