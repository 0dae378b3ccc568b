"""Whole programs, run outside any enclave, against PyTorch on micro-batches of one."""

import math
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import memory
from myelin import nn, planner
from myelin.cpu import Cpu
from myelin.errors import DataRefused, ModelRefused
from myelin.importers import load
from myelin.kernels import amx
from myelin.kernels import object as kernel_object
from myelin.lowering import Buffer, Lowering, allocate
from myelin.optimizer import SGD, Adam
from myelin.plan import Outside, compile_training
from myelin.weights import pack, unpack

torch = pytest.importorskip("torch")
T = torch.nn

TOLERANCE = 1e-4
LOSSES = {
    "cross-entropy": lambda z, y: T.functional.cross_entropy(z, y.long()),
    "binary-cross-entropy": lambda z, y: T.functional.binary_cross_entropy_with_logits(
        z, y, reduction="sum"
    ),
    "mean-squared-error": T.functional.mse_loss,
}


class Residual(T.Module):
    def __init__(self, *body, shortcut=None):
        super().__init__()
        for i, layer in enumerate(body):
            self.add_module(str(i), layer)
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        y = x
        for layer in self.body:
            y = layer(y)
        return y + (x if self.shortcut is None else self.shortcut(x))


class Concat(T.Module):
    def __init__(self, *branches):
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(str(i), branch)
        self.branches = branches

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def compiled(net, shape, loss="cross-entropy", *, batch=4, seed=0, **options):
    """What the tests need of a model: its program, a runner, data, and the model itself."""
    model, cpu = load(net, shape, seed=seed), Cpu.native()
    program = compile_training(
        model, loss=loss, optimizer=SGD(lr=0.1), batch=batch, cpu=cpu, **options
    )
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((batch, *shape)).astype(np.float32)
    if loss == "cross-entropy":
        y = generator.integers(0, model.outputs, batch).astype(np.int32)
    else:
        y = generator.integers(0, 2, (batch, model.outputs)).astype(np.float32)
    return SimpleNamespace(
        model=model,
        program=program,
        outside=Outside(program, cpu),
        x=x,
        y=y,
        loss=loss,
        cpu=cpu,
        options=options,
    )


def gradient(run, mask=None, bound=1.0, x=None):
    mask = np.ones(len(run.x), np.float32) if mask is None else np.asarray(mask, np.float32)
    x = run.x if x is None else x
    return unpack(run.program, run.outside.gradient(x, run.y, mask, run.model.parameters, bound))


def oracle(net, run, mask=None, bound=1.0):
    """Clipped sums by micro-batches of one, clipped and added in float64."""
    net.load_state_dict({n: torch.tensor(v) for n, v in run.model.parameters.items()})
    sums = {n: np.zeros(p.shape) for n, p in net.named_parameters()}
    for i in range(len(run.x)):
        if mask is not None and not mask[i]:
            continue
        net.zero_grad()
        LOSSES[run.loss](
            net(torch.tensor(run.x[i : i + 1])), torch.tensor(run.y[i : i + 1])
        ).backward()
        own = {n: p.grad.double().numpy() for n, p in net.named_parameters()}
        norm = np.sqrt(sum((g**2).sum() for g in own.values()))
        factor = 1.0 if bound is None else min(1.0, bound / max(norm, 1e-30))
        for name, g in own.items():
            sums[name] += factor * g
    return sums


def close(found, expected, tolerance=TOLERANCE):
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-12)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


