import itertools
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import test_conv as direct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import assert_runtime_suffices, assert_same_bits_on_one_thread, assert_stored_norms

from myelin.cpu import Cpu
from myelin.kernels import winograd
from myelin.kernels.conv import Conv
from myelin.kernels.object import workspace_bytes
from myelin.kernels.operands import BF16, FLOAT32
from myelin.kernels.tir import gamma
from myelin.kernels.window import Product

SQUARE = {"kh": 3, "kw": 3, "padding": (1, 1, 1, 1)}
SHAPES = {
    "whole": Conv(n=3, h=8, w=12, ci=32, co=64, **SQUARE),
    "ragged": Conv(n=2, h=9, w=11, ci=20, co=50, **SQUARE),
    "scalars": Conv(n=3, h=7, w=5, ci=1, co=1, kh=3, kw=3, padding=(0, 1, 2, 0)),
    "narrow": Conv(n=11, h=3, w=4, ci=17, co=3, kh=3, kw=3),
    "flat": Conv(n=5, h=1, w=2, ci=3, co=5, **SQUARE),
    "pixel": Conv(n=2, h=1, w=1, ci=16, co=18, kh=3, kw=3, padding=(2, 0, 1, 2)),
    "many": Conv(n=29, h=4, w=5, ci=3, co=18, **SQUARE),
}
every_shape = pytest.mark.parametrize("conv", SHAPES.values(), ids=SHAPES)


def outputs(conv, cpu, call):
    xp, w, b, d = direct.arrays(conv)
    return [
        *direct.results(call, winograd.forward(cpu, conv, bias=True), xp, w, b),
        *direct.results(call, winograd.backward_data(cpu, conv), d, w),
        *direct.results(call, winograd.stored_gradient(cpu, conv), xp, d, count=2),
        *direct.results(call, winograd.weighted_gradient(cpu, conv), xp, d, factors(conv)),
        *direct.results(call, winograd.batch_gradient(cpu, conv), xp, d),
    ]


def test_sums_are_dealt_out_by_examples_and_large_ones_by_channels_too():
    divided = Conv(n=5, h=5, w=6, ci=192, co=160, **SQUARE)
    shapes = {**SHAPES, "divided": divided}
    sums = {name: winograd.Sums(conv=conv) for name, conv in shapes.items()}
    dealt = {name: (s.example_shares, s.channel_shares, s.each) for name, s in sums.items()}
    assert dealt["whole"] == (3, 1, 1)
    assert dealt["narrow"] == (8, 1, 1)
    assert dealt["divided"] == (2, 4, 2)
    assert dealt["many"] == (8, 1, 3)


