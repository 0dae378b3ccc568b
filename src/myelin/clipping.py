"""Per-example norms, clip factors and clipped sums, from inputs and adjoints.

For every operator with parameters the gradient of example i is a product of its input x_i and its
adjoint d_i, so its norm needs no gradient to be formed, or one that is then kept:

- *product*: a linear layer on rows, |x_i|² |d_i|² (+ |d_i|² for the bias); costs nothing.
- *stored*: convolutions, biases over pixels, scales and linear layers on lists of rows: the gradient
  of each example is formed once, its norm taken of exactly these numbers, and c_i g_i summed later.
- *gram*: convolutions whose stored gradients are too large or too slow: the norm from pixel Gram
  matrices with a rounding bound, then one weighted weight gradient.

The factor of example i is c_i = mask_i · min(1, C / n_i) with C = hyper[0] and n_i an upper bound of
its norm; an example that holds anything not finite counts exactly zero (Myelin's docs/privacy.md).
Results have the stored layouts: convolution weights flat in the order height, width, in, out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from tvm import relax
from tvm.relax import op

from myelin.kernels import conv as conv_kernels
from myelin.kernels import linear as linear_kernels
from myelin.kernels.conv import Conv
from myelin.training import HYPER, Layer, Recipe, kernel, layers, rebuild

Method = Literal["product", "stored", "gram"]

TERMS = 8
"""Norm terms that one kernel adds up; more are added before (a kernel has at most 14 arguments)."""

_UNIT = 2.0**-24


def clip_and_sum(module: Any, recipe: Recipe) -> Any:
    """Return the clipped sum for each parameter; `mask` and `hyper` become arguments."""
    function = module["main"]
    found = layers(function, recipe)
    batch = int(function.params[0].ty.shape[0])
    mask = relax.Var("mask", relax.TensorType((batch,), "float32"))
    hyper = relax.Var("hyper", relax.TensorType((HYPER,), "float32"))
    inputs: dict[Any, Any] = {layer.x: layer.x for layer in found}

    def rule(builder: Any, var: Any, value: Any) -> Any:
        new = builder.emit(value, var.name)
        if var in inputs:
            inputs[var] = new
        return new

    def finish(builder: Any, result: Any) -> Any:
        adjoints = list(result.fields)
        pairs = [(layer, inputs[layer.x], d) for layer, d in zip(found, adjoints, strict=True)]
        return _sums(builder, pairs, mask, hyper, recipe)

    return relax.transform.DeadCodeElimination()(
        rebuild(function, [*function.params, mask, hyper], rule, finish)
    )


PASSES = (("clip-and-sum", clip_and_sum),)


def method(layer: Layer, recipe: Recipe) -> Method:
    """How the norm of a layer's weight gradient is taken."""
    shape = _shape(layer.x)
    if layer.kind == "linear" and len(shape) == 2:
        return "product"
    if layer.kind == "scale":
        return "stored"
    conv = convolution(layer)
    too_large = 4 * conv.n * conv.weights > recipe.stored_bytes
    return "gram" if too_large else conv_kernels.choose(conv)


def methods(module: Any, recipe: Recipe) -> list[tuple[str, str]]:
    """(layer, norm method) for every layer, of the module that `Model.relax` emits."""
    return [
        (layer.name, method(layer, recipe) if recipe.clipping == "per-example" else "none")
        for layer in layers(module["main"], recipe)
    ]


def additions(module: Any, recipe: Recipe) -> int:
    """Longest chain of float32 roundings between examples' clipped gradients and their sum."""
    longest = 1
    for layer in layers(module["main"], recipe):
        n = _shape(layer.x)[0]
        how = method(layer, recipe)
        if how == "product":
            longest = max(longest, linear_kernels.weighted_gradient_additions(n))
        if how == "gram" or (recipe.clipping == "none" and layer.kind != "scale"):
            if how != "product":
                conv = convolution(layer)
                longest = max(longest, conv_kernels.weighted_gradient_additions(conv))
    return longest


def convolution(layer: Layer) -> Conv:
    """A conv2d layer, or a linear layer on lists of rows seen as a 1 × 1 convolution."""
    n, *rest = _shape(layer.x)
    if layer.kind == "linear":
        rows, size = rest
        return Conv(n=n, h=rows, w=1, ci=size, co=_shape(layer.call)[-1], kh=1, kw=1)
    co, _, kh, kw = _shape(layer.call.args[1])
    ci, h, w = rest
    stride = tuple(int(s) for s in layer.call.attrs.strides)
    padding = tuple(int(p) for p in layer.call.attrs.padding)
    return Conv(n=n, h=h, w=w, ci=ci, co=co, kh=kh, kw=kw, stride=stride, padding=padding)


def fields(conv: Conv) -> list[int]:
    """A convolution as the integer attributes of a kernel call; `Conv` again by `from_fields`."""
    return [conv.n, conv.h, conv.w, conv.ci, conv.co, conv.kh, conv.kw, *conv.stride, *conv.padding]


