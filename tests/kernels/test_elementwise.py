import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import data, few
from tvm.script.ir_builder import tirx as T

from myelin.kernels import functions
from myelin.kernels.elementwise import collapse
from myelin.kernels.elementwise import map as elementwise


@pytest.mark.parametrize(
    ("shapes", "out"),
    [
        ([(4, 5, 6), (6,)], (4, 5, 6)),
        ([(4, 5, 6), (4, 1, 1)], (4, 5, 6)),
        ([(4, 1, 6), (1, 5, 1)], (4, 5, 6)),
        ([(300, 17), (300, 1)], (300, 17)),
        ([(7,), (1,)], (7,)),
        ([(), (1,)], (1,)),
        ([(1, 1), (1, 1)], (3, 5)),
        ([(256, 256), (256, 256)], (256, 256)),
    ],
)
def test_broadcasts_as_numpy(cpu, call, shapes, out):
    check(cpu, call, shapes, out)


@st.composite
def broadcasts(draw):
    """Two shapes of fewer axes or with some of extent 1, and what they broadcast to."""
    out = draw(st.lists(st.integers(1, 20), max_size=4))
    shapes = [
        tuple(
            draw(st.sampled_from([1, extent])) for extent in out[draw(st.integers(0, len(out))) :]
        )
        for _ in range(2)
    ]
    return shapes, tuple(out)


@given(broadcasts())
@few(10)
def test_any_shapes(cpu, call, case):
    check(cpu, call, *case)


def check(cpu, call, shapes, out):
    a, b = (data(*shape, seed=i) for i, shape in enumerate(shapes))
    kernel = elementwise(cpu, shapes, out, lambda x, y: T.max(x * y + functions.tanh(x), x))
    true = np.broadcast_to(np.maximum(a * b + np.tanh(a), a), out)
    np.testing.assert_allclose(call(kernel, a, b).reshape(out), true, rtol=2e-6, atol=2e-6)


def test_axes_that_run_together_are_merged():
    assert collapse((4, 5, 6), [(4, 5, 6), (4, 5, 6)]) == ((120,), [(120,), (120,)])
    assert collapse((4, 5, 6), [(4, 5, 6), (6,)]) == ((20, 6), [(20, 6), (1, 6)])
    assert collapse((4, 1, 6), [(4, 1, 6), (4, 1, 1)]) == ((4, 6), [(4, 6), (4, 1)])


def test_shape_that_does_not_broadcast_is_refused():
    with pytest.raises(ValueError, match=r"\(3,\) does not broadcast to \(4,\)"):
        collapse((4,), [(3,)])
    with pytest.raises(ValueError, match=r"\(2, 4\) does not broadcast to \(4,\)"):
        collapse((4,), [(2, 4)])
