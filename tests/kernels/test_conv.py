from itertools import product

import numpy as np
import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import assert_runtime_suffices, assert_same_bits_on_one_thread, assert_stored_norms
from torch.nn import functional

from myelin.kernels import conv as kernels
from myelin.kernels import winograd
from myelin.kernels.conv import Conv
from myelin.kernels.object import workspace_bytes

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
    "gaps": Conv(n=4, h=4, w=8, ci=1, co=1, kh=5, kw=2, stride=(2, 3), padding=(3, 3, 1, 2)),
    "border": Conv(n=9, h=6, w=1, ci=4, co=2, kh=2, kw=1, stride=(3, 4), padding=(2, 2, 3, 2)),
    "shares": Conv(n=25, h=5, w=4, ci=3, co=18, kh=2, kw=2),
    "bottom": Conv(n=2, h=3, w=3, ci=2, co=2, kh=2, kw=2, padding=(0, 0, 4, 4)),
}
every_shape = pytest.mark.parametrize("conv", SHAPES.values(), ids=SHAPES)


def arrays(conv, seed=7):
    """x within its border, w, b, d."""
    rng = np.random.default_rng(seed)
    shapes = [
        (conv.n, conv.h, conv.w, conv.ci),
        (conv.kh, conv.kw, conv.ci, conv.co),
        (conv.co,),
        (conv.n, conv.oh, conv.ow, conv.co),
    ]
    x, w, b, d = (rng.standard_normal(shape).astype("f") for shape in shapes)
    return bordered(conv, x), w, b, d


def bordered(conv, x):
    top, left, bottom, right = conv.padding
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


def inside(kernel, xp):
    """The image of the kernel's size outside of which there are only zeros."""
    _, h, w, _ = (int(extent) for extent in kernel.params[0].ty.shape)
    found = []
    for top, left in product(range(xp.shape[1] - h + 1), range(xp.shape[2] - w + 1)):
        outside = xp.copy()
        outside[:, top : top + h, left : left + w] = 0
        if not outside.any():
            found.append(xp[:, top : top + h, left : left + w])
    assert len(found) == 1
    return np.ascontiguousarray(found[0])


def channels_first(a):
    return torch.from_numpy(a.astype("d")).permute(0, 3, 1, 2)


def output_and_input_gradient(conv, xp, w, d):
    """float64, by torch."""
    x = channels_first(xp).requires_grad_()
    y = functional.conv2d(
        x, torch.from_numpy(w.astype("d")).permute(3, 2, 0, 1), stride=conv.stride
    )
    y.backward(channels_first(d))
    top, left = conv.padding[:2]
    dx = x.grad[:, :, top : top + conv.h, left : left + conv.w]
    return y.detach().permute(0, 2, 3, 1).numpy(), dx.permute(0, 2, 3, 1).numpy()


def gradients(conv, xp, d):
    """float64 weight gradient of each example, by torch from batches of one, laid out as HWIO."""
    found = []
    for i in range(conv.n):
        w = torch.zeros(conv.co, conv.ci, conv.kh, conv.kw, dtype=torch.float64, requires_grad=True)
        y = functional.conv2d(channels_first(xp[i : i + 1]), w, stride=conv.stride)
        y.backward(channels_first(d[i : i + 1]))
        found.append(w.grad.permute(2, 3, 1, 0).reshape(-1).numpy())
    return np.array(found)


def reach(conv, xp, d):
    """|X||D| of patches and adjoints, in float64."""
    columns = functional.unfold(channels_first(xp), (conv.kh, conv.kw), stride=conv.stride)
    adjoint = d.astype("d").reshape(conv.n, -1)
    return columns.flatten(1).norm(dim=1).numpy() * np.linalg.norm(adjoint, axis=1)


def results(call, kernel, *inputs, count=1):
    """The last `count` arguments after a call: what stands between is scratch.

    A kernel whose first parameter is x gets it without the border that it has in `inputs`.
    """
    if kernel.params[0].name == "x" and inputs[0].ndim == 4:
        inputs = (inside(kernel, inputs[0]), *inputs[1:])
    found = call(kernel, *inputs, outputs=len(kernel.params) - len(inputs))
    return ([found] if isinstance(found, np.ndarray) else found)[-count:]


