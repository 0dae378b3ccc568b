"""Per-example norms, clip factors and clipped sums, from inputs and adjoints.

For every operator with parameters the gradient of example i is a product of its input x_i and its
adjoint d_i. Its norm is taken without forming it, or of one that is then kept or formed again:

- *product*: a linear layer on rows, |x_i|² |d_i|² (+ |d_i|² for the bias); costs nothing.
- *stored*: convolutions, biases over pixels, scales and linear layers on lists of rows: the
  gradient of each example is formed once, its norm taken of exactly these numbers, and c_i g_i
  summed later.
- *gram*: convolutions whose stored gradients are too large or too slow: the norm from pixel Gram
  matrices with a rounding bound, then one weighted weight gradient.
- *recomputed*: the same where finding gradients is cheap: once for their norms, and again, by the
  same instructions, for their sum.

The factor of example i is c_i = mask_i · min(1, C / n_i) with C = hyper[0] and n_i an upper bound
of its norm; an example whose norm is not finite counts exactly zero.
Results have the stored layouts: convolution weights flat in the order height, width, in, out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import relax
from tvm.relax import op

from myelin import planner
from myelin.cpu import Cpu, Precision
from myelin.graph import Layer, Objective, kernel, layers, operator, rebuild, returned
from myelin.kernels import clipping as clip_kernels
from myelin.kernels import conv as conv_kernels
from myelin.kernels import linear, mixed, split
from myelin.kernels import normalise as normalise_kernels
from myelin.kernels.update import HYPER
from myelin.kernels.window import Conv, Product
from myelin.planner import CONV, Gradient, Method

LINEAR: Mapping[Precision, Any] = {"float32": linear, "bf16": mixed, "bf16x3": split}
"""The templates of linear layers' products and norms, by the precision of products."""

NORMS = 11
"""Norms that one kernel takes: 14 arguments less mask, hyper and the result."""


def clip_and_sum(module: Any, objective: Objective) -> Any:
    """Return the clipped sum for each parameter; `mask` and `hyper` become arguments."""
    function = module["main"]
    found = layers(function, objective)
    batch = int(function.params[0].ty.shape[0])
    mask = relax.Var("mask", relax.TensorType((batch,), "float32"))
    hyper = relax.Var("hyper", relax.TensorType((HYPER,), "float32"))
    adjoints = list(returned(function).fields)
    norms = _Norms()
    later: dict[int, Callable[[Any], Any]] = {}
    env: dict[Any, Any] = {p: p for p in function.params}

    how = dict(methods(module, objective))
    sums: dict[int, Any] = {}

    def add(builder: Any, c: Any) -> None:
        for i, total in sorted(later.items()):
            sums[i] = builder.emit(total(c), f"g_{objective.names[i]}")
        later.clear()

    def rule(builder: Any, var: Any, value: Any) -> Any:
        env[var] = builder.emit(value, var.name)
        if objective.clipping == "none" and _is_adjoint_of_loss(value, objective):
            # What follows is linear in it: a masked example adds nothing anywhere.
            rows = builder.emit(op.reshape(mask, (batch, 1)))
            env[var] = builder.emit(op.multiply(env[var], rows))
        # As soon as an adjoint is there: what gradients were made of is free early.
        for layer, adjoint in zip(found, adjoints, strict=True):
            if adjoint.same_as(var):
                ends = env[layer.x], env[var]
                _gather(builder, layer, how[layer.name], ends, norms, later, objective)
        if objective.clipping == "none":
            add(builder, mask)
        return env[var]

    def finish(builder: Any, _: Any) -> Any:
        if later:
            add(builder, norms.factors(builder, mask, hyper, batch))
        return [sums[i] for i in range(len(objective.names))]

    return relax.transform.DeadCodeElimination()(
        rebuild(function, [*function.params, mask, hyper], rule, finish)
    )


def _is_adjoint_of_loss(value: Any, objective: Objective) -> bool:
    packed = operator(value) == "relax.call_dps_packed"
    return packed and str(value.args[0].global_symbol) == f"myelin.{objective.loss}-adjoint"


def methods(module: Any, objective: Objective) -> list[tuple[str, Method]]:
    """(layer, how its norm is taken) for every layer, of the module that `Model.relax` emits."""
    found = layers(module["main"], objective)
    if objective.clipping == "none":
        return [(layer.name, "none") for layer in found]
    convolutions = {layer.name: convolution(layer) for layer in found if _kind(layer) == "conv2d"}
    cpu, precision = Cpu.named(objective.level), objective.precision
    stored = planner.store(convolutions, cpu, objective.stored_bytes, precision)
    kinds: dict[str, Method] = {"linear": "product", "scale": "stored"}
    return [
        (
            layer.name,
            "stored"
            if layer.name in stored
            else kinds.get(_kind(layer))
            or planner.unstored(cpu, convolutions[layer.name], precision),
        )
        for layer in found
    ]