CNN = (
    nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    ),
    lambda: T.Sequential(
        *(T.Conv2d(1, 16, 8, 2, 2), T.Tanh(), T.MaxPool2d(2, 1)),
        *(T.Conv2d(16, 32, 4, 2), T.Tanh(), T.MaxPool2d(2, 1)),
        *(T.Flatten(), T.Linear(512, 32), T.Tanh(), T.Linear(32, 10)),
    ),
    (1, 28, 28),
)
RESIDUAL = (
    nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.Residual(nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1)),
        nn.Residual(
            nn.Conv2d(8, 12, 3, 2, 1), nn.SiLU(), shortcut=nn.Conv2d(8, 12, 1, 2, bias=False)
        ),
        nn.Concat(nn.Conv2d(12, 5, 1), nn.AvgPool2d(3, 1, 1)),
        *(nn.GlobalAvgPool2d(), nn.Flatten(), nn.Linear(17, 4)),
    ),
    lambda: T.Sequential(
        T.Conv2d(3, 8, 3, 1, 1),
        Residual(T.GroupNorm(4, 8), T.ReLU(), T.Conv2d(8, 8, 3, 1, 1)),
        Residual(T.Conv2d(8, 12, 3, 2, 1), T.SiLU(), shortcut=T.Conv2d(8, 12, 1, 2, bias=False)),
        Concat(T.Conv2d(12, 5, 1), T.AvgPool2d(3, 1, 1)),
        *(T.AdaptiveAvgPool2d(1), T.Flatten(), T.Linear(17, 4)),
    ),
    (3, 9, 9),
)
ROWS = (
    nn.Sequential(
        *(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6, bias=False)),
        *(nn.Softmax(), nn.LayerNorm((5, 6)), nn.Flatten(), nn.Linear(30, 3), nn.Sigmoid()),
    ),
    lambda: T.Sequential(
        *(T.Linear(6, 8), T.LayerNorm(8), T.GELU(), T.Linear(8, 6, bias=False)),
        *(T.Softmax(-1), T.LayerNorm((5, 6)), T.Flatten(), T.Linear(30, 3), T.Sigmoid()),
    ),
    (5, 6),
)
IMAGE_NORM = (
    nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.LayerNorm((4, 4, 6)), nn.GELU("tanh"), nn.Flatten()),
        *(nn.Reshape((4, 4, 6)), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(30, 2)),
    ),
    lambda: T.Sequential(
        *(T.Conv2d(3, 4, 3), T.LayerNorm((4, 4, 6)), T.GELU("tanh"), T.Flatten()),
        *(T.Unflatten(1, (4, 4, 6)), T.Conv2d(4, 2, 2), T.Flatten(), T.Linear(30, 2)),
    ),
    (3, 6, 8),
)
NETS = {
    "logistic": (nn.Linear(30, 1), lambda: T.Linear(30, 1), (30,)),
    "cnn": CNN,
    "residual": RESIDUAL,
    "rows": ROWS,
    "image-norm": IMAGE_NORM,
}


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("logistic", "binary-cross-entropy"),
        ("cnn", "cross-entropy"),
        ("residual", "cross-entropy"),
        ("rows", "binary-cross-entropy"),
        ("image-norm", "mean-squared-error"),
    ],
)
def test_programs_sum_clipped_gradients_and_predict(name, loss):
    net, theirs, shape = NETS[name]
    run, reference = compiled(net, shape, loss, batch=5, seed=2), theirs()
    mask = [1, 0, 1, 1, 1]
    for bound in (0.05, 1e3):  # everything clipped, nothing clipped
        close(gradient(run, mask, bound), oracle(reference, run, mask, bound))
    with torch.no_grad():
        expected = reference(torch.tensor(run.x)).numpy()
    predicted = run.outside.predict(run.x, run.model.parameters)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-6)


def kernels_of(run):
    return [call.kernel.partition("_")[2] for call in run.program.gradient]


def test_a_product_computes_the_one_elementwise_operator_that_reads_it(monkeypatch):
    net = nn.Sequential(
        *(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()),
        *(nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(16 * 49, 6), nn.Tanh(), nn.Linear(6, 3)),
    )
    run = compiled(net, (2, 8, 8))
    found = kernels_of(run)
    assert "pool_backward_multiply" in found
    for name in ("conv_relu", "conv_tanh", "linear_tanh", "conv_backward_where"):
        assert name in found
    assert "linear_backward_multiply" in found
    assert not {"relu", "tanh", "where"} & set(found)
    monkeypatch.setattr(Lowering, "_epilogue_of", lambda _self, _lazy: None)
    apart = compiled(net, (2, 8, 8))
    assert {"relu", "tanh", "where", "multiply"} <= set(kernels_of(apart))
    own, other = gradient(run), gradient(apart)
    assert all(np.array_equal(own[name], other[name]) for name in own)