def assert_close(value, expected):
    value = value.reshape(expected.shape)
    assert np.abs(value - expected).max() <= 3e-6 * max(1, np.abs(expected).max())


def check_forward(conv, cpu, call):
    xp, w, b, d = arrays(conv)
    y, _ = output_and_input_gradient(conv, xp, w, d)
    assert_close(results(call, kernels.forward(cpu, conv, bias=False), xp, w)[0], y)
    assert_close(results(call, kernels.forward(cpu, conv, bias=True), xp, w, b)[0], y + b)


def check_backward_data(conv, cpu, call):
    xp, w, _, d = arrays(conv)
    (dx,) = results(call, kernels.backward_data(cpu, conv), d, w)
    assert_close(dx, output_and_input_gradient(conv, xp, w, d)[1])


def check_stored_gradient(conv, cpu, call):
    xp, _, _, d = arrays(conv)
    g, s = results(call, kernels.stored_gradient(cpu, conv), xp, d, count=2)
    assert_close(g, gradients(conv, xp, d))
    assert_stored_norms(conv, g, s)


def check_gram_norm(conv, cpu, call):
    xp, _, _, d = arrays(conv)
    own = kernels.gradient_error(conv)
    _, s, t = call(kernels.gram_norm(cpu, conv, own), xp, d, outputs=3)
    squared = (gradients(conv, xp, d) ** 2).sum(1)
    assert np.allclose(t, reach(conv, xp, d) ** 2, rtol=1e-5)
    error = kernels.gram_kappa(conv, own) * t
    assert np.all(squared <= s + error)
    assert np.all(s <= 1.01 * squared + error)


def check_weighted_gradient(conv, cpu, call):
    xp, _, _, d = arrays(conv)
    c = np.linspace(0, 1, conv.n, dtype="f")
    (g,) = results(call, kernels.weighted_gradient(cpu, conv), xp, d, c)
    assert_close(g, c.astype("d") @ gradients(conv, xp, d))


def check_batch_gradient(conv, cpu, call):
    xp, _, _, d = arrays(conv)
    (g,) = results(call, kernels.batch_gradient(cpu, conv), xp, d)
    assert_close(g, gradients(conv, xp, d).sum(0))


@every_shape
def test_pad_puts_a_border_of_zeros_around(conv, cpu, call):
    x = np.random.default_rng(1).standard_normal((conv.n, conv.h, conv.w, conv.ci)).astype("f")
    assert np.array_equal(call(kernels.pad(cpu, conv), x), bordered(conv, x))


@every_shape
def test_forward(conv, cpu, call):
    check_forward(conv, cpu, call)


@every_shape
def test_backward_data(conv, cpu, call):
    check_backward_data(conv, cpu, call)


@every_shape
def test_stored_gradient(conv, cpu, call):
    check_stored_gradient(conv, cpu, call)


@every_shape
def test_gram_norm(conv, cpu, call):
    check_gram_norm(conv, cpu, call)


@every_shape
def test_weighted_gradient(conv, cpu, call):
    check_weighted_gradient(conv, cpu, call)


@every_shape
def test_batch_gradient(conv, cpu, call):
    check_batch_gradient(conv, cpu, call)


@st.composite
def convs(draw):
    size = st.integers(1, 9)
    kh, kw = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 4))
    return Conv(
        n=draw(st.integers(1, 10)),
        h=max(draw(size), kh - padding[0] - padding[2]),
        w=max(draw(size), kw - padding[1] - padding[3]),
        ci=draw(st.integers(1, 20)),
        co=draw(st.integers(1, 40)),
        kh=kh,
        kw=kw,
        stride=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        padding=padding,
    )


CHECKS = [
    check_forward,
    check_backward_data,
    check_stored_gradient,
    check_gram_norm,
    check_weighted_gradient,
    check_batch_gradient,
]


@given(conv=convs(), check=st.sampled_from(CHECKS))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_shape(cpu, call, conv, check):
    check(conv, cpu, call)


