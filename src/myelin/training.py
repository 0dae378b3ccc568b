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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import tvm
from tvm import ir, relax
from tvm.relax import op

from myelin.cpu import Precision
from myelin.errors import ModelRefused, UnsupportedLayer
from myelin.planner import STORED_BYTES

Loss = Literal["cross-entropy", "binary-cross-entropy", "mean-squared-error"]
LOSSES: tuple[Loss, ...] = ("cross-entropy", "binary-cross-entropy", "mean-squared-error")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What the passes need to know besides the module.

    `names`: the model's parameters, in the order of the function's. `clipping`: "per-example"
    bounds every example's gradient; "none" sums the unmasked examples' gradients, for baselines
    outside any enclave. `precision` is that of products. `level` and `stored_bytes`: the CPU that
    `myelin.planner` estimates for, and how much memory the stored per-example gradients of all
    convolutions may take.
    """

    names: tuple[str, ...]
    loss: Loss
    clipping: Literal["per-example", "none"] = "per-example"
    precision: Precision = "float32"
    level: str = "x86-64-v4"
    stored_bytes: int = STORED_BYTES


Pass = Callable[[Any, Objective], Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """An operator with parameters: its input, its output (bias included), who it is.

    `kind`: "linear" (product with a stored [in, out] matrix), "conv2d", or "scale" (a normalised
    value times a scale plus a shift). `weight` and `bias` index `Objective.names`.
    """

    kind: Literal["linear", "conv2d", "scale"]
    name: str
    x: Any
    call: Any
    weight: int
    bias: int | None
    output: Any


def training_graph(
    module: Any, objective: Objective, *, record: Callable[[str, Any], None] | None = None
) -> Any:
    """Run every pass over `Model.relax(batch)`; `record(name, module)` sees each result."""
    from myelin import clipping

    passes: Sequence[tuple[str, Pass]] = (*PASSES, *clipping.PASSES)
    for name, run in passes:
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
)
"""The order of the passes; those of `myelin.clipping` follow."""


# Reading and rebuilding Relax functions in A-normal form.


def bindings(function: Any) -> list[Any]:
    """The bindings of a function's body, in order."""
    return [binding for block in function.body.blocks for binding in block.bindings]


def returned(function: Any) -> Any:
    """What a function returns: a variable, or a tuple of variables even where it has a name."""
    result = function.body.body
    named = {b.var: b.value for b in bindings(function) if isinstance(b.value, relax.Tuple)}
    return named.get(result, result)


def operator(value: Any) -> str:
    """Name of the operator that a bound value calls, "" when it calls none."""
    return str(value.op.name) if isinstance(value, relax.Call) else ""


def operands(value: Any) -> list[Any]:
    """The variables that a bound value reads, tuples opened."""
    if isinstance(value, relax.Var):
        return [value]
    if isinstance(value, relax.Call):
        return [v for argument in value.args for v in operands(argument)]
    if isinstance(value, relax.Tuple):
        return [v for entry in value.fields for v in operands(entry)]
    if isinstance(value, relax.TupleGetItem):
        return operands(value.tuple_value)
    return []


def layers(function: Any, objective: Objective) -> list[Layer]:
    """The operators with parameters, in order of the forward computation."""
    index = {var: i for i, var in enumerate(function.params[1 : 1 + len(objective.names)])}
    bound = bindings(function)
    reshaped = {
        b.var: index[b.value.args[0]]
        for b in bound
        if operator(b.value) == "relax.reshape" and b.value.args[0] in index
    }
    weights = {**index, **reshaped}
    kinds: Mapping[str, Literal["linear", "conv2d", "scale"]] = {
        "relax.matmul": "linear",
        "relax.nn.conv2d": "conv2d",
        "relax.multiply": "scale",
    }
    shifts = {
        b.value.args[0]: (weights[b.value.args[1]], b.var)
        for b in reversed(bound)
        if operator(b.value) == "relax.add" and b.value.args[1] in weights
    }
    found: dict[int, Layer] = {}
    for b in bound:
        kind = kinds.get(operator(b.value))
        if kind is None or b.value.args[1] not in weights:
            continue
        weight = weights[b.value.args[1]]
        if weight in found:
            continue
        bias, output = shifts.get(b.var, (None, b.var))
        name = objective.names[weight]
        found[weight] = Layer(
            kind=kind,
            name=name.rpartition(".")[0] or name,
            x=b.value.args[0],
            call=b.value,
            weight=weight,
            bias=bias,
            output=output,
        )
    return list(found.values())


def rebuild(
    function: Any,
    parameters: Sequence[Any],
    rule: Callable[[Any, Any, Any], Any] | None = None,
    finish: Callable[[Any, Any], Any] | None = None,
    *,
    late: Mapping[Any, Any] | None = None,
) -> Any:
    """Emit a function again with other parameters, values or results.

    `rule(builder, var, value)` returns what stands for `var` from there on, `value` having its
    operands replaced already; `finish(builder, result)` returns the results. `late` maps parameters
    that are no more to values that rules emit on the way.
    """
    builder = relax.BlockBuilder()
    env: dict[Any, Any] = {}
    late = {} if late is None else late
    with builder.function("main", list(parameters)):
        with builder.dataflow():
            for binding in bindings(function):
                value = substitute(binding.value, env, late)
                env[binding.var] = (
                    builder.emit(value, binding.var.name)
                    if rule is None
                    else rule(builder, binding.var, value)
                )
            result = substitute(returned(function), env, late)
            if finish is not None:
                result = finish(builder, result)
            outputs = [
                builder.emit_output(r) for r in (result if isinstance(result, list) else [result])
            ]
        builder.emit_func_output(relax.Tuple(outputs) if isinstance(result, list) else outputs[0])
    return relax.transform.CanonicalizeBindings()(builder.get())


def substitute(value: Any, env: Mapping[Any, Any], late: Mapping[Any, Any]) -> Any:
    """A bound value with its variables replaced."""
    if isinstance(value, relax.Var):
        return env.get(value, late.get(value, value))
    if isinstance(value, relax.Call):
        arguments = [substitute(argument, env, late) for argument in value.args]
        return relax.Call(value.op, arguments, value.attrs, value.ty_args)
    if isinstance(value, relax.Tuple):
        return relax.Tuple([substitute(entry, env, late) for entry in value.fields])
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(value.tuple_value, env, late), value.index)
    return value


def kernel(
    name: str,
    arguments: Sequence[Any],
    results: Sequence[tuple[int, ...]],
    attributes: Sequence[int] = (),
) -> Any:
    """A call of a kernel that Relax has no operator for: `myelin.NAME(arguments…, attributes)`.

    `results` are the shapes of its float32 results; more than one make a tuple. Which kernel
    template answers is decided in `myelin.plan`.
    """
    types = [relax.TensorType(shape, "float32") for shape in results]
    return op.call_dps_packed(
        f"myelin.{name}",
        relax.Tuple([*arguments, relax.ShapeExpr(list(attributes))]),
        types if len(types) > 1 else types[0],
    )


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


def check_loss(loss: str) -> Loss:
    """The loss, if it is one; raises ModelRefused."""
    for known in LOSSES:
        if loss == known:
            return known
    raise ModelRefused(f"{loss!r} is no loss: use one of {', '.join(LOSSES)}")