def test_a_padded_copy_is_made_only_for_kernels_that_read_one():
    def net(lib):
        layers = (lib.Conv2d(2, 16, 3, padding=1), lib.ReLU(), lib.Conv2d(16, 16, 3, padding=1))
        return lib.Sequential(*layers, lib.Flatten(), lib.Linear(16 * 144, 3))

    run = compiled(net(nn), (2, 12, 12))
    assert [d.layer for d in run.program.decisions if "pad" in d.kernel] == ["0"]
    how = {d.kernel.partition("_")[2]: d.algorithm for d in run.program.decisions}
    assert (how["conv_relu"], how["conv"]) == ("direct", "winograd")
    close(gradient(run, bound=0.1), oracle(net(T), run, bound=0.1))


def test_a_product_that_is_read_twice_is_written_plainly():
    # SiLU's derivative reads the product again.
    run = compiled(nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 2)), (5,))
    assert kernels_of(run)[:2] == ["linear", "silu"]


def test_a_sum_of_two_products_is_the_epilogue_of_one():
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1))
    ours = nn.Residual(layers[0], shortcut=layers[1])
    theirs = Residual(T.Conv2d(3, 4, 3, padding=1), shortcut=T.Conv2d(3, 4, 1))
    run = compiled(nn.Sequential(ours, nn.Flatten(), nn.Linear(100, 3)), (3, 5, 5))
    assert sorted(kernels_of(run)).count("conv_add") == 1
    reference = T.Sequential(theirs, T.Flatten(), T.Linear(100, 3))
    close(gradient(run, bound=0.1), oracle(reference, run, bound=0.1))


def test_without_clipping_the_unmasked_gradients_are_summed():
    net, theirs, shape = RESIDUAL
    run = compiled(net, shape, private=False)
    assert {norm for _, norm in run.program.clipping} == {"none"}
    close(gradient(run, [1, 1, 0, 1]), oracle(theirs(), run, [1, 1, 0, 1], None))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    bias=st.booleans(),
    batch=st.integers(1, 9),
    activation=st.sampled_from(["Tanh", "Sigmoid", "SiLU", "GELU"]),
    seed=st.integers(0, 99),
)
def test_linear_layers_of_any_shape(sizes, bias, batch, activation, seed):
    ours, theirs = [], []
    for a, b in pairwise(sizes):
        ours += [nn.Linear(a, b, bias=bias), getattr(nn, activation)()]
        theirs += [T.Linear(a, b, bias=bias), getattr(T, activation)()]
    run = compiled(nn.Sequential(*ours), (sizes[0],), "mean-squared-error", batch=batch, seed=seed)
    close(gradient(run, bound=0.1), oracle(T.Sequential(*theirs), run, bound=0.1))


@pytest.mark.parametrize("branches", [3, 9, 14])
def test_a_sum_of_many_convolutions_fits_the_kernels_that_add_it(branches):
    def network(lib, residual):
        layer = lib.Conv2d(2, 3, 3, 1, 1)
        for _ in range(branches - 1):
            layer = residual(lib.Conv2d(2, 3, 3, 1, 1), shortcut=layer)
        return lib.Sequential(layer, lib.Tanh(), lib.Flatten(), lib.Linear(48, 3))

    run = compiled(network(nn, nn.Residual), (2, 4, 4))
    assert max(len(f.params) for f in run.program.kernels.values()) <= kernel_object.MAX_ARGUMENTS
    close(gradient(run, bound=0.5), oracle(network(T, Residual), run, bound=0.5))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    channels=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolutions_of_any_shape(channels, size, kernel, stride, padding, bias, seed):
    a, b, c = channels
    ours = [nn.Conv2d(a, b, kernel, stride, padding, bias=bias), nn.Tanh(), nn.Conv2d(b, c, 1)]
    theirs = [T.Conv2d(a, b, kernel, stride, padding, bias=bias), T.Tanh(), T.Conv2d(b, c, 1)]
    run = compiled(
        nn.Sequential(*ours, nn.Flatten()), (a, *size), "mean-squared-error", batch=3, seed=seed
    )
    close(gradient(run, bound=0.1), oracle(T.Sequential(*theirs, T.Flatten()), run, bound=0.1))


