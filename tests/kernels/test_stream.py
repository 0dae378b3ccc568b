"""Numbers stored past the caches are those that would be stored otherwise."""

import subprocess

import pytest
import test_conv as direct
from templates import assert_same_bits_on_one_thread

from myelin.cpu import Cpu, machine_features
from myelin.kernels import amx_conv, bounds, conv, mixed_conv, stream, winograd
from myelin.kernels import object as kernel_object
from myelin.kernels.window import Conv

SHAPE = Conv(n=5, h=6, w=7, ci=16, co=48, kh=3, kw=3, padding=(1, 1, 1, 1))
LEVELS = {
    conv.stored_gradient: "x86-64-v4",
    winograd.stored_gradient: "x86-64-v4",
    mixed_conv.stored_gradient: "znver4",
    mixed_conv.Winograd.stored_gradient: "znver4",
    amx_conv.BF16.stored_gradient: "sapphirerapids",
}


@pytest.fixture(params=list(LEVELS), ids=["direct", "winograd", "bf16", "winograd-bf16", "tiles"])
def template(request):
    return request.param


@pytest.fixture
def cpu(template):
    return Cpu.named(LEVELS[template])


def test_the_numbers_are_the_same(template, cpu, call, monkeypatch):
    if missing := cpu.missing(machine_features()):
        pytest.skip(f"this machine lacks {' '.join(missing)}")
    xp, _, _, d = direct.arrays(SHAPE)
    kept = template(cpu, SHAPE)
    assert stream.LINE not in kept.script()
    expected = direct.results(call, kept, xp, d, count=2)
    monkeypatch.setattr(stream, "LARGE", 4 * SHAPE.n * SHAPE.weights - 1)
    streamed = template(cpu, SHAPE)
    assert stream.LINE in streamed.script()
    found = direct.results(call, streamed, xp, d, count=2)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in expected]
    assert_same_bits_on_one_thread(lambda: direct.results(call, streamed, xp, d, count=2))


def test_the_compiler_stores_past_the_caches(template, cpu, tmp_path, monkeypatch):
    """On any machine, as nothing runs; and the end of it is told to other cores."""
    monkeypatch.setattr(stream, "LARGE", 0)
    code = kernel_object.build({"kernel": template(cpu, SHAPE)}, cpu)
    (tmp_path / "kernel.o").write_bytes(code)
    shown = subprocess.run(
        ["objdump", "-d", tmp_path / "kernel.o"], check=True, capture_output=True, text=True
    ).stdout
    assert "vmovntps" in shown
    assert "sfence" in shown


@pytest.mark.parametrize(("co", "level"), [(24, "x86-64-v4"), (33, "x86-64-v4"), (48, "x86-64-v3")])
def test_rows_that_are_not_of_lines_are_stored_as_ever(co, level, monkeypatch):
    monkeypatch.setattr(stream, "LARGE", 0)
    shape = Conv(n=2, h=6, w=6, ci=16, co=co, kh=3, kw=3, padding=(1, 1, 1, 1))
    for template in (conv.stored_gradient, winograd.stored_gradient):
        assert stream.LINE not in template(Cpu.named(level), shape).script()


SHAPES = {
    "strided": Conv(n=3, h=9, w=9, ci=16, co=32, kh=3, kw=3, stride=(2, 2), padding=(1, 1, 1, 1)),
    "rows": Conv(n=3, h=5, w=1, ci=24, co=16, kh=1, kw=1),
    "oblong": Conv(n=3, h=7, w=6, ci=3, co=64, kh=5, kw=2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize(
    ("template", "level"),
    [(conv.stored_gradient, "x86-64-v4"), (mixed_conv.stored_gradient, "znver4")],
)
def test_any_shape_is_shown_to_store_whole_lines(shape, template, level, monkeypatch):
    monkeypatch.setattr(stream, "LARGE", 0)
    kernel = template(Cpu.named(level), shape)
    assert stream.LINE in kernel.script()
    bounds.prove(kernel)


def test_large_gradients_of_a_real_layer_are_streamed():
    layer = Conv(n=64, h=16, w=16, ci=64, co=128, kh=3, kw=3, padding=(1, 1, 1, 1))
    assert stream.LINE in winograd.stored_gradient(Cpu.named("x86-64-v4"), layer).script()
