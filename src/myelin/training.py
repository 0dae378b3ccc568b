"""From a model to its training graph, in one visible list of passes.

The graph that comes out computes, for a physical batch, the sum of the examples' clipped gradients:

    main(x, parameters…, y, mask, hyper) -> one clipped sum a parameter

Per-example gradients need no per-example program. With a *probe*, a zero added to the output of
every operator that has parameters, the derivative with respect to a probe is a tensor with a row an
example: the adjoint of that output. Norm, clip factor and clipped sum of an operator follow from
its input and this adjoint (`myelin.clipping`). No loss is computed: Relax differentiates
L = Σ logits ⊙ seed, whose adjoint at the logits is `seed`, and the seed is then bound to the kernel
of the loss's own derivative.

Every pass maps a Relax module with one function `main` to another; `PASSES` is their order and
`compile_training(…, dump=DIR)` of `myelin.plan` writes the module after each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import ir, relax
from tvm.relax import op

from myelin import clipping
from myelin.errors import UnsupportedLayer
from myelin.graph import (
    Layer,
    Objective,
    bindings,
    kernel,
    layers,
    operands,
    operator,
    rebuild,
    returned,
)

Pass = Callable[[Any, Objective], Any]


def training_graph(
    module: Any, objective: Objective, *, record: Callable[[str, Any], None] | None = None
) -> Any:
    """Run every pass over `Model.relax(batch)`; `record(name, module)` sees each result."""
    for name, run in PASSES:
        module = run(module, objective)
        if record is not None:
            record(name, module)
    return module


def check_parameters(module: Any, objective: Objective) -> Any:
    """Refuse a parameter that is not used exactly once, by an operator with a norm rule."""
    function = module["main"]
    used = [name for layer in layers(function, objective) for name in _names(layer, objective)]
    counts = dict.fromkeys(objective.names, 0)
    parameters = dict(zip(function.params[1:], objective.names, strict=False))
    for binding in bindings(function):
        for operand in operands(binding.value):
            if operand in parameters:
                counts[parameters[operand]] += 1
    for name, count in counts.items():
        if count != 1:
            raise UnsupportedLayer(
                name.rpartition(".")[0] or name,
                f"its parameter {name} is used {count} times, and the norm of a shared gradient is "
                "not the sum of the uses' norms",
                "give every layer its own parameters",
            )
        if name not in used:
            raise UnsupportedLayer(
                name.rpartition(".")[0] or name,
                f"its parameter {name} is not the weight or bias of a linear, conv2d or norm layer",
                "use one of these layers",
            )
    return module


def add_probes(module: Any, objective: Objective) -> Any:
    """y → y + probe for the output y of every operator with parameters; probes become arguments."""
    function = module["main"]
    outputs = {layer.output: layer for layer in layers(function, objective)}
    probes = {output: relax.Var(f"probe_{i}", output.ty) for i, output in enumerate(outputs)}

    def rule(builder: Any, var: Any, value: Any) -> Any:
        y = builder.emit(value, var.name)
        return builder.emit(op.add(y, probes[var])) if var in probes else y

    return rebuild(function, [*function.params, *probes.values()], rule)


def add_seed(module: Any, objective: Objective) -> Any:
    """Return (Σ logits ⊙ seed, logits) instead of the logits; the seed becomes an argument."""
    function = module["main"]
    logits = function.ret_ty
    seed = relax.Var("seed", logits)

    def finish(builder: Any, result: Any) -> Any:
        return [builder.emit(op.sum(op.multiply(result, seed))), result]

    return rebuild(function, [*function.params, seed], finish=finish)


def differentiate(module: Any, objective: Objective) -> Any:
    """((L, logits), adjoints of the probes) by `relax.transform.Gradient`."""
    function = module["main"]
    probes = [p for p in function.params if p.name.startswith("probe_")]
    with own_gradients():
        module = relax.transform.Gradient("main", require_grads=probes, target_index=0)(module)
    return _module(module["main_adjoint"])


def keep_adjoints(module: Any, objective: Objective) -> Any:
    """Return (logits, adjoints…) only, and write the adjoint of the logits as the seed itself."""
    function = module["main"]
    seed = next(p for p in function.params if p.name == "seed")
    ones: set[Any] = set()

    def rule(builder: Any, var: Any, value: Any) -> Any:
        name = operator(value)
        if name == "relax.ones" or (
            name in ("relax.broadcast_to", "") and any(o in ones for o in operands(value))
        ):
            y = value if isinstance(value, relax.Var) else builder.emit(value)
            ones.update((var, y))
            return y
        if name == "relax.multiply" and value.args[0] in ones and value.args[1].same_as(seed):
            return seed
        return builder.emit(value) if name else value

    def finish(builder: Any, result: Any) -> Any:
        (_, logits), adjoints = (part.fields for part in result.fields)
        return [logits, *adjoints]

    return rebuild(function, list(function.params), rule, finish)


def remove_probes(module: Any, objective: Objective) -> Any:
    """y + probe → y, the probes being zero; then whatever nothing uses goes."""
    function = module["main"]
    probes = {p for p in function.params if p.name.startswith("probe_")}

    def rule(builder: Any, var: Any, value: Any) -> Any:
        if operator(value) == "relax.add" and value.args[1] in probes:
            return value.args[0]
        return builder.emit(value)

    kept = [p for p in function.params if p not in probes]
    return relax.transform.DeadCodeElimination()(rebuild(function, kept, rule))


def bind_loss(module: Any, objective: Objective) -> Any:
    """seed → derivative of the loss at the logits, an example; the labels y become an argument.

    The derivative belongs to each example alone: nothing is averaged over the batch.
    """
    function = module["main"]
    batch, outputs = (int(d) for d in function.ret_ty.fields[0].shape)
    labels = (
        relax.TensorType((batch,), "int32")
        if objective.loss == "cross-entropy"
        else relax.TensorType((batch, outputs), "float32")
    )
    y = relax.Var("y", labels)
    seed = next(p for p in function.params if p.name == "seed")
    logits = returned(function).fields[0]
    bound: dict[Any, Any] = {}

    def rule(builder: Any, var: Any, value: Any) -> Any:
        new = builder.emit(value)
        if var.same_as(logits):
            bound[seed] = builder.emit(
                kernel(f"{objective.loss}-adjoint", [new, y], [(batch, outputs)]), "seed"
            )
        return new

    kept = [y if p.same_as(seed) else p for p in function.params]

    def finish(builder: Any, result: Any) -> Any:
        return list(result.fields[1:])

    return rebuild(function, kept, rule, finish, late=bound)


PASSES: tuple[tuple[str, Pass], ...] = (
    ("check-parameters", check_parameters),
    ("add-probes", add_probes),
    ("add-seed", add_seed),
    ("differentiate", differentiate),
    ("keep-adjoints", keep_adjoints),
    ("remove-probes", remove_probes),
    ("bind-loss", bind_loss),
    ("clip-and-sum", clipping.clip_and_sum),
)
"""The order of the passes."""


# Derivatives that Relax 0.27 lacks, or defines otherwise than PyTorch at a corner.


@contextmanager
def own_gradients() -> Iterator[None]:
    """Our derivatives of norms, GELU and ReLU instead of Relax's; those come back afterwards."""
    operators = {ir.Op.get(f"relax.nn.{name}"): rule for name, rule in _GRADIENTS.items()}
    before = {o: o.get_attr(_RULE) for o in operators}
    try:
        for o, rule in operators.items():
            o.reset_attr(_RULE)
            o.set_attr(_RULE, rule)
        yield
    finally:
        for o in operators:
            o.reset_attr(_RULE)
            if before[o] is not None:
                o.set_attr(_RULE, before[o])