def _kind(layer: Layer) -> str:
    """The layer's kind; a linear layer on lists of rows is a convolution."""
    return "conv2d" if layer.kind == "linear" and len(_shape(layer.x)) != 2 else layer.kind


def additions(module: Any, objective: Objective) -> int:
    """Longest chain of float32 roundings between examples' clipped gradients and their sum."""
    longest = clip_kernels.weighted_sum_additions(1)
    how = dict(methods(module, objective))
    for layer in layers(module["main"], objective):
        n = _shape(layer.x)[0]
        if _kind(layer) == "linear":
            longest = max(longest, LINEAR[objective.precision].weighted_gradient_additions(n))
        elif _kind(layer) == "conv2d" and how[layer.name] not in ("stored", "none"):
            gradient = _gradient(layer, how[layer.name], objective)
            longest = max(longest, gradient.additions)
    return longest


def _gradient(layer: Layer, how: Method, objective: Objective) -> Gradient:
    """How a convolution's weight gradient is computed, its norm being taken so."""
    conv, cpu = convolution(layer), Cpu.named(objective.level)
    products: Mapping[Method, Product] = {"stored": "stored_gradient", "none": "batch_gradient"}
    algorithm = (
        planner.recomputing(cpu, conv, objective.precision)
        if how == "recomputed"
        else planner.algorithm(
            cpu, conv, products.get(how, "weighted_gradient"), objective.precision
        )
    )
    assert algorithm is not None
    return Gradient(conv=conv, algorithm=algorithm)


def convolution(layer: Layer) -> Conv:
    """A conv2d layer, or a linear layer on lists of rows seen as a 1 × 1 convolution."""
    if layer.kind == "linear":
        n, rows, size = _shape(layer.x)
        return Conv(n=n, h=rows, w=1, ci=size, co=_shape(layer.call)[-1], kh=1, kw=1)
    return conv2d(_shape(layer.x), _shape(layer.call.args[1]), layer.call.attrs)


def conv2d(x: Sequence[int], weight: Sequence[int], attrs: Any) -> Conv:
    """Relax's conv2d of such shapes, channels first."""
    (n, ci, h, w), (co, _, kh, kw) = x, weight
    numbers = (*attrs.strides, *attrs.padding)
    return from_fields([n, h, w, ci, co, kh, kw, *(int(number) for number in numbers)])


def fields(conv: Conv) -> list[int]:
    """A convolution as the integer attributes of a kernel call; `Conv` again by `from_fields`."""
    return [conv.n, conv.h, conv.w, conv.ci, conv.co, conv.kh, conv.kw, *conv.stride, *conv.padding]


def from_fields(numbers: Sequence[int]) -> Conv:
    """The inverse of `fields`."""
    n, h, w, ci, co, kh, kw, *rest = numbers
    stride, padding = (rest[0], rest[1]), (rest[2], rest[3], rest[4], rest[5])
    return Conv(n=n, h=h, w=w, ci=ci, co=co, kh=kh, kw=kw, stride=stride, padding=padding)


def attributes(gradient: Gradient) -> list[int]:
    """A gradient as the attributes of a kernel call; itself again by `from_attributes`."""
    return [*fields(gradient.conv), list(CONV).index(gradient.algorithm)]


def from_attributes(numbers: Sequence[int]) -> Gradient:
    """The inverse of `attributes`."""
    *geometry, number = numbers
    return Gradient(conv=from_fields(geometry), algorithm=list(CONV)[number])


def fixed(value: float) -> int:
    """A small positive float as an integer number of 2⁻⁵², rounded up: attributes are integers."""
    return math.ceil(value * 2**52)


def real(number: int) -> float:
    """The inverse of `fixed`."""
    return number * 2.0**-52


