"""Every pass: what it makes of a small graph, and that numbers stay what they should be.

Graphs are compared structurally with expected TVMScript; numbers are run by TVM's own virtual
machine, with numpy in place of our kernels, against PyTorch's autograd.
"""

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from myelin import graph, nn, training
from myelin.errors import ModelRefused, UnsupportedLayer
from myelin.graph import Objective
from myelin.importers import load

torch = pytest.importorskip("torch")

BATCH = 4


def small():
    return load(
        nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2, bias=False)), (3,), seed=1
    )


def objective(model, **options):
    return Objective(names=tuple(model.shapes), loss="cross-entropy", **options)


def after(name):
    """The module that the pass `name` makes of the small model; its input; the objective."""
    model = small()
    how, module = objective(model), model.relax(BATCH)
    for known, run in training.PASSES:
        before, module = module, run(module, how)
        if known == name:
            return module, before, model
    raise AssertionError(name)


def data():
    generator = np.random.default_rng(2)
    x = generator.standard_normal((BATCH, 3)).astype(np.float32)
    return x, np.array([0, 1, 1, 0], np.int32)


def weights(model):
    return [np.ascontiguousarray(v.transpose(model.layout(n))) for n, v in model.parameters.items()]


def evaluate(module, *arrays):
    """Run `main` in TVM's virtual machine; returns nested lists of arrays."""
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())

    def plain(value):
        return value.numpy() if hasattr(value, "numpy") else [plain(v) for v in value]

    return plain(machine["main"](*(tvm.runtime.tensor(a) for a in arrays)))


def adjoints(model, x, seed):
    """PyTorch's derivatives of Σ logits ⊙ seed at the two products' outputs, and the logits."""
    first, bias, second = (torch.tensor(w) for w in weights(model))
    hidden = torch.tensor(x) @ first + bias
    hidden.requires_grad_()
    hidden.retain_grad()
    logits = torch.relu(hidden) @ second
    logits.retain_grad()
    (logits * torch.tensor(seed)).sum().backward()
    return logits.detach().numpy(), [hidden.grad.numpy(), logits.grad.numpy()]


def same(module, expected):
    tvm.ir.assert_structural_equal(module, expected, map_free_vars=True)


def test_check_parameters_changes_nothing():
    module, before, _ = after("check-parameters")
    same(module, before)


def test_probes_stand_behind_every_operator_with_parameters():
    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((4, 3), "float32"),
            w0: R.Tensor((3, 5), "float32"),
            b0: R.Tensor((5,), "float32"),
            w2: R.Tensor((5, 2), "float32"),
            probe_0: R.Tensor((4, 5), "float32"),
            probe_1: R.Tensor((4, 2), "float32"),
        ) -> R.Tensor((4, 2), "float32"):
            with R.dataflow():
                a = R.matmul(x, w0)
                b = R.add(a, b0)
                c = R.add(b, probe_0)
                d = R.nn.relu(c)
                e = R.matmul(d, w2)
                gv = R.add(e, probe_1)
                R.output(gv)
            return gv

    module, before, model = after("add-probes")
    same(module, Expected)
    x, _ = data()
    zeros = [np.zeros((BATCH, n), np.float32) for n in (5, 2)]
    expected = evaluate(before, x, *weights(model))
    np.testing.assert_array_equal(evaluate(module, x, *weights(model), *zeros), expected)


def test_the_seed_makes_a_scalar_without_a_loss():
    module, before, model = after("add-seed")
    seed = np.random.default_rng(3).standard_normal((BATCH, 2)).astype(np.float32)
    x, _ = data()
    zeros = [np.zeros((BATCH, n), np.float32) for n in (5, 2)]
    logits = evaluate(before, x, *weights(model), *zeros)
    scalar, again = evaluate(module, x, *weights(model), *zeros, seed)
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_allclose(scalar, (logits * seed).sum(), rtol=1e-5)
    names = [graph.operator(b.value) for b in graph.bindings(module["main"])]
    assert names[-2:] == ["relax.multiply", "relax.sum"]
    assert names[:-2] == [graph.operator(b.value) for b in graph.bindings(before["main"])]