@pytest.mark.parametrize(
    ("n", "size", "channels", "level", "block"),
    [
        (64, 8, 256, "sapphirerapids", 32),
        (64, 16, 128, "znver4", 32),
        (64, 8, 256, "znver4", 16),  # inputs of 32 would fill the cache
        (64, 32, 64, "sapphirerapids", 16),  # a cache holds the weights
        (32, 4, 256, "sapphirerapids", 16),  # too few for all threads
    ],
)
def test_more_tiles_at_once_where_weights_do_not_fit_a_cache(n, size, channels, level, block):
    conv = Conv(n=n, h=size, w=size, ci=channels, co=channels, **SQUARE)
    kernel = winograd.forward(Cpu.named(level), conv, bias=False)
    assert at_once(kernel, channels) == block
    chunks = scratch(kernel, "inputs")[0]
    assert chunks == min(8, n * size**2 // 16 // block) >= 2


def scratch(kernel, name):
    return [int(e) for e in next(p for p in kernel.params if p.name == name).ty.shape]


def at_once(kernel, depth):
    """Tiles whose inputs, `depth` elements each, a chunk keeps at every point."""
    plane, rest = divmod(scratch(kernel, "inputs")[1], 36)
    tiles, more = divmod(plane - 16, depth)
    assert rest == more == 0
    return tiles


BLOCKS = {
    "whole": (Conv(n=16, h=16, w=16, ci=48, co=48, **SQUARE), 32),
    "ragged": (Conv(n=21, h=13, w=15, ci=48, co=48, **SQUARE), 28),
}
of_many_tiles = pytest.mark.parametrize(("conv", "block"), BLOCKS.values(), ids=BLOCKS)


def overfull(cpu, depth):
    """A processor whose cache holds the inputs of 40 tiles, but not the weights of 48 channels."""
    return replace(cpu, cache=40 * 4 * 36 * depth)


@of_many_tiles
def test_many_tiles_at_once_are_accurate(conv, block, cpu, call):
    small = overfull(cpu, conv.ci)
    forward = winograd.forward(small, conv, bias=True)
    backward = winograd.backward_data(small, conv)
    assert at_once(forward, conv.ci) == at_once(backward, conv.co) == block
    xp, w, b, d = direct.arrays(conv)
    y, dx = direct.output_and_input_gradient(conv, xp, w, d)
    assert_accurate(direct.results(call, forward, xp, w, b)[0], y + b)
    assert_accurate(direct.results(call, backward, d, w)[0], dx)
    weighted = winograd.weighted_gradient(small, conv)
    (total,) = direct.results(call, weighted, xp, d, factors(conv))
    assert_accurate(total, factors(conv).astype("d") @ direct.gradients(conv, xp, d))


@pytest.mark.parametrize("n", [1, 7, 64, 1000, 65_536])
def test_chains_of_additions_over_examples_are_short(n):
    """Of a run, of the runs of a share and one more example, of the shares."""
    for conv in (
        Conv(n=n, h=8, w=8, ci=256, co=256, **SQUARE),
        Conv(n=n, h=4, w=4, ci=16, co=16, **SQUARE),
    ):
        sums = winograd.Sums(conv=conv)
        shares, together = sums.example_shares, sums.together
        sizes = [sums.each + (share < n % shares) for share in range(shares)]
        assert sum(sizes) == n
        longest = 1 + together + (-(-sums.each // together) + (n % shares > 0)) + shares - 1
        assert longest <= winograd.weighted_gradient_additions(conv) <= 20 + n // 8


@pytest.mark.parametrize(
    ("conv", "cache", "dealt"),
    [
        (Conv(n=21, h=5, w=6, ci=16, co=32, **SQUARE), 4 * 36 * 4 * 48 * 2, (8, 1, 2, 2)),
        (Conv(n=27, h=5, w=6, ci=32, co=48, **SQUARE), 4 * 36 * 4 * 48, (4, 2, 6, 1)),
        (Conv(n=11, h=5, w=6, ci=64, co=18, **SQUARE), 4 * 36 * 4 * 34 * 2, (2, 4, 5, 2)),
    ],
    ids=["runs", "halves", "quarters"],
)
def test_sums_of_several_runs_and_shares(conv, cache, dealt, cpu, call, monkeypatch):
    """Accurate, the same on one thread, and without what an example may not add."""
    monkeypatch.setattr(winograd, "_CACHE", cache)
    sums = winograd.Sums(conv=conv)
    assert (sums.example_shares, sums.channel_shares, sums.each, sums.together) == dealt
    check(conv, cpu, call)
    xp, _, _, d = direct.arrays(conv)
    weighted, batch = winograd.weighted_gradient(cpu, conv), winograd.batch_gradient(cpu, conv)
    c = factors(conv)

    def both():
        first = direct.results(call, weighted, xp, d, c)
        return [*first, *direct.results(call, batch, xp, d)]

    assert_same_bits_on_one_thread(both)
    for poisoned in (1, conv.n - 1):
        c[poisoned] = 0
    clean = direct.results(call, weighted, xp, d, c)[0]
    for poisoned in (1, conv.n - 1):
        xp[poisoned, 1:-1, 1:-1] = np.nan
    assert direct.results(call, weighted, xp, d, c)[0].tobytes() == clean.tobytes()


def factors(conv):
    return np.linspace(0, 1, conv.n, dtype="f")


def assert_accurate(value, expected):
    error = np.abs(value.reshape(expected.shape) - expected).max()
    assert error <= 1e-5 * np.abs(expected).max()


def check(conv, cpu, call):
    """All kernels against torch in float64, and the norm against what is stored."""
    xp, w, b, d = direct.arrays(conv)
    y, dx, g, s, total, whole = outputs(conv, cpu, call)
    expected_y, expected_dx = direct.output_and_input_gradient(conv, xp, w, d)
    assert_accurate(y, expected_y + b)
    assert_accurate(dx, expected_dx)
    expected_g = direct.gradients(conv, xp, d)
    assert_accurate(g, expected_g)
    assert_accurate(total, factors(conv).astype("d") @ expected_g)
    assert_accurate(whole, expected_g.sum(0))
    assert_stored_norms(conv, g, s)


@every_shape
def test_every_kernel_is_accurate(conv, cpu, call):
    check(conv, cpu, call)


@st.composite
def convs(draw):
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    return Conv(
        n=draw(st.integers(1, 6)),
        h=draw(st.integers(max(1, 3 - padding[0] - padding[2]), 14)),
        w=draw(st.integers(max(1, 3 - padding[1] - padding[3]), 14)),
        ci=draw(st.integers(1, 36)),
        co=draw(st.integers(1, 70)),
        kh=3,
        kw=3,
        padding=padding,
    )


@pytest.mark.slow
@given(conv=convs())
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_shape(cpu, call, conv):
    check(conv, cpu, call)


def test_deep_layers_stay_accurate(cpu, call):
    """The deepest sums of the tables' models: 256 channels."""
    conv = Conv(n=2, h=8, w=8, ci=256, co=256, **SQUARE)
    check(conv, cpu, call)


def test_bits_do_not_depend_on_threads(cpu, call):
    assert_same_bits_on_one_thread(lambda: outputs(SHAPES["ragged"], cpu, call))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_example(poison, cpu, call):
    conv = SHAPES["whole"]
    xp, _, _, d = direct.arrays(conv)
    kernel = winograd.stored_gradient(cpu, conv)
    clean, norms = direct.results(call, kernel, xp, d, count=2)
    xp[1, 4, 4, 0] = poison
    spoiled, spoiled_norms = direct.results(call, kernel, xp, d, count=2)
    assert not np.isfinite(spoiled_norms[1])
    for before, after in ((clean, spoiled), (norms, spoiled_norms)):
        assert np.array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_a_sum_takes_nothing_that_is_not_finite(poison, cpu, call):
    """1e38 overflows only in the transforms, so that a bound of the norm may well be finite."""
    conv = SHAPES["whole"]
    xp, _, _, d = direct.arrays(conv)
    c = np.array([0.5, 1, 0.25], "f")
    without = np.array([0.5, 0, 0.25], "f")
    clean = direct.results(call, winograd.weighted_gradient(cpu, conv), xp, d, without)[0]
    xp[1, 1:-1, 1:-1] = poison
    d[1] *= np.float32(1e-20)
    spoiled = direct.results(call, winograd.weighted_gradient(cpu, conv), xp, d, c)[0]
    assert np.isfinite(spoiled).all()
    if not np.isfinite(poison):
        assert spoiled.tobytes() == clean.tobytes()


def transforms():
    """Bᵀ, A and G along one axis, from the polynomials through the points."""
    points = np.array([0, 0.6875, -0.6875, 1.3125, -1.3125])
    powers = np.vander(points, 4, increasing=True)
    adjoint = np.vstack([powers, [0, 0, 0, 1]])
    scale = [np.prod([p - q for q in points if q != p]) for p in points]
    weight = np.vstack([powers[:, :3] / np.array(scale)[:, None], [0, 0, 1]])
    rows = [np.poly([q for q in points if q != p])[::-1] for p in points]
    inputs = np.vstack([np.append(row, 0) for row in rows] + [np.poly(points)[::-1]])
    return inputs, adjoint, weight


def test_errors_grow_by_no_more_than_is_said():
    inputs, adjoint, weight = transforms()
    exact = np.einsum("pk,pi,pj->kij", weight, inputs, adjoint)
    taps = np.zeros((3, 6, 4))
    for k in range(3):
        taps[k, range(k, k + 4), range(4)] = 1
    np.testing.assert_allclose(exact, taps, atol=1e-12)
    sizes = np.einsum("pk,pi,pj->kij", abs(weight), abs(inputs), abs(adjoint))
    largest = np.linalg.svd(sizes.reshape(3, -1))[1][0]
    conv = SHAPES["whole"]
    assert gamma(2 * 3 + 25) * largest**2 <= winograd.gradient_error(conv)


@pytest.mark.parametrize("seed", range(2))
def test_gradients_are_as_exact_as_is_said(seed, cpu, call):
    conv = Conv(n=2, h=11, w=14, ci=16, co=32, kh=3, kw=3)
    for xp, d in (direct.cancelling(conv, seed), direct.arrays(conv, seed)[::3]):
        g = direct.results(call, winograd.stored_gradient(cpu, conv), xp, d, count=2)[0]
        error = np.linalg.norm(g - direct.gradients(conv, xp, d), axis=1)
        assert np.all(error <= winograd.gradient_error(conv) * direct.reach(conv, xp, d))


def test_it_can_compute_what_has_nine_taps_at_stride_one():
    for conv, product in itertools.product(SHAPES.values(), get_args(Product)):
        assert winograd.can(conv, product)
    for other in (
        Conv(n=64, h=32, w=32, ci=64, co=64, stride=(2, 2), **SQUARE),
        Conv(n=64, h=32, w=32, ci=64, co=64, kh=5, kw=3),
        Conv(n=64, h=32, w=32, ci=64, co=64, kh=3, kw=3, padding=(3, 0, 0, 0)),
    ):
        assert not winograd.can(other, "forward")


def test_the_object_needs_nothing_that_the_runtime_lacks(cpu):
    conv = SHAPES["ragged"]
    templates = {
        "forward": winograd.forward(cpu, conv, bias=True),
        "backward_data": winograd.backward_data(cpu, conv),
        "stored_gradient": winograd.stored_gradient(cpu, conv),
        "weighted_gradient": winograd.weighted_gradient(cpu, conv),
        "batch_gradient": winograd.batch_gradient(cpu, conv),
    }
    assert_runtime_suffices(templates, cpu)
    assert workspace_bytes(templates, cpu) == 0


@pytest.mark.parametrize("operands", [FLOAT32, BF16], ids=["float32", "bf16"])
def test_scratch_is_counted_as_kernels_keep_it(operands):
    cpu = Cpu.named("znver4")
    for conv in (SHAPES["whole"], Conv(n=9, h=5, w=9, ci=192, co=160, **SQUARE)):
        sums = winograd.Sums(conv=conv)
        for kernel, dealt in (
            (winograd.stored_gradient(cpu, conv, operands=operands), None),
            (winograd.batch_gradient(cpu, conv, operands=operands), sums),
        ):
            sizes = {p.name: math.prod(int(d) for d in p.ty.shape) for p in kernel.params}
            kept = sum(4 * sizes[name] for name in sizes.keys() - {"x", "d", "g", "s"})
            counted = winograd.gradient_scratch(cpu, conv, sums=dealt, operands=operands)
            assert kept == counted > 0