BF16 = pytest.param(
    "bf16",
    marks=pytest.mark.skipif(
        "bf16" not in Cpu.native().precisions, reason="this machine has no AVX-512 BF16"
    ),
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param({}, id="stored"),
        pytest.param({"stored_bytes": 0}, id="gram"),
        *(pytest.param({"precision": p}, id=p, marks=BF16.marks) for p in ("bf16", "bf16x3")),
    ],
)
def mixed(request):
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 3)),
    )
    run = compiled(net, (2, 8, 8), batch=4, **request.param)
    assert ("gram" in dict(run.program.clipping).values()) == ("stored_bytes" in request.param)
    return run


def test_an_empty_batch_sums_to_exactly_zero(mixed):
    for value in gradient(mixed, np.zeros(4), x=np.zeros_like(mixed.x)).values():
        assert not value.any()


def test_a_masked_example_changes_nothing_not_one_bit(mixed):
    mask = [1, 0, 1, 1]
    expected = gradient(mixed, mask)
    for poison in (1e30, np.nan, np.inf):
        x = mixed.x.copy()
        x[1] = poison
        found = gradient(mixed, mask, x=x)
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False], ids=["whole", "one-number"])
def test_an_example_that_is_not_finite_counts_exactly_zero(mixed, poison, everywhere):
    x = mixed.x.copy()
    x[(2,) if everywhere else (2, 1, 4, 4)] = poison
    found, expected = gradient(mixed, x=x), gradient(mixed, [1, 1, 0, 1])
    for name, value in found.items():
        assert np.isfinite(value).all(), name
        assert np.array_equal(value, expected[name]), name


@pytest.mark.parametrize("value", [3e38, -3e38, 1e25, 1e-42])
def test_an_example_of_any_finite_size_stays_within_the_threshold(mixed, value):
    for where in ((2,), (2, 1, 4, 4)):
        x = mixed.x.copy()
        x[where] = value
        own = gradient(mixed, np.eye(4)[2], 0.1, x)
        assert np.sqrt(sum((g.astype(float) ** 2).sum() for g in own.values())) <= 0.1