def from_fields(numbers: Sequence[int]) -> Conv:
    """The inverse of `fields`."""
    n, h, w, ci, co, kh, kw, *rest = numbers
    stride, padding = (rest[0], rest[1]), (rest[2], rest[3], rest[4], rest[5])
    return Conv(n=n, h=h, w=w, ci=ci, co=co, kh=kh, kw=kw, stride=stride, padding=padding)


def fixed(value: float) -> int:
    """A small positive float as an integer number of 2⁻⁵², rounded up: attributes are integers."""
    return math.ceil(value * 2**52)


class _Norms:
    """Squared norms gathered layer by layer: terms, and Gram pairs with their bounds."""

    def __init__(self) -> None:
        self.terms: list[tuple[Any, float]] = []
        self.grams: list[tuple[Any, Any, float]] = []

    def factors(self, builder: Any, mask: Any, hyper: Any, batch: int) -> Any:
        """c[batch]; terms beyond what one kernel takes are added up first, bounds growing with it."""
        terms, grams = list(self.terms), list(self.grams)
        while len(terms) > TERMS - 2 * bool(grams):
            (a, bound_a), (b, bound_b), *terms = terms
            terms.append((builder.emit(op.add(a, b)), max(bound_a, bound_b) + 2 * _UNIT))
        while len(grams) > 1:
            (s, t, kappa), (s2, t2, kappa2), *grams = grams
            both = max(kappa, kappa2) + 4 * _UNIT
            grams.append((builder.emit(op.add(s, s2)), builder.emit(op.add(t, t2)), both))
        arguments = [s for s, _ in terms] + [v for s, t, _ in grams for v in (s, t)]
        bounds = [fixed(b) for _, b in terms] + [fixed(k) for _, _, k in grams]
        call = kernel(
            "clip-factors",
            [mask, hyper, *arguments],
            [(batch,)],
            [len(terms), len(grams), *bounds],
        )
        return builder.emit(call, "c")


def _sums(
    builder: Any, pairs: Sequence[tuple[Layer, Any, Any]], mask: Any, hyper: Any, recipe: Recipe
) -> list[Any]:
    """Emit norms, factors and sums; one sum a parameter, in the order of `recipe.names`."""
    batch = _shape(mask)[0]
    norms = _Norms()
    later: dict[int, Any] = {}  # parameter → function of c that emits its sum
    for layer, x, d in pairs:
        _gather(builder, layer, x, d, norms, later, recipe)
    c = mask if recipe.clipping == "none" else norms.factors(builder, mask, hyper, batch)
    return [builder.emit(later[i](c), f"g_{name}") for i, name in enumerate(recipe.names)]


def _gather(
    builder: Any,
    layer: Layer,
    x: Any,
    d: Any,
    norms: _Norms,
    later: dict[int, Any],
    recipe: Recipe,
) -> None:
    batch = _shape(x)[0]
    how = method(layer, recipe)
    if layer.bias is not None and how != "product":
        later[layer.bias] = _stored_sum(builder, d, _bias_size(layer, d), norms)
    if layer.kind == "scale":
        scaled = builder.emit(op.multiply(d, x))
        later[layer.weight] = _stored_sum(builder, scaled, _bias_size(layer, d), norms)
        return
    if how == "product":
        k, n = _shape(x)[1], _shape(d)[1]
        norm = kernel("linear-norm", [x, d], [(batch,)], [int(layer.bias is not None)])
        bound = linear_kernels.squared_norm_inflation(k, n)
        norms.terms.append((builder.emit(norm), bound))
        later[layer.weight] = lambda c: kernel("linear-gradient", [x, d, c], [(k, n)])
        if layer.bias is not None:
            later[layer.bias] = lambda c: kernel("bias-gradient", [d, c], [(n,)])
        return
    conv = convolution(layer)
    numbers = fields(conv)
    if recipe.clipping == "per-example" and how == "stored":
        results = [(batch, conv.weights), (batch,)]
        pair = builder.emit(kernel("conv-stored", [x, d], results, numbers))
        g, s = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        norms.terms.append((s, conv_kernels.stored_norm_inflation(conv)))
        later[layer.weight] = lambda c: kernel("weighted-sum", [g, c], [(conv.weights,)])
        return
    if recipe.clipping == "per-example":
        pair = builder.emit(kernel("conv-gram", [x, d], [(batch,)] * 2, numbers))
        s, t = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
        norms.grams.append((s, t, conv_kernels.gram_kappa(conv)))
    later[layer.weight] = lambda c: kernel("conv-gradient", [x, d, c], [(conv.weights,)], numbers)


def _stored_sum(builder: Any, d: Any, size: int, norms: _Norms) -> Any:
    """Sums of d over all but the last `size` numbers of an example: stored, with their norm."""
    batch, *rest = _shape(d)
    pixels = math.prod(rest) // size
    results = [(batch, size), (batch,)]
    pair = builder.emit(kernel("bias-stored", [d], results, [batch, pixels, size]))
    g, s = (builder.emit(relax.TupleGetItem(pair, i)) for i in range(2))
    bound = conv_kernels.stored_norm_inflation(
        Conv(n=batch, h=pixels, w=1, ci=1, co=size, kh=1, kw=1)
    )
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