_RULE = "FPrimalGradient"


def _relu_gradient(var: Any, call: Any, adjoint: Any, _: Any) -> list[Any]:
    # Relax passes the adjoint where x = 0, PyTorch does not; and reading y frees x.
    zero = relax.const(0.0, "float32")
    return [op.where(op.greater(var, zero), adjoint, zero)]


def _gelu_gradient(_: Any, call: Any, adjoint: Any, __: Any) -> list[Any]:
    # d/dx x Φ(x) = Φ(x) + x φ(x)
    (x,) = call.args
    half = relax.const(0.5, "float32")
    cdf = op.multiply(
        half,
        op.add(
            relax.const(1.0, "float32"),
            op.erf(op.multiply(x, relax.const(math.sqrt(0.5), "float32"))),
        ),
    )
    density = op.multiply(
        op.exp(op.negative(op.multiply(op.multiply(x, x), half))),
        relax.const(1 / math.sqrt(2 * math.pi), "float32"),
    )
    return [op.multiply(adjoint, op.add(cdf, op.multiply(x, density)))]


def _gelu_tanh_gradient(_: Any, call: Any, adjoint: Any, __: Any) -> list[Any]:
    # y = x/2 (1 + t), t = tanh(a (x + b x³)); y' = (1 + t)/2 + x/2 (1 - t²) a (1 + 3 b x²)
    (x,) = call.args
    a, b = math.sqrt(2 / math.pi), 0.044715
    one, half = relax.const(1.0, "float32"), relax.const(0.5, "float32")
    square = op.multiply(x, x)
    inner = op.multiply(
        op.multiply(x, relax.const(a, "float32")),
        op.add(one, op.multiply(square, relax.const(b, "float32"))),
    )
    t = op.tanh(inner)
    slope = op.multiply(
        op.add(one, op.multiply(square, relax.const(3 * b, "float32"))),
        relax.const(a, "float32"),
    )
    curved = op.multiply(
        op.multiply(op.multiply(x, half), op.subtract(one, op.multiply(t, t))), slope
    )
    return [op.multiply(adjoint, op.add(op.multiply(half, op.add(one, t)), curved))]


def _norm_gradient(var: Any, call: Any, adjoint: Any, __: Any) -> list[Any]:
    x, scale, shift = call.args
    # The kernel finds ε and the variance where the forward kernel left them.
    dx = kernel("normalise-adjoint", [var, adjoint], [tuple(int(d) for d in x.ty.shape)])
    # Unit scale and zero shift are constants: nobody asks for their derivatives.
    return [dx, op.zeros_like(scale), op.zeros_like(shift)]


_GRADIENTS = {
    "relu": _relu_gradient,
    "gelu": _gelu_gradient,
    "gelu_tanh": _gelu_tanh_gradient,
    "group_norm": _norm_gradient,
    "layer_norm": _norm_gradient,
}


def _names(layer: Layer, objective: Objective) -> list[str]:
    return [objective.names[i] for i in (layer.weight, layer.bias) if i is not None]


def _module(function: Any) -> Any:
    renamed = function.with_attr("global_symbol", "main")
    module = tvm.IRModule({"main": renamed})
    return relax.transform.Normalize()(module)
