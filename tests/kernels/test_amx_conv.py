"""Convolutions in tiles: compiled everywhere, and computed where this machine has tiles."""

import re

import numpy as np
import pytest
import test_amx
import test_conv as direct
import test_epilogue
import test_mixed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import assert_runtime_suffices, assert_same_bits_on_one_thread, assert_stored_norms

from myelin.cpu import Cpu, machine_features
from myelin.kernels import amx_conv, bounds, split
from myelin.kernels import object as kernel_object
from myelin.kernels.conv import Conv
from myelin.kernels.object import argument_bytes, workspace_bytes

CPU = Cpu.named("sapphirerapids")
SQUARE = {"kh": 3, "kw": 3, "padding": (1, 1, 1, 1)}
SHAPES = {
    "rows": Conv(n=2, h=3, w=24, ci=32, co=32, **SQUARE),
    "over": Conv(n=3, h=6, w=6, ci=48, co=64, **SQUARE),
    "odd": Conv(n=9, h=5, w=7, ci=16, co=48, kh=3, kw=2, padding=(1, 0, 0, 1)),
    "valid": Conv(n=2, h=4, w=9, ci=80, co=16, kh=2, kw=4),
    "large": Conv(n=1, h=9, w=20, ci=64, co=16, kh=5, kw=5, padding=(2, 2, 2, 2)),
    "list": Conv(n=10, h=6, w=1, ci=32, co=48, kh=1, kw=1),
    "runs": Conv(n=1, h=18, w=97, ci=16, co=16, kh=1, kw=3, padding=(0, 2, 0, 0)),
    "rest": Conv(n=2, h=49, w=33, ci=16, co=16, kh=1, kw=1),
    "beyond": Conv(n=2, h=1, w=2, ci=16, co=32, kh=3, kw=4, padding=(2, 3, 1, 2)),
}
every_shape = pytest.mark.parametrize("conv", SHAPES.values(), ids=SHAPES)
TEMPLATES = {"bf16": amx_conv.BF16, "bf16x3": amx_conv.BF16X3}
templates = pytest.mark.parametrize("templates", TEMPLATES.values(), ids=TEMPLATES)
# sub rsp, imm32
FRAME = re.compile(rb"\x48\x81\xec(.{4})", re.DOTALL)
tiles = pytest.mark.skipif(
    bool(CPU.missing(machine_features())),
    reason=f"this machine lacks {' '.join(CPU.missing(machine_features()))}",
)


@pytest.fixture
def cpu():
    return CPU


def kernels(templates, conv):
    return {
        "forward": templates.forward(CPU, conv, bias=True),
        "finished": templates.forward(CPU, conv, bias=False, finish=test_amx.scaled),
        "backward_data": templates.backward_data(CPU, conv),
        "stored_gradient": templates.stored_gradient(CPU, conv),
        "squared_norm": templates.squared_norm(CPU, conv),
        "weighted_gradient": templates.weighted_gradient(CPU, conv),
        "batch_gradient": templates.batch_gradient(CPU, conv),
    }


@templates
@pytest.mark.parametrize("name", ["odd", "list"])
def test_kernels_compile_for_the_runtime(templates, name):
    found = kernels(templates, SHAPES[name])
    for kernel in found.values():
        bounds.prove(kernel)
    assert_runtime_suffices(found, CPU)
    assert workspace_bytes(found, CPU) == 0
    for label, kernel in found.items():
        code = kernel_object.build({label: kernel}, CPU)
        assert test_amx.TDPBF16PS.search(code), label
        # What leaves tiles goes by the stack: a thread's is 256 KiB.
        assert max(int.from_bytes(size, "little") for size in FRAME.findall(code)) <= 64 << 10


@templates
@pytest.mark.parametrize("name", ["over", "large", "rest"])
def test_llvm_can_replace_every_cast(templates, name):
    test_amx.assert_casts(kernels(templates, SHAPES[name]))


