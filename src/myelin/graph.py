"""A training graph's Relax functions: what is wanted of them, reading and rebuilding them.

Functions are in A-normal form: a list of bindings, each of a variable to one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tvm import relax
from tvm.relax import op

from myelin.cpu import Precision
from myelin.errors import ModelRefused
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


def check_loss(loss: str) -> Loss:
    """The loss, if it is one; raises ModelRefused."""
    for known in LOSSES:
        if loss == known:
            return known
    raise ModelRefused(f"{loss!r} is no loss: use one of {', '.join(LOSSES)}")


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
    template answers is decided in `myelin.operators`.
    """
    types = [relax.TensorType(shape, "float32") for shape in results]
    return op.call_dps_packed(
        f"myelin.{name}",
        relax.Tuple([*arguments, relax.ShapeExpr(list(attributes))]),
        types if len(types) > 1 else types[0],
    )