@pytest.mark.parametrize(
    ("activation", "pixel"), [(nn.Tanh, 1e30), (nn.Tanh, -1e20), (nn.ReLU, np.nan)]
)
def test_a_norm_that_overflows_in_a_gram_matrix_counts_exactly_zero(activation, pixel):
    """Small weights: whatever follows the convolution looks harmless."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, 1, 1), activation(), nn.Flatten(), nn.Linear(256, 3))
    run = compiled(net, (2, 8, 8), batch=2, stored_bytes=0)
    assert dict(run.program.clipping)["0"] == "gram"
    weights = run.model.parameters | {"0.weight": run.model.parameters["0.weight"] * 1e-4}
    x = run.x * 1e3
    x[0, 0, 0, 0] = pixel
    found = run.outside.gradient(x, run.y, np.array([1, 0], np.float32), weights, 0.01)
    assert not found.any()


def test_a_label_outside_the_classes_counts_exactly_zero(mixed):
    expected = gradient(mixed, [1, 1, 1, 0])
    for label in (-1, 3, 2**31 - 1):
        kept, mixed.y[3] = mixed.y[3], label
        try:
            found = gradient(mixed)
        finally:
            mixed.y[3] = kept
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name


def test_no_clipped_gradient_is_longer_than_the_threshold(mixed):
    for i in range(4):
        for bound in (1e-3, 0.1):
            own = gradient(mixed, np.eye(4)[i], bound)
            norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in own.values()))
            assert 0.99 * bound < norm <= bound


def test_results_are_the_same_bits_run_after_run(mixed):
    first, second = gradient(mixed), gradient(mixed)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", [BF16])
def test_a_bf16_gradient_is_that_of_rounded_operands(precision):
    """Two layers written out in float64, operands rounded by PyTorch."""

    def rounded(values):
        return torch.tensor(values).to(torch.bfloat16).double().numpy()

    net = nn.Sequential(nn.Linear(70, 33), nn.Tanh(), nn.Linear(33, 7))
    run = compiled(net, (70,), batch=9, precision=precision)
    w1, b1, w2, b2 = (run.model.parameters[n].astype(float) for n in run.model.parameters)
    if w1.shape != (70, 33):
        w1, w2 = w1.T, w2.T
    rx = rounded(run.x)
    h = np.tanh(rx @ rounded(w1) + b1)
    logits = rounded(h) @ rounded(w2) + b2
    p = np.exp(logits - logits.max(1, keepdims=True))
    d2 = p / p.sum(1, keepdims=True)
    d2[np.arange(9), run.y] -= 1
    d1 = (rounded(d2) @ rounded(w2).T) * (1 - h**2)
    norms = [(d**2).sum(1) * ((rounded(a) ** 2).sum(1) + 1) for a, d in ((rx, d1), (h, d2))]
    for bound in (1e3, 0.1):
        # The squared norm counts (1 + 2⁻⁸)² for rounding c_i · d_i, rounding of float32 aside.
        c = np.minimum(1, bound / np.sqrt(sum(norms) * (1 + 2.0**-8) ** 2))
        e1, e2 = c[:, None] * d1, c[:, None] * d2
        names = list(run.model.parameters)
        sums = (rx.T @ rounded(e1), e1.sum(0), rounded(h).T @ rounded(e2), e2.sum(0))
        found = gradient(run, bound=bound)
        for name, expected in zip(names, sums, strict=True):
            value = found[name] if found[name].shape == expected.shape else found[name].T
            error = np.abs(value - expected).max() / np.abs(expected).max()
            # A value in the middle of two bfloat16 may be rounded to the other: 2⁻⁸ of one term.
            assert error <= 2.0**-9, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [pytest.param("bf16", 0.03, marks=BF16.marks), pytest.param("bf16x3", 1e-4, marks=BF16.marks)],
)
def test_a_bf16_gradient_is_near_the_true_one(precision, tolerance):
    ours, theirs, shape = RESIDUAL
    run = compiled(ours, shape, precision=precision)
    close(gradient(run, bound=0.5), oracle(theirs(), run, bound=0.5), tolerance)


@pytest.mark.parametrize("precision", [BF16])
@pytest.mark.parametrize("seed", range(3))
def test_a_bf16_gradient_is_as_near_as_that_of_pytorch(precision, seed):
    """Where max pooling chooses between near numbers, rounding may move a gradient elsewhere."""
    ours, theirs, shape = CNN
    run = compiled(ours, shape, precision=precision, seed=seed)
    true = oracle(theirs(), run, bound=1e6)
    net = theirs()
    net.load_state_dict({name: torch.tensor(a) for name, a in run.model.parameters.items()})
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(torch.tensor(run.x))
    (LOSSES["cross-entropy"](outputs.float(), torch.tensor(run.y)) * len(run.y)).backward()
    autocast = {name: p.grad.numpy() for name, p in net.named_parameters()}

    def distance(found):
        return math.sqrt(sum(((found[name] - true[name]) ** 2).sum() for name in true))

    assert 0 < distance(gradient(run, bound=1e6)) <= 1.1 * distance(autocast)


WINOGRAD = (
    nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 1, 1), nn.Tanh(), nn.Conv2d(16, 32, 3, 1, 1), nn.Tanh()),
        *(nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, 2, 1), nn.Flatten(), nn.Linear(288, 5)),
    ),
    (1, 12, 12),
)


@pytest.fixture(params=["native", "vectors"])
def arithmetic(request, monkeypatch):
    """Products of bfloat16 as this machine has them, or on vectors although it has tiles."""
    if request.param == "vectors":
        monkeypatch.setattr(amx, "FEATURE", "none")
    planner.algorithm.cache_clear()
    yield request.param
    planner.algorithm.cache_clear()


@pytest.mark.parametrize("precision", [BF16])
@pytest.mark.parametrize(("net", "shape"), [(CNN[0], CNN[2]), WINOGRAD], ids=["cnn", "winograd"])
def test_a_bf16_gradient_is_clipped_as_it_is_summed(net, shape, precision, arithmetic):
    """Convolutions whose operands are rounded: the norm is that of what an example adds."""
    run = compiled(net, shape, batch=3, precision=precision)
    for bound in (1e-3, 0.1):
        for i in range(3):
            own = gradient(run, np.eye(3)[i], bound)
            norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in own.values()))
            assert 0.99 * bound < norm <= bound
    x = run.x.copy()
    x[1] = np.nan
    found, expected = gradient(run, x=x), gradient(run, [1, 0, 1])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("precision", ["bf16", "bf16x3"])
@pytest.mark.skipif(
    "amx_bf16" not in Cpu.native().features, reason="this machine has no AMX tile registers"
)
def test_gradients_that_are_found_twice_are_clipped_as_they_are_summed(precision, monkeypatch):
    monkeypatch.setattr(planner, "unstored", lambda *_: "recomputed")
    net = nn.Sequential(
        *(nn.Conv2d(16, 16, 3, 1, 1), nn.Tanh(), nn.Conv2d(16, 32, 3), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(800, 5)),
    )
    runs = [
        compiled(net, (16, 7, 7), batch=3, precision=precision, stored_bytes=budget)
        for budget in (0, planner.STORED_BYTES)
    ]
    for run, how in zip(runs, ("recomputed", "stored"), strict=True):
        assert [method for _, method in run.program.clipping] == [how, how, "product"]
    for bound in (1e-3, 0.1):
        for i in range(3):
            again, stored = (gradient(run, np.eye(3)[i], bound) for run in runs)
            close(again, stored, 0.01)
            norm = np.sqrt(sum((g.astype(float) ** 2).sum() for g in again.values()))
            assert 0.99 * bound < norm <= bound
    x = runs[0].x.copy()
    x[1] = np.nan
    found, expected = gradient(runs[0], x=x), gradient(runs[0], [1, 0, 1])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_precision_that_a_level_lacks_is_refused():
    model = load(nn.Linear(3, 2), (3,))
    with pytest.raises(ModelRefused, match="precision 'bf16': x86-64-v4 has float32 only"):
        compile_training(
            model,
            loss="cross-entropy",
            optimizer=SGD(lr=0.1),
            batch=4,
            cpu=Cpu.named("x86-64-v4"),
            precision="bf16",
        )


def test_a_step_is_a_gradient_and_an_update():
    ones = np.ones(4, np.float32)
    run, other = (compiled(nn.Linear(3, 2), (3,)) for _ in range(2))
    weights = pack(run.program, run.model.parameters)
    sums = run.outside.gradient(run.x, run.y, ones, weights, 1.0)
    expected = run.outside.update(sums, 1)
    other.outside.gradient(run.x, run.y, ones, weights, 1.0)
    other.outside.step()
    assert np.array_equal(other.outside.buffer("weights"), expected)
    assert not np.array_equal(expected, weights)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_memory_is_shared_only_by_buffers_that_never_live_together(data):
    buffers = [Buffer(bytes=data.draw(st.integers(1, 500))) for _ in range(8)]
    fixed = Buffer(bytes=4, offset=0)
    steps = [
        ("k", (fixed, *data.draw(st.lists(st.sampled_from(buffers), min_size=1, max_size=4))))
        for _ in range(10)
    ]
    end = allocate(steps, 128)
    lives = {}
    for i, (_, named) in enumerate(steps):
        for b in named[1:]:
            first, _ = lives.get(id(b), (i, i))
            lives[id(b)] = (first, i)
    used = [b for b in buffers if id(b) in lives]
    assert fixed.offset == 0
    for b in used:
        assert b.offset % 64 == 0
        assert b.offset >= 128
        assert b.offset + b.bytes <= end
    for a in used:
        for b in used:
            together = lives[id(a)][0] <= lives[id(b)][1] and lives[id(b)][0] <= lives[id(a)][1]
            apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
            assert a is b or not together or apart
            middles = abs((a.offset + a.bytes // 2) - (b.offset + b.bytes // 2))
            assert apart or middles < 64


def test_buffers_take_the_first_place_that_is_free_the_largest_first():
    large, small, other, last = (Buffer(bytes=size) for size in (1000, 100, 200, 64))
    steps = [("k", (large,)), ("k", (small, other)), ("k", (other, last))]
    assert allocate(steps, 64) == 64 + 1024 + 128
    assert (large.offset, other.offset) == (64, 64 + 384)
    assert small.offset == last.offset == 64 + 1024


def test_a_description_names_every_byte(mixed):
    program = mixed.program
    described = program.description()
    assert [k["name"] for k in described["kernels"]] == list(program.kernels)
    for kernel, entry in zip(program.kernels.values(), described["kernels"], strict=True):
        assert entry["args"] == kernel_object.argument_bytes(kernel)
    for phase in ("gradient", "predict", "update"):
        for k, *offsets in described[phase]:
            sizes = described["kernels"][k]["args"]
            assert len(sizes) == len(offsets) <= kernel_object.MAX_ARGUMENTS
            for offset, size in zip(offsets, sizes, strict=True):
                assert offset % 64 == 0
                assert 0 <= offset <= offset + size <= program.arena
    assert described["buffers"]["x"] == [0, 4 * math.prod(mixed.x.shape)]
    ends = sorted((o, o + size) for o, size in program.buffers.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    assert [c["layer"] for c in described["clipping"]] == ["0", "1", "5", "7"]
    assert program.features == 128
    assert program.label_bytes == 4
    flat = pack(described["parameters"], mixed.model.parameters)
    assert flat.nbytes == program.buffers["weights"][1] == program.buffers["gradient"][1]


def test_the_same_model_makes_the_same_program(mixed):
    again = compile_training(
        mixed.model,
        loss="cross-entropy",
        optimizer=SGD(lr=0.1),
        batch=4,
        cpu=mixed.cpu,
        **mixed.options,
    )
    assert again.description() == mixed.program.description()
    assert kernel_object.build(again.kernels, mixed.cpu) == kernel_object.build(
        mixed.program.kernels, mixed.cpu
    )


def test_a_dump_holds_every_pass_and_every_kernel(tmp_path):
    run = compiled(nn.Linear(3, 2), (3,), dump=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.partition("-")[2] for name in names[:9]] == [
        *("import.py", "check-parameters.py", "add-probes.py", "add-seed.py", "differentiate.py"),
        *("keep-adjoints.py", "remove-probes.py", "bind-loss.py", "clip-and-sum.py"),
    ]
    assert len(names) == 10 + len(run.program.kernels)
    assert "linear-gradient" in (tmp_path / names[8]).read_text()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"loss": "hinge"}, "'hinge' is no loss"),
        ({"batch": 0}, "at least 1 example, not 0"),
        ({"batch": 1 << 28}, "use a smaller physical batch"),
    ],
)
def test_programs_that_cannot_be_are_refused(options, reason):
    model = load(nn.Linear(3, 2), (3,))
    asked = {"loss": "cross-entropy", "batch": 4, **options}
    with pytest.raises(ModelRefused, match=reason):
        compile_training(model, optimizer=Adam(), cpu=Cpu.native(), **asked)


def test_cross_entropy_of_one_output_is_refused():
    with pytest.raises(ModelRefused, match="use binary-cross-entropy for one"):
        compile_training(
            load(nn.Linear(3, 1), (3,)),
            loss="cross-entropy",
            optimizer=Adam(),
            batch=2,
            cpu=Cpu.native(),
        )


def test_data_of_another_size_is_refused(mixed):
    with pytest.raises(DataRefused, match="x has 3 numbers, the program takes 512"):
        mixed.outside.predict(np.zeros(3, np.float32), mixed.model.parameters)


def _pyramid(widths, dense, activation, theirs):
    """Pairs of 3 × 3 convolutions and a pooling, then linear layers; ours, or PyTorch's."""
    lib = T if theirs else nn
    layers, last = [], 3
    for width in widths:
        for inputs in (last, width):
            layers += [lib.Conv2d(inputs, width, 3, padding=1), getattr(lib, activation)()]
        layers.append(lib.MaxPool2d(2))
        last = width
    layers.append(lib.Flatten())
    for i, (inputs, outputs) in enumerate(pairwise(dense)):
        layers += [getattr(lib, activation)()] * (i > 0) + [lib.Linear(inputs, outputs)]
    return lib.Sequential(*layers)