@pytest.mark.parametrize(("pixels", "co"), [(25, 32), (1, 1), (7, 45)])
def test_stored_bias(pixels, co, cpu, call):
    d = np.random.default_rng(2).standard_normal((5, pixels, co)).astype("f")
    g, s = call(kernels.stored_bias(cpu, 5, pixels, co), d, outputs=2)
    assert_close(g, d.astype("d").sum(1))
    exact = (g.astype("d") ** 2).sum(1)
    bound = kernels.stored_norm_inflation(Conv(n=5, h=pixels, w=1, ci=1, co=co, kh=1, kw=1))
    assert np.all(np.abs(s / exact - 1) <= bound)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_an_example_with_factor_zero_adds_nothing(poison, cpu, call):
    conv = SHAPES["rgb"]
    xp, _, _, d = arrays(conv)
    spoiled_x, spoiled_d = xp.copy(), d.copy()
    spoiled_x[0, 4, 4, 1] = poison
    spoiled_d[0, 3, 3, 5] = poison
    c = np.array([0, 0.5], "f")
    kernel = kernels.weighted_gradient(cpu, conv)
    _, g = call(kernel, spoiled_x, spoiled_d, c, outputs=2)
    assert g.tobytes() == call(kernel, xp, d, c, outputs=2)[1].tobytes()


@pytest.mark.parametrize("name", ["rgb", "mnist-2"])
def test_norms_show_what_is_not_finite_and_only_there(name, cpu, call):
    conv = SHAPES[name]
    xp, _, _, d = arrays(conv)
    stored = kernels.stored_gradient(cpu, conv)
    gram = kernels.gram_norm(cpu, conv, kernels.gradient_error(conv))
    clean = results(call, stored, xp, d)[0], call(gram, xp, d, outputs=3)[1]
    xp[1, 4, 4, 0] = np.nan
    spoiled = results(call, stored, xp, d)[0], call(gram, xp, d, outputs=3)[1]
    for before, after in zip(clean, spoiled, strict=True):
        assert np.isfinite(before).all()
        assert np.isnan(after[1])
        assert np.array_equal(np.delete(before, 1), np.delete(after, 1))


def cancelling(conv, seed):
    """Equal patches with adjoints that sum to almost nothing: the gradient is all rounding."""
    rng = np.random.default_rng(seed)
    xp = np.broadcast_to(rng.standard_normal(conv.ci), (conv.n, conv.hp, conv.wp, conv.ci)).astype(
        "f"
    )
    d = rng.standard_normal((conv.n, conv.oh, conv.ow, conv.co))
    d -= d.mean(axis=(1, 2), keepdims=True)
    d += 1e-6 * rng.standard_normal(d.shape)
    return np.ascontiguousarray(xp), d.astype("f")


def own_gradients(templates, conv, cpu, call, xp, d):
    """What each example really adds in `weighted_gradient`."""
    kernel = templates.weighted_gradient(cpu, conv)
    each = np.eye(conv.n, dtype="f")
    return np.array([results(call, kernel, xp, d, c)[0] for c in each], "d")


def assert_bounded(templates, conv, cpu, call, xp, d):
    error = templates.gradient_error(conv)
    _, s, t = call(kernels.gram_norm(cpu, conv, error), xp, d, outputs=3)
    bound = s.astype("d") + kernels.gram_kappa(conv, error) * t.astype("d")
    real = (own_gradients(templates, conv, cpu, call, xp, d) ** 2).sum(1)
    exact = (gradients(conv, xp, d) ** 2).sum(1)
    assert np.all(real <= bound)
    assert np.all(exact <= bound)
    return s, exact


@pytest.mark.parametrize(
    ("templates", "conv"),
    [
        (kernels, Conv(n=2, h=8, w=8, ci=16, co=24, kh=3, kw=2)),
        (kernels, Conv(n=2, h=9, w=9, ci=6, co=5, kh=2, kw=2, stride=(2, 2))),
        (winograd, Conv(n=2, h=8, w=8, ci=16, co=24, kh=3, kw=3)),
    ],
    ids=["shifted", "unfolded", "winograd"],
)
def test_the_gram_bound_holds_where_pixels_cancel(templates, conv, cpu, call):
    below = 0
    for seed in range(2):
        s, exact = assert_bounded(templates, conv, cpu, call, *cancelling(conv, seed))
        below += (s < exact).sum()
    assert below > 0  # without κ the norm would have been too small