class _Norms:
    """Squared norms gathered layer by layer: terms, and Gram pairs with their bounds."""

    def __init__(self) -> None:
        self.terms: list[tuple[Any, float]] = []
        self.grams: list[tuple[Any, Any, float]] = []

    def factors(self, builder: Any, mask: Any, hyper: Any, batch: int) -> Any:
        """c[batch]; norms beyond what one kernel takes are added up to upper bounds first."""
        terms, grams = list(self.terms), list(self.grams)
        while len(terms) + 2 * len(grams) > NORMS:
            some, grams = grams[: NORMS // 2], grams[NORMS // 2 :]
            few, terms = terms[: NORMS - 2 * len(some)], terms[NORMS - 2 * len(some) :]
            arguments, numbers = _arguments(few, some)
            call = kernel("norm-sum", arguments, [(batch,)], numbers)
            terms.append((builder.emit(call, "norm"), 0.0))
        arguments, numbers = _arguments(terms, grams)
        call = kernel("clip-factors", [mask, hyper, *arguments], [(batch,)], numbers)
        return builder.emit(call, "c")


def _arguments(
    terms: Sequence[tuple[Any, float]], grams: Sequence[tuple[Any, Any, float]]
) -> tuple[list[Any], list[int]]:
    """Operands and attributes (number of terms, of grams, their bounds) of a kernel on norms."""
    arguments = [s for s, _ in terms] + [v for s, t, _ in grams for v in (s, t)]
    limits = [fixed(bound) for _, bound in terms] + [fixed(kappa) for *_, kappa in grams]
    return arguments, [len(terms), len(grams), *limits]


def _gather(
    builder: Any,
    layer: Layer,
    how: Method,
    ends: tuple[Any, Any],
    norms: _Norms,
    later: dict[int, Callable[[Any], Any]],
    objective: Objective,
) -> None:
    """Emits a layer's norms, and says how its parameters' sums follow from the clip factors.

    `ends` are the layer's input and the adjoint of its output.
    """
    x, d = ends
    batch = _shape(x)[0]
    if layer.bias is not None and _kind(layer) != "linear":
        later[layer.bias] = _stored_sum(builder, d, _bias_size(layer, d), norms)
    if _kind(layer) == "scale":
        later[layer.weight] = _stored_scale(builder, x, d, _bias_size(layer, d), norms)
        return
    if _kind(layer) == "linear":
        k, n = _shape(x)[1], _shape(d)[1]
        norm = kernel("linear-norm", [x, d], [(batch,)], [int(layer.bias is not None)])
        bound = LINEAR[objective.precision].squared_norm_inflation(k, n)
        norms.terms.append((builder.emit(norm), bound))
        later[layer.weight] = lambda c: kernel("linear-gradient", [x, d, c], [(k, n)])
        if layer.bias is not None:
            later[layer.bias] = lambda c: kernel("bias-gradient", [d, c], [(n,)])
        return
    gradient = _gradient(layer, how, objective)
    conv, numbers = gradient.conv, attributes(gradient)
    if how == "stored":
        results = [(batch, conv.weights), (batch,)]
        pair = builder.emit(kernel("conv-stored", [x, d], results, numbers))
        g, s = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        norms.terms.append((s, conv_kernels.stored_norm_inflation(conv)))
        later[layer.weight] = lambda c: kernel("weighted-sum", [g, c], [(conv.weights,)])
        return
    if how == "none":
        later[layer.weight] = lambda _: kernel(
            "conv-batch-gradient", [x, d], [(conv.weights,)], numbers
        )
        return
    if how == "recomputed":
        norm = builder.emit(kernel("conv-norm", [x, d], [(batch,)], numbers))
        norms.terms.append((norm, conv_kernels.stored_norm_inflation(conv)))
    if how == "gram":
        pair = builder.emit(kernel("conv-gram", [x, d], [(batch,)] * 2, numbers))
        s, t = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        norms.grams.append((s, t, conv_kernels.gram_kappa(conv, gradient.error)))
    later[layer.weight] = lambda c: kernel("conv-gradient", [x, d, c], [(conv.weights,)], numbers)


def _stored_sum(builder: Any, d: Any, size: int, norms: _Norms) -> Callable[[Any], Any]:
    """Sums of d over all but the last `size` numbers of an example: stored, with their norm."""
    batch, pixels = _split(d, size)
    bound = conv_kernels.stored_norm_inflation(
        Conv(n=batch, h=pixels, w=1, ci=1, co=size, kh=1, kw=1)
    )
    return _stored(builder, "bias-stored", [d], (batch, pixels, size), bound, norms)


def _stored_scale(builder: Any, x: Any, d: Any, size: int, norms: _Norms) -> Callable[[Any], Any]:
    """The same of x · d."""
    bound = normalise_kernels.stored_scale_inflation()
    return _stored(builder, "scale-stored", [x, d], (*_split(d, size), size), bound, norms)


def _split(d: Any, size: int) -> tuple[int, int]:
    """Examples, and rows of `size` numbers an example has."""
    batch, *rest = _shape(d)
    return batch, math.prod(rest) // size


def _stored(
    builder: Any,
    name: str,
    operands: Sequence[Any],
    extents: tuple[int, int, int],
    bound: float,
    norms: _Norms,
) -> Callable[[Any], Any]:
    batch, _, size = extents
    pair = builder.emit(kernel(name, operands, [(batch, size), (batch,)], extents))
    g, s = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
    norms.terms.append((s, bound))
    return lambda c: kernel("weighted-sum", [g, c], [(size,)])


def _bias_size(layer: Layer, d: Any) -> int:
    """Numbers in the layer's bias or scale."""
    if layer.kind == "conv2d":
        return _shape(d)[1]
    if layer.kind == "linear":
        return _shape(d)[-1]
    return math.prod(_shape(layer.call.args[1]))


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, relax.Call):
        # The type of a call that is not bound: a product keeps all but its last axis.
        *rows, _ = _shape(value.args[0])
        return (*rows, _shape(value.args[1])[-1])
    return tuple(int(d) for d in value.ty.shape)