@templates
@every_shape
def test_what_is_counted_is_kept(templates, conv):
    for name, kernel in kernels(templates, conv).items():
        sizes = argument_bytes(kernel)
        scratch = {
            p.name: size
            for p, size in zip(kernel.params, sizes, strict=True)
            if p.name in ("packed", "weights", "inputs", "adjoints", "totals")
        }
        kind = "forward" if name == "finished" else name
        assert templates.count(conv, kind).scratch == sum(scratch.values())


def operands(templates, *arrays):
    """What products are made of, in float64, and the largest relative error of one."""
    if templates is amx_conv.BF16:
        return [test_mixed.rounded(a) for a in arrays], 0.0
    return [a.astype("d") for a in arrays], split.ERROR


def assert_near(value, expected, scale, error):
    """`scale` is that of absolute values; sums are in float32."""
    assert np.all(
        np.abs(value.reshape(expected.shape) - expected) <= (3e-6 + error) * scale + 1e-30
    )


def check(templates, conv, call):
    xp, w, b, d = direct.arrays(conv)
    (x_, w_, d_), error = operands(templates, xp, w, d)
    sizes = [np.abs(a) for a in (x_, w_, d_)]
    y, dx = direct.output_and_input_gradient(conv, x_, w_, d_)
    y_scale, dx_scale = direct.output_and_input_gradient(conv, *sizes)
    for bias in (True, False):
        kernel = templates.forward(CPU, conv, bias=bias)
        (value,) = direct.results(call, kernel, xp, w, *[b] * bias)
        assert_near(value, y + b * bias, y_scale + np.abs(b), error)
    (value,) = direct.results(call, templates.backward_data(CPU, conv), d, w)
    assert_near(value, dx, dx_scale, error)
    g, s = direct.results(call, templates.stored_gradient(CPU, conv), xp, d, count=2)
    scale = direct.gradients(conv, sizes[0], sizes[2])
    assert_near(g, direct.gradients(conv, x_, d_), scale, error)
    assert_stored_norms(conv, g, s)
    # What is found again is what its norm was taken of, bit by bit.
    (norms,) = direct.results(call, templates.squared_norm(CPU, conv), xp, d)
    assert norms.tobytes() == s.tobytes()
    weighted = templates.weighted_gradient(CPU, conv)
    for i in {0, conv.n // 2, conv.n - 1}:
        one = np.zeros(conv.n, "f")
        one[i] = 0.75
        (value,) = direct.results(call, weighted, xp, d, one)
        assert value.tobytes() == (np.float32(0.75) * g[i]).tobytes()
    c = np.abs(np.random.default_rng(3).standard_normal(conv.n)).astype("f")
    for kernel, factors, more in (
        (weighted, c, [c]),
        (templates.batch_gradient(CPU, conv), np.ones(conv.n, "f"), []),
    ):
        (value,) = direct.results(call, kernel, xp, d, *more)
        terms = factors[:, None].astype("d") * g
        assert_near(value, terms.sum(0), np.abs(terms).sum(0), 0.0)


@tiles
@templates
@every_shape
def test_products_are_those_of_what_operands_are_split_into(templates, conv, call):
    check(templates, conv, call)


@tiles
@templates
@pytest.mark.parametrize(
    ("conv", "cache", "dealt"),
    [
        (Conv(n=27, h=5, w=6, ci=16, co=32, **SQUARE), 2, (8, 2)),
        (Conv(n=30, h=3, w=4, ci=192, co=80, **SQUARE), 3, (4, 3)),
    ],
    ids=["runs", "large"],
)
def test_sums_of_several_runs_and_shares(templates, conv, cache, dealt, call, monkeypatch):
    """Of runs with a rest, and of examples that are left over."""
    one = amx_conv._Gradient(split=templates.split, conv=conv, chunks=1)
    monkeypatch.setattr(amx_conv, "_CACHE", cache * one.bytes)
    gradient = amx_conv._Gradient.summed(templates.split, conv)
    assert (gradient.chunks, gradient.together) == dealt
    assert conv.n // dealt[0] % dealt[1]
    assert conv.n % dealt[0]
    check(templates, conv, call)


@pytest.mark.parametrize("n", [1, 7, 64, 1000, 65_536])
def test_chains_of_additions_over_examples_are_bounded(n):
    """Rounding of c · g, sums of a share with one example more than others, sums of shares."""
    for conv in (
        Conv(n=n, h=8, w=8, ci=256, co=256, **SQUARE),
        Conv(n=n, h=4, w=4, ci=16, co=16, **SQUARE),
    ):
        for some in TEMPLATES.values():
            chunks = amx_conv._Gradient.summed(some.split, conv).chunks
            longest = 1 + -(-n // chunks) + chunks - 1
            assert longest <= some.weighted_gradient_additions(conv) <= 20 + n // 4


@st.composite
def convs(draw):
    kh, kw = draw(st.tuples(*[st.integers(1, 4)] * 2))
    top, left, bottom, right = (draw(st.integers(0, k - 1)) for k in (kh, kw, kh, kw))
    return Conv(
        n=draw(st.integers(1, 11)),
        h=draw(st.integers(max(1, kh - top - bottom), 9)),
        w=draw(st.integers(max(1, kw - left - right), 40)),
        ci=16 * draw(st.integers(1, 4)),
        co=16 * draw(st.integers(1, 4)),
        kh=kh,
        kw=kw,
        padding=(top, left, bottom, right),
    )


@pytest.mark.slow
@tiles
@given(conv=convs(), templates=st.sampled_from(list(TEMPLATES.values())))
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_shape(call, conv, templates):
    check(templates, conv, call)


@tiles
@templates
def test_products_finish_their_results(templates, call):
    for name in ("rows", "over"):
        test_epilogue.check_conv(call, CPU, templates, SHAPES[name])


@tiles
@templates
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_stays_with_its_example(templates, poison, call):
    """In a chunk that has had clean examples, and has some after it."""
    conv = Conv(n=25, h=5, w=6, ci=16, co=32, **SQUARE)
    xp, w, b, d = direct.arrays(conv)
    found = kernels(templates, conv)

    def everything():
        return [
            *direct.results(call, found["forward"], xp, w, b),
            *direct.results(call, found["backward_data"], d, w),
            *direct.results(call, found["stored_gradient"], xp, d, count=2),
            *direct.results(call, found["squared_norm"], xp, d),
        ]

    c = np.ones(conv.n, "f")
    c[4] = 0
    clean = everything()
    (total,) = direct.results(call, found["weighted_gradient"], xp, d, c)
    xp[4, 3, 4, 0] = d[4, 2, 2, 3] = poison
    for before, after in zip(clean, everything(), strict=True):
        assert not np.isfinite(after[4]).all()
        assert np.delete(before, 4, 0).tobytes() == np.delete(after, 4, 0).tobytes()
    (without,) = direct.results(call, found["weighted_gradient"], xp, d, c)
    assert without.tobytes() == total.tobytes()


@tiles
@templates
def test_bits_do_not_depend_on_threads(templates, call):
    conv = Conv(n=19, h=5, w=6, ci=16, co=32, **SQUARE)
    xp, w, b, d = direct.arrays(conv)
    found = kernels(templates, conv)
    c = np.linspace(0, 1, conv.n, dtype="f")

    def everything():
        return [
            *direct.results(call, found["forward"], xp, w, b),
            *direct.results(call, found["backward_data"], d, w),
            *direct.results(call, found["stored_gradient"], xp, d, count=2),
            *direct.results(call, found["weighted_gradient"], xp, d, c),
        ]

    assert_same_bits_on_one_thread(everything)


def test_other_convolutions_are_left_to_others():
    able = SHAPES["over"]
    for change in (
        {"stride": (1, 2)},
        {"ci": 40},
        {"co": 8},
        {"padding": (3, 1, 1, 1)},
        {"w": 60, "kw": 49},
    ):
        assert not amx_conv.BF16.can(Conv(**{**vars(able), **change}), "forward")
    assert amx_conv.BF16.can(able, "stored_gradient")
    assert not amx_conv.BF16.can(able, "weighted_gradient")