@pytest.fixture
def flushing():
    """One thread, with subnormal numbers taken as zero as in an enclave."""
    configure = tvm.get_global_func("runtime.config_threadpool")
    configure(1, 1)
    assert torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    configure(1, 2)


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("scale", [1e-20, 1e-22, 1e-30])
@pytest.mark.parametrize("templates", [kernels, winograd], ids=["direct", "winograd"])
def test_the_gram_bound_holds_where_products_are_flushed(scale, templates, cpu, call):
    conv = Conv(n=2, h=8, w=8, ci=16, co=16, kh=3, kw=3)
    xp, _, _, d = arrays(conv)
    assert_bounded(templates, conv, cpu, call, xp * np.float32(scale), d * np.float32(1e18))


@pytest.mark.usefixtures("flushing")
def test_the_stored_norm_covers_squares_that_are_flushed(cpu, call):
    conv = SHAPES["wide"]
    xp, _, _, d = arrays(conv)
    g, s = results(call, kernels.stored_gradient(cpu, conv), xp * np.float32(1e-21), d, count=2)
    assert np.all((g.astype("d") ** 2).sum(1) <= s * (1 + kernels.stored_norm_inflation(conv)))


@pytest.mark.parametrize("name", ["classes", "shares"])
def test_bits_do_not_depend_on_threads(name, cpu, call):
    conv = SHAPES[name]
    xp, w, b, d = arrays(conv)
    c = np.linspace(0, 1, conv.n, dtype="f")
    gram = kernels.gram_norm(cpu, conv, kernels.gradient_error(conv))

    def everything():
        return [
            *results(call, kernels.forward(cpu, conv, bias=True), xp, w, b),
            *results(call, kernels.backward_data(cpu, conv), d, w),
            *results(call, kernels.stored_gradient(cpu, conv), xp, d, count=2),
            *call(gram, xp, d, outputs=3)[1:],
            *results(call, kernels.weighted_gradient(cpu, conv), xp, d, c),
            *results(call, kernels.batch_gradient(cpu, conv), xp, d),
        ]

    assert_same_bits_on_one_thread(everything)


def test_chains_of_additions_over_examples_are_short(cpu):
    conv = Conv(n=256, h=8, w=8, ci=256, co=256, kh=3, kw=3, padding=(1, 1, 1, 1))
    assert kernels.weighted_gradient_additions(conv) == 16 + 16 + 1
    assert kernels.stored_norm_inflation(conv) < 2e-6
    assert kernels.gram_kappa(conv, kernels.gradient_error(conv)) < 8e-5
    assert kernels.gram_kappa(conv, winograd.gradient_error(conv)) < 8e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (0, 1)}, "at least 1"),
        ({"padding": (0, -1, 0, 0)}, "padding at least 0"),
        ({"co": 0}, "at least one channel"),
        ({"kw": 9}, "larger than the padded image"),
    ],
)
def test_impossible_sizes_are_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        Conv(**{"n": 1, "h": 4, "w": 4, "ci": 1, "co": 1, "kh": 2, "kw": 2, **change})


def test_the_object_needs_nothing_that_the_runtime_lacks(cpu):
    conv = SHAPES["rgb"]
    templates = {
        "pad": kernels.pad(cpu, conv),
        "forward": kernels.forward(cpu, conv, bias=True),
        "backward_data": kernels.backward_data(cpu, conv),
        "stored_gradient": kernels.stored_gradient(cpu, conv),
        "stored_bias": kernels.stored_bias(cpu, conv.n, conv.pixels, conv.co),
        "gram_norm": kernels.gram_norm(cpu, conv, kernels.gradient_error(conv)),
        "weighted_gradient": kernels.weighted_gradient(cpu, conv),
        "batch_gradient": kernels.batch_gradient(cpu, conv),
    }
    assert_runtime_suffices(templates, cpu)
    assert workspace_bytes(templates, cpu) == 0


def test_taps_that_meet_nothing_but_zeros_are_left_out_where_they_are_many():
    small, large = SHAPES["mnist-2"], Conv(n=1, h=64, w=64, ci=1, co=1, kh=3, kw=3)
    for conv, parts in ((small, [(1, 1), (4, 2), (1, 1)] * 2), (large, [(64, 3)])):
        rows, columns = kernels.axes(conv)
        for axis in (rows, columns):
            assert [(phase.size, len(phase.taps)) for phase in axis.phases()] == parts