def _resnet32(activation, theirs):
    """Three stages of five blocks, group norm, 1 × 1 shortcuts."""
    lib, residual = (T, Residual) if theirs else (nn, nn.Residual)

    def conv(inputs, outputs, kernel, stride=1):
        padding = kernel // 2
        return [
            lib.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
            lib.GroupNorm(8, outputs),
        ]

    layers, last = [*conv(3, 16, 3), getattr(lib, activation)()], 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(5):
            first = stride if i == 0 else 1
            body = [
                *conv(last, width, 3, first),
                getattr(lib, activation)(),
                *conv(width, width, 3),
            ]
            way = lib.Sequential(*conv(last, width, 1, first)) if first > 1 else None
            layers += [residual(*body, shortcut=way), getattr(lib, activation)()]
            last = width
    ends = [T.AdaptiveAvgPool2d(1)] if theirs else [nn.GlobalAvgPool2d()]
    return lib.Sequential(*layers, *ends, lib.Flatten(), lib.Linear(64, 10))


FULL = {
    "cifar_cnn": partial(_pyramid, (32, 64, 128), (2048, 128, 10)),
    "vgg9": partial(_pyramid, (64, 128, 256), (4096, 256, 256, 10)),
    "resnet32": _resnet32,
}


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["all stored", "none stored"])
@pytest.mark.parametrize("name", FULL)
def test_the_large_models_match_micro_batches_of_one(name, budget):
    # Smooth: of a million ReLUs some stand so near zero that rounding decides on their side.
    ours, theirs = FULL[name]("SiLU", False), FULL[name]("SiLU", True)
    stored_bytes = 1 << 40 if budget == "all stored" else 0
    run = compiled(ours, (3, 32, 32), batch=3, stored_bytes=stored_bytes)
    close(gradient(run, bound=1e3), oracle(theirs, run, bound=1e3))
    # Norms from Gram matrices are upper bounds: of many layers together, visibly so.
    tolerance = TOLERANCE if stored_bytes else 0.01
    own, true = gradient(run, bound=0.1), oracle(theirs, run, bound=0.1)
    close(own, true, tolerance)
    length, longest = (sum((g.astype(float) ** 2).sum() for g in v.values()) for v in (own, true))
    assert length <= longest * (1 + 2 * TOLERANCE)
    with torch.no_grad():
        expected = theirs(torch.tensor(run.x)).numpy()
    found = run.outside.predict(run.x, run.model.parameters)
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_privacy_takes_a_third_more_memory_than_none_beyond_what_is_stored(name):
    model, cpu, budget = load(FULL[name]("ReLU", False), (3, 32, 32)), Cpu.native(), 64 << 20
    private, plain = (
        compile_training(
            model,
            loss="cross-entropy",
            optimizer=SGD(lr=0.1),
            batch=64,
            cpu=cpu,
            private=private,
            stored_bytes=budget,
        )
        for private in (True, False)
    )
    stored = memory.stored_bytes(private)
    assert 0 < stored <= budget
    assert private.arena - stored <= 1.3 * plain.arena
