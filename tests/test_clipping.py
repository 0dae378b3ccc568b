"""How norms are taken: the choice, the bounds, and that what is chosen does not change the sum."""

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from myelin import clipping, cost, graph, nn, planner, training
from myelin.cpu import Cpu
from myelin.graph import Objective
from myelin.importers import load
from myelin.kernels import conv as direct
from myelin.kernels import winograd
from myelin.kernels.window import Conv
from myelin.optimizer import SGD
from myelin.plan import Outside, compile_training
from myelin.planner import Gradient


def objective(model, **options):
    return Objective(names=tuple(model.shapes), loss="cross-entropy", **options)


def methods(model, batch, **options):
    return [how for _, how in clipping.methods(model.relax(batch), objective(model, **options))]


def test_a_linear_layer_on_rows_needs_no_gradient_for_its_norm():
    assert methods(load(nn.Linear(3, 2), (3,)), 4) == ["product"]


def test_scales_and_small_convolutions_are_stored():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten())
    assert methods(load(net, (1, 20, 20)), 4) == ["stored", "stored"]


def test_what_exceeds_the_memory_budget_is_taken_from_gram_matrices():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())
    stored_bytes = 4 * 4 * 36
    model = load(net, (1, 20, 20))
    assert methods(model, 4, stored_bytes=stored_bytes) == ["stored"]
    assert methods(model, 4, stored_bytes=stored_bytes - 1) == ["gram"]


def test_large_layers_on_small_images_are_taken_from_gram_matrices():
    net = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.Flatten())
    assert methods(load(net, (64, 2, 2)), 8) == ["gram"]


def test_the_choice_does_not_change_the_sum(monkeypatch):
    net = nn.Sequential(
        *(nn.Conv2d(2, 5, 3, 2, 1), nn.Tanh(), nn.Conv2d(5, 4, 2), nn.Tanh(), nn.Flatten()),
        nn.Linear(36, 3),
    )
    model, cpu = load(net, (2, 8, 8), seed=1), Cpu.native()
    generator = np.random.default_rng(0)
    x = generator.standard_normal((6, 2, 8, 8)).astype(np.float32)
    y = generator.integers(0, 3, 6).astype(np.int32)
    sums = {}
    for how in ("stored", "gram"):
        monkeypatch.setattr(
            planner, "store", lambda found, *_, how=how: set(found) if how == "stored" else set()
        )
        program = compile_training(
            model, loss="cross-entropy", optimizer=SGD(lr=1.0), batch=6, cpu=cpu
        )
        assert [norm for _, norm in program.clipping] == [how, how, "product"]
        mask = np.array([1, 1, 1, 0, 1, 1], np.float32)
        sums[how] = Outside(program, cpu).gradient(x, y, mask, model.parameters, 0.2)
    largest = np.abs(sums["stored"]).max()
    np.testing.assert_allclose(sums["gram"], sums["stored"], atol=1e-4 * largest)


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_a_gram_norm_is_bounded_for_the_kernel_that_sums(monkeypatch, algorithm):
    """Kernels and bound of a layer follow whatever is chosen, so they cannot disagree."""
    monkeypatch.setattr(planner, "algorithm", lambda *_: algorithm)
    net = nn.Sequential(nn.Conv2d(4, 5, 3, 1, 1, bias=False), nn.Flatten())
    model, cpu = load(net, (4, 8, 8)), Cpu.native()
    wanted = objective(model, stored_bytes=0, level=cpu.level)
    module = training.training_graph(model.relax(3), wanted)
    attributes = {
        str(b.value.args[0].global_symbol): [int(n) for n in b.value.args[1].fields[-1].values]
        for b in graph.bindings(module["main"])
        if graph.operator(b.value) == "relax.call_dps_packed"
    }
    norm, total = attributes["myelin.conv-gram"], attributes["myelin.conv-gradient"]
    assert norm == total
    gradient = clipping.from_attributes(norm)
    assert gradient.algorithm == algorithm
    conv = Conv(n=3, h=8, w=8, ci=4, co=5, kh=3, kw=3, padding=(1, 1, 1, 1))
    templates = {"direct": direct, "winograd": winograd}[algorithm]
    kappa = direct.gram_kappa(conv, templates.gradient_error(conv))
    assert clipping.real(attributes["myelin.clip-factors"][-1]) == pytest.approx(kappa, rel=1e-9)
    program = compile_training(
        model, loss="cross-entropy", optimizer=SGD(lr=1.0), batch=3, cpu=cpu, stored_bytes=0
    )
    for label, kernel in {
        "conv_gram": direct.gram_norm(cpu, conv, templates.gradient_error(conv)),
        "conv_gradient": templates.weighted_gradient(cpu, conv),
    }.items():
        (name,) = (name for name in program.kernels if name.endswith(label))
        expected = kernel.with_attr("global_symbol", name)
        tvm.ir.assert_structural_equal(program.kernels[name], expected)
    (rows,) = (d for d in program.decisions if d.kernel.endswith("conv_gradient"))
    assert rows.algorithm == algorithm