def test_relax_differentiates_with_respect_to_the_probes():
    module, _, model = after("differentiate")
    x, _ = data()
    seed = np.random.default_rng(3).standard_normal((BATCH, 2)).astype(np.float32)
    zeros = [np.zeros((BATCH, n), np.float32) for n in (5, 2)]
    (_, logits), found = evaluate(module, x, *weights(model), *zeros, seed)
    expected_logits, expected = adjoints(model, x, seed)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_adjoint_of_the_logits_is_the_seed_itself():
    module, _, model = after("keep-adjoints")
    function = module["main"]
    logits, first, last = graph.returned(function).fields
    assert last.same_as(next(p for p in function.params if p.name == "seed"))
    assert [tuple(map(int, v.ty.shape)) for v in (logits, first)] == [(4, 2), (4, 5)]
    x, _ = data()
    seed = np.random.default_rng(3).standard_normal((BATCH, 2)).astype(np.float32)
    zeros = [np.zeros((BATCH, n), np.float32) for n in (5, 2)]
    found = evaluate(module, x, *weights(model), *zeros, seed)
    expected_logits, expected = adjoints(model, x, seed)
    for ours, theirs in zip(found, [expected_logits, *expected], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_probes_and_what_nobody_uses_are_gone():
    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((4, 3), "float32"),
            w0: R.Tensor((3, 5), "float32"),
            b0: R.Tensor((5,), "float32"),
            w2: R.Tensor((5, 2), "float32"),
            seed: R.Tensor((4, 2), "float32"),
        ):
            with R.dataflow():
                a = R.matmul(x, w0)
                b = R.add(a, b0)
                c = R.nn.relu(b)
                d = R.matmul(c, w2)
                e = R.permute_dims(w2, axes=[1, 0])
                f = R.matmul(seed, e)
                g = R.greater(c, R.const(0.0, "float32"))
                h = R.where(g, f, R.const(0.0, "float32"))
                gv = (d, h, seed)
                R.output(gv)
            return gv

    module, _, model = after("remove-probes")
    same(module, Expected)
    x, _ = data()
    seed = np.random.default_rng(3).standard_normal((BATCH, 2)).astype(np.float32)
    found = evaluate(module, x, *weights(model), seed)
    expected_logits, expected = adjoints(model, x, seed)
    for ours, theirs in zip(found, [expected_logits, *expected], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def numpy_kernels():
    """Numpy in place of the kernels that the graphs below call."""

    def kernel(name, compute):
        def run(*arguments):
            *inputs, _, out = arguments
            out.copyfrom(compute(*(a.numpy() for a in inputs)).astype(np.float32))

        tvm.register_global_func(f"myelin.{name}", run, override=True)

    def factors(mask, hyper, *norms):
        return mask * np.minimum(1, hyper[0] / (np.sqrt(sum(norms)) + 1e-30))

    kernel("cross-entropy-adjoint", lambda z, y: softmax(z) - np.eye(z.shape[1])[y])
    kernel("linear-norm", lambda x, d: ((x**2).sum(1) + (len(x[0]) == 3)) * (d**2).sum(1))
    kernel("clip-factors", factors)
    kernel("linear-gradient", lambda x, d, c: x.T @ (d * c[:, None]))
    kernel("bias-gradient", lambda d, c: (d * c[:, None]).sum(0))


def test_the_seed_becomes_the_losss_own_derivative(numpy_kernels):
    module, before, model = after("bind-loss")
    names = [graph.operator(b.value) for b in graph.bindings(module["main"])]
    assert names.count("relax.call_dps_packed") == 1
    assert [p.name for p in module["main"].params][-1] == "y"
    assert [p.name for p in before["main"].params][-1] == "seed"
    x, y = data()
    first, last = evaluate(module, x, *weights(model), y)
    expected_logits, _ = adjoints(model, x, np.zeros((BATCH, 2), np.float32))
    seed = (softmax(expected_logits) - np.eye(2)[y]).astype(np.float32)
    np.testing.assert_allclose(last, seed, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first, adjoints(model, x, seed)[1][0], rtol=1e-5, atol=1e-6)


def test_the_finished_graph_sums_clipped_gradients(numpy_kernels):
    module, _, model = after("clip-and-sum")
    called = [
        str(b.value.args[0].global_symbol)
        for b in graph.bindings(module["main"])
        if graph.operator(b.value) == "relax.call_dps_packed"
    ]
    assert called == [
        "myelin.cross-entropy-adjoint",
        "myelin.linear-norm",
        "myelin.linear-norm",
        "myelin.clip-factors",
        "myelin.linear-gradient",
        "myelin.bias-gradient",
        "myelin.linear-gradient",
    ]
    assert [p.name for p in module["main"].params][-3:] == ["y", "mask", "hyper"]
    x, y = data()
    mask = np.array([1, 1, 0, 1], np.float32)
    hyper = np.zeros(16, np.float32)
    hyper[0] = bound = 0.5
    found = evaluate(module, x, *weights(model), y, mask, hyper)
    expected = [np.zeros(w.shape) for w in weights(model)]
    for i in np.flatnonzero(mask):
        tensors = [torch.tensor(w, requires_grad=True) for w in weights(model)]
        logits = torch.relu(torch.tensor(x[i : i + 1]) @ tensors[0] + tensors[1]) @ tensors[2]
        torch.nn.functional.cross_entropy(logits, torch.tensor(y[i : i + 1]).long()).backward()
        own = [t.grad.double().numpy() for t in tensors]
        factor = min(1, bound / (np.sqrt(sum((g**2).sum() for g in own)) + 1e-30))
        expected = [e + factor * g for e, g in zip(expected, own, strict=True)]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_passes_see_their_results_recorded_in_order():
    model = small()
    seen = []
    training.training_graph(
        model.relax(2), objective(model), record=lambda name, module: seen.append(name)
    )
    assert seen == [name for name, _ in training.PASSES]


@pytest.mark.parametrize(
    ("function", "theirs"),
    [
        (relax.op.nn.relu, torch.relu),
        (relax.op.nn.gelu, torch.nn.functional.gelu),
        (relax.op.nn.gelu_tanh, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        (relax.op.nn.silu, torch.nn.functional.silu),
    ],
)
def test_derivatives_are_those_of_pytorch_at_corners_too(function, theirs):
    values = np.array([-30, -3, -1e-3, -0.0, 0.0, 1e-3, 0.7, 5, 30], np.float32)
    x = relax.Var("x", relax.TensorType(values.shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.sum(function(x)))
        builder.emit_func_output(output)
    with training.own_gradients():
        module = relax.transform.Gradient("main", require_grads=[x])(builder.get())
    _, (found,) = evaluate(
        tvm.IRModule({"main": module["main_adjoint"].with_attr("global_symbol", "main")}), values
    )
    tensor = torch.tensor(values, requires_grad=True)
    theirs(tensor).sum().backward()
    np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=1e-5, atol=1e-6)


def shared():
    """A Relax module that uses one weight twice, as no front end would let through."""
    x, w = (relax.Var(n, relax.TensorType((4, 4), "float32")) for n in ("x", "p_w"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.matmul(relax.op.matmul(x, w), w))
        builder.emit_func_output(output)
    return builder.get()


def subtracted():
    """A Relax module with a parameter outside of any layer."""
    x, w = (relax.Var(n, relax.TensorType((4, 4), "float32")) for n in ("x", "p_w"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.subtract(x, w))
        builder.emit_func_output(output)
    return builder.get()


@pytest.mark.parametrize(
    ("module", "why"), [(shared(), "used 2 times"), (subtracted(), "not the weight or bias")]
)
def test_parameters_without_a_norm_rule_are_refused(module, why):
    with pytest.raises(UnsupportedLayer) as refused:
        training.check_parameters(module, Objective(names=("layer.w",), loss="cross-entropy"))
    assert refused.value.layer == "layer"
    assert why in refused.value.why


def test_an_unknown_loss_is_refused():
    with pytest.raises(ModelRefused, match="'hinge' is no loss: use one of cross-entropy"):
        graph.check_loss("hinge")