def test_many_layers_add_their_norms_in_several_kernels():
    """A kernel has at most 14 arguments; a deep net has more norms than that."""
    layers = [layer for _ in range(14) for layer in (nn.Linear(3, 3), nn.LayerNorm(3))]
    model, cpu = load(nn.Sequential(*layers), (3,), seed=0), Cpu.native()
    module = training.training_graph(model.relax(2), objective(model))
    calls = [
        b.value.args
        for b in graph.bindings(module["main"])
        if graph.operator(b.value) == "relax.call_dps_packed"
    ]
    names = [str(arguments[0].global_symbol) for arguments in calls]
    assert names.count("myelin.norm-sum") == 4
    assert names.count("myelin.clip-factors") == 1
    program = compile_training(model, loss="cross-entropy", optimizer=SGD(lr=1.0), batch=2, cpu=cpu)
    outside = Outside(program, cpu)
    x, y = np.array([[1, 2, 3], [3, -1, 0]], np.float32), np.array([0, 1], np.int32)
    for bound in (0.5, 1e6):
        own = outside.gradient(x, y, np.array([1, 0], np.float32), model.parameters, bound)
        norm = np.sqrt((own.astype(float) ** 2).sum())
        assert norm <= bound
        if bound == 0.5:
            assert norm >= 0.5 * (1 - 1e-4)


def test_additions_bound_the_roundings_over_a_batch():
    linear = load(nn.Linear(3, 2), (3,))
    stored = load(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), (1, 9, 9))
    assert clipping.additions(stored.relax(64), objective(stored)) == 2
    few, many = (clipping.additions(linear.relax(n), objective(linear)) for n in (8, 512))
    assert 8 <= few < many <= 512


@pytest.mark.parametrize("algorithm", ["direct", "winograd"])
def test_additions_are_those_of_the_kernel_that_sums(monkeypatch, algorithm):
    monkeypatch.setattr(planner, "algorithm", lambda *_: algorithm)
    net = nn.Sequential(nn.Conv2d(256, 256, 3, 1, 1, bias=False), nn.Flatten())
    model = load(net, (256, 8, 8))
    found = clipping.additions(model.relax(64), objective(model, stored_bytes=0))
    conv = Conv(n=64, h=8, w=8, ci=256, co=256, kh=3, kw=3, padding=(1, 1, 1, 1))
    assert direct.weighted_gradient_additions(conv) != winograd.weighted_gradient_additions(conv)
    templates = {"direct": direct, "winograd": winograd}[algorithm]
    assert found == templates.weighted_gradient_additions(conv)


def test_additions_are_those_of_gradients_that_are_found_again(monkeypatch):
    monkeypatch.setattr(planner, "unstored", lambda *_: "recomputed")
    model = load(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten()), (16, 8, 8))
    asked = objective(model, stored_bytes=0, level="sapphirerapids", precision="bf16")
    conv = Conv(n=64, h=8, w=8, ci=16, co=16, kh=3, kw=3)
    expected = planner.CONV["tiles bf16"].weighted_gradient_additions(conv)
    assert clipping.additions(model.relax(64), asked) == expected > 2


@pytest.mark.parametrize("level", cost.RATES)
def test_gradients_of_a_batch_need_no_bound(level):
    """Training without privacy may use kernels of which none is known."""
    model = load(nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.Flatten()), (64, 32, 32))
    precision = "bf16" if "bf16" in Cpu.named(level).precisions else "float32"
    asked = objective(model, level=level, precision=precision, clipping="none")
    assert clipping.additions(model.relax(8), asked) == 2


@given(st.floats(1e-12, 1.0))
def test_bounds_written_as_integers_are_never_smaller(value):
    written = clipping.real(clipping.fixed(value))
    assert value <= written <= value + 2**-52


def test_a_gradient_survives_as_attributes():
    conv = Conv(n=2, h=5, w=6, ci=3, co=4, kh=2, kw=3, stride=(2, 1), padding=(1, 0, 2, 1))
    for algorithm in planner.CONV:
        gradient = Gradient(conv=conv, algorithm=algorithm)
        assert clipping.from_attributes(clipping.attributes(gradient)) == gradient


@pytest.mark.parametrize("shape", [(5, 6), (2, 3)])
def test_a_linear_layer_on_lists_of_rows_is_a_convolution(shape):
    model = load(nn.Sequential(nn.Linear(shape[1], 4), nn.Flatten()), shape)
    (layer,) = graph.layers(model.relax(7)["main"], objective(model))
    rows, size = shape
    assert clipping.convolution(layer) == Conv(n=7, h=rows, w=1, ci=size, co=4, kh=1, kw=1)
