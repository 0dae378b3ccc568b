"""Operators and their kernels: `TEMPLATES` is the one place where an operator's kernel is chosen.

Each function emits the calls of one operator through a `Lowering`, or records a product that waits
for its epilogue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from myelin import clipping, cost, planner
from myelin.errors import ModelRefused
from myelin.graph import operator
from myelin.kernels import clipping as clip_kernels
from myelin.kernels import conv as conv_kernels
from myelin.kernels import layout, loss, normalise, pool, reduce
from myelin.kernels.pool import Pool
from myelin.lowering import (
    Activations,
    Buffer,
    Lowering,
    Shape,
    Templates,
    Value,
    dims,
    same_order,
    stored_axis,
    stored_shape,
    template_name,
)


def _matmul(low: Lowering, var: Any, call: Any) -> None:
    a, b = call.args
    rows = dims(a)
    transposed = low.values.get(b)
    if isinstance(transposed, _Transposed):
        # The adjoint of a product: d · wᵀ, with w where it is stored.
        n, k = transposed.value.stored[1], transposed.value.stored[0]
        m = math.prod(rows[:-1])
        low.product(
            var,
            (*rows[:-1], k),
            "linear_backward",
            ("linear_backward", m, k, n),
            lambda finish: low.linear.backward_data(low.cpu, m, k, n, finish=finish),
            [low.value(a), transposed.value],
            work=cost.matrix(low.cpu, m, n, k, low.precision, scalar=True),
        )
        return
    x, w, bias = low.value(a), low.value(b), low.bias(var)
    m, (k, n) = math.prod(rows[:-1]), w.stored
    low.product(
        var,
        (*rows[:-1], n),
        "linear",
        ("linear", m, k, n, bias is None),
        lambda finish: low.linear.matmul(low.cpu, m, k, n, bias=bias is not None, finish=finish),
        [x, w] if bias is None else [x, w, bias],
        work=cost.matrix(low.cpu, m, k, n, low.precision),
    )


@dataclass(frozen=True)
class _Transposed:
    value: Value


def _permute_dims(low: Lowering, var: Any, call: Any) -> None:
    low.values[var] = _Transposed(low.value(call.args[0]))  # type: ignore[assignment]


def _conv2d(low: Lowering, var: Any, call: Any) -> None:
    conv = clipping.conv2d(dims(call.args[0]), dims(call.args[1]), call.attrs)
    bias = low.bias(var)
    x = Activations(low.value(call.args[0]), conv)
    w = low.value(call.args[1])
    how = planner.algorithm(low.cpu, conv, "forward", low.precision)
    templates = planner.CONV[how]
    low.product(
        var,
        (conv.n, conv.oh, conv.ow, conv.co),
        "conv",
        ("conv", conv, how, bias is None),
        lambda finish: templates.forward(low.cpu, conv, bias=bias is not None, finish=finish),
        [x, w] if bias is None else [x, w, bias],
        work=cost.forward(low.cpu, conv, how),
    )


def _conv2d_transpose(low: Lowering, var: Any, call: Any) -> None:
    # The derivative of a convolution with respect to its input; var has the input's shape.
    conv = clipping.conv2d(dims(var), dims(call.args[1]), call.attrs)
    d, w = low.value(call.args[0]), low.value(call.args[1])
    how = planner.algorithm(low.cpu, conv, "backward_data", low.precision)
    templates = planner.CONV[how]
    low.product(
        var,
        (conv.n, conv.h, conv.w, conv.ci),
        "conv_backward",
        ("conv_backward", conv, how),
        lambda finish: templates.backward_data(low.cpu, conv, finish=finish),
        [d, w],
        work=cost.backward_data(low.cpu, conv, how),
    )


def _reshape(low: Lowering, var: Any, call: Any) -> None:
    x = low.value(call.args[0])
    old, new = dims(call.args[0]), dims(var)
    if old == new:
        low.values[var] = x
        return
    if len(old) == 4 and not same_order(old):
        x = low.channels_first(x, old)
    if len(new) == 4 and not same_order(new):
        low.values[var] = low.channels_last(x, new)
        return
    low.values[var] = Value(x.buffer, stored_shape(new))


def _concat(low: Lowering, var: Any, call: Any) -> None:
    parts = [low.value(part) for part in call.args[0].fields]
    axis = stored_axis(int(call.attrs.axis), len(dims(var)))
    outer = math.prod(parts[0].stored[:axis])
    widths = tuple(math.prod(part.stored[axis:]) for part in parts)
    out = low.new(var, stored_shape(dims(var)))
    build = lambda: layout.concatenate(low.cpu, outer, widths)  # noqa: E731
    low.emit("concat", ("concat", outer, widths), build, parts, [out])
    low.values[var] = out


def _split(low: Lowering, var: Any, call: Any) -> None:
    x = low.value(call.args[0])
    rank = len(dims(call.args[0]))
    axis = stored_axis(int(call.attrs.axis) % rank, rank)
    outer, width, start = math.prod(x.stored[:axis]), math.prod(x.stored[axis:]), 0
    parts = []
    for ty in var.ty.fields:
        part = low.temporary(stored_shape(tuple(int(d) for d in ty.shape)))
        size = math.prod(part.stored[axis:])
        key = ("cut", outer, width, start, size)
        build = lambda key=key: layout.cut(low.cpu, *key[1:])  # noqa: E731
        low.emit("cut", key, build, [x], [part])
        parts.append(part)
        start += size
    low.values[var] = tuple(parts)


def _pool(low: Lowering, var: Any, call: Any) -> None:
    x = low.value(call.args[0])
    window = _window(x.stored, call)
    out = low.new(var, (window.n, window.oh, window.ow, window.c))
    template = pool.max_forward if "max" in operator(call) else pool.average_forward
    build = lambda: template(low.cpu, window)  # noqa: E731
    work = cost.pooling(low.cpu, window, backward=False)
    low.emit("pool", (template.__name__, window), build, [x], [out], work=work)
    low.pooled[id(x.buffer), window] = low.values[var] = out


def _pool_adjoint(low: Lowering, var: Any, call: Any) -> None:
    d = low.value(call.args[0])
    window = _window(stored_shape(dims(var)), call)
    largest = "max" in operator(call)
    template = pool.max_backward if largest else pool.average_backward
    inputs = [d]
    if largest:
        x = low.value(call.args[1])
        inputs = [x, low.pooled[id(x.buffer), window], d]
    low.product(
        var,
        (window.n, window.h, window.w, window.c),
        "pool_backward",
        (template.__name__, window),
        lambda finish: template(low.cpu, window, finish=finish),
        inputs,
        work=cost.pooling(low.cpu, window, backward=largest),
    )


def _window(stored: Shape, call: Any) -> Pool:
    """The pooling of an image as stored."""
    n, h, w, c = stored
    kh, kw = (int(k) for k in call.attrs.pool_size)
    stride = (int(call.attrs.strides[0]), int(call.attrs.strides[1]))
    top, left, bottom, right = (int(p) for p in call.attrs.padding)
    return Pool(
        n=n,
        h=h,
        w=w,
        c=c,
        kh=kh,
        kw=kw,
        stride=stride,
        padding=(top, left, bottom, right),
        count_padding="max" in operator(call) or bool(call.attrs.count_include_pad),
    )


def _softmax(low: Lowering, var: Any, call: Any) -> None:
    x = low.value(call.args[0])
    rows, columns = math.prod(x.stored[:-1]), x.stored[-1]
    out = low.new(var, x.stored)
    build = lambda: reduce.softmax(low.cpu, rows, columns)  # noqa: E731
    low.emit("softmax", ("softmax", rows, columns), build, [x], [out])
    low.values[var] = out


def _sum(low: Lowering, var: Any, call: Any) -> None:
    """Sums over the last axis, which stays with extent 1."""
    x = low.value(call.args[0])
    rank = len(x.stored)
    axes = [int(axis) % rank for axis in call.attrs.axis or range(rank)]
    if axes != [rank - 1] or rank == 4:
        raise ModelRefused(f"no kernel for a sum over the axes {axes} of rank {rank}")
    rows, columns = math.prod(x.stored[:-1]), x.stored[-1]
    out = low.new(var, (*x.stored[:-1], 1))
    build = lambda: reduce.sum_rows(low.cpu, rows, columns)  # noqa: E731
    low.emit("sum", ("sum", rows, columns), build, [x], [out])
    low.values[var] = out


def _normalise(low: Lowering, var: Any, call: Any) -> None:
    """(x - mean) / √(variance + ε) over groups of channels, or over the last axes."""
    x = low.value(call.args[0])
    epsilon = float(call.attrs.epsilon)
    groups = int(getattr(call.attrs, "num_groups", 0))
    view = _groups(x.stored, groups, min(int(axis) % len(x.stored) for axis in call.attrs.axes))
    out, stats = low.new(var, x.stored), low.temporary((view[0], 2, view[2] * view[3]))
    build = lambda: normalise.forward(low.cpu, *view, epsilon=epsilon)  # noqa: E731
    work = cost.statistics(low.cpu, view[0] * view[1], view[2] * view[3], 28)
    low.emit("normalise", ("normalise", view, epsilon), build, [x], [stats, out], work=work)
    low.spreads[id(out.buffer)] = (view, stats)
    low.values[var] = out


def _normalise_adjoint(low: Lowering, var: Any, call: Any) -> None:
    """The derivative of a normalisation, from its result and what its kernel left behind."""
    y, d = (low.value(v) for v in _operands(call))
    view, stats = low.spreads[id(y.buffer)]
    out = low.new(var, y.stored)
    build = lambda: normalise.backward(low.cpu, *view)  # noqa: E731
    key = ("normalise_adjoint", view)
    work = cost.statistics(low.cpu, view[0] * view[1], view[2] * view[3], 27)
    low.emit("normalise_adjoint", key, build, [y, d, stats], [out], work=work)
    low.values[var] = out


def _groups(stored: Shape, groups: int, first: int) -> tuple[int, int, int, int]:
    """A shape as [outer, pixels, groups, channels of a group]; statistics go over axes 1 and 3."""
    if groups:
        n, h, w, c = stored
        return (n, h * w, groups, c // groups)
    size = math.prod(stored[first:])
    # Its order does not matter within one group: rows of a few vectors.
    row = max(width for width in range(1, 65) if size % width == 0)
    return (math.prod(stored[:first]), size // row, 1, row)


def _scale_stored(low: Lowering, var: Any, call: Any) -> None:
    n, pixels, size = _attributes(call)
    x, d = (low.value(v) for v in _operands(call))
    outs = _pair(low, (n, size), (n,))
    build = lambda: normalise.stored_scale(low.cpu, n, pixels, size)  # noqa: E731
    work = cost.statistics(low.cpu, n * pixels, size, 18)
    low.emit("scale_stored", ("scale_stored", n, pixels, size), build, [x, d], outs, work=work)
    low.values[var] = outs


def _adjoint(low: Lowering, var: Any, call: Any) -> None:
    """The loss's derivative at the logits."""
    name = template_name(call)
    logits, y = (low.value(v) for v in _operands(call))
    n, outputs = logits.stored
    template = {
        "myelin.cross-entropy-adjoint": loss.cross_entropy_adjoint,
        "myelin.binary-cross-entropy-adjoint": loss.binary_cross_entropy_adjoint,
        "myelin.mean-squared-error-adjoint": loss.mean_squared_error_adjoint,
    }[name]
    out = low.new(var, logits.stored)
    build = lambda: template(low.cpu, n, outputs)  # noqa: E731
    low.emit("loss", (name, n, outputs), build, [logits, y], [out])
    low.values[var] = out


def _linear_norm(low: Lowering, var: Any, call: Any) -> None:
    x, d = (low.value(v) for v in _operands(call))
    (bias,) = _attributes(call)
    (m, k), n = x.stored, d.stored[1]
    out = low.new(var, (m,))
    build = lambda: low.linear.squared_norm(low.cpu, m, k, n, bias=bool(bias))  # noqa: E731
    low.emit("linear_norm", ("linear_norm", m, k, n, bias), build, [x, d], [out])
    low.values[var] = out


def _linear_gradient(low: Lowering, var: Any, call: Any) -> None:
    x, d, c = (low.value(v) for v in _operands(call))
    (m, k), n = x.stored, d.stored[1]
    out = low.new(var, (k, n))
    build = lambda: low.linear.weighted_gradient(low.cpu, m, k, n)  # noqa: E731
    low.emit(
        "linear_gradient",
        ("linear_gradient", m, k, n),
        build,
        [x, d, c],
        [out],
        work=cost.matrix(low.cpu, k, m, n, low.precision, chained=True),
    )
    low.values[var] = out


def _bias_gradient(low: Lowering, var: Any, call: Any) -> None:
    d, c = (low.value(v) for v in _operands(call))
    m, n = d.stored
    out = low.new(var, (n,))
    build = lambda: low.linear.weighted_bias(low.cpu, m, n)  # noqa: E731
    low.emit("bias_gradient", ("bias_gradient", m, n), build, [d, c], [out])
    low.values[var] = out


def _conv_stored(low: Lowering, var: Any, call: Any) -> None:
    gradient = clipping.from_attributes(_attributes(call))
    conv = gradient.conv
    x, d = (low.value(v) for v in _operands(call))
    outs = _pair(low, (conv.n, conv.weights), (conv.n,))
    build = lambda: gradient.templates.stored_gradient(low.cpu, conv)  # noqa: E731
    low.emit(
        "conv_stored",
        ("conv_stored", gradient),
        build,
        [Activations(x, conv), d],
        outs,
        work=cost.stored_gradient(low.cpu, conv, gradient.algorithm),
    )
    low.values[var] = outs


def _conv_norm(low: Lowering, var: Any, call: Any) -> None:
    gradient = clipping.from_attributes(_attributes(call))
    conv = gradient.conv
    x, d = (low.value(v) for v in _operands(call))
    out = low.new(var, (conv.n,))
    low.emit(
        "conv_norm",
        ("conv_norm", gradient),
        lambda: gradient.templates.squared_norm(low.cpu, conv),
        [Activations(x, conv), d],
        [out],
        work=cost.squared_norm(low.cpu, conv, gradient.algorithm),
    )
    low.values[var] = out


def _conv_gram(low: Lowering, var: Any, call: Any) -> None:
    gradient = clipping.from_attributes(_attributes(call))
    conv = gradient.conv
    x, d = (low.value(v) for v in _operands(call))
    outs = _pair(low, (conv.n,), (conv.n,))
    build = lambda: conv_kernels.gram_norm(low.cpu, conv, gradient.error)  # noqa: E731
    low.emit(
        "conv_gram",
        ("conv_gram", gradient),
        build,
        [Activations(x, conv), d],
        outs,
        work=cost.gram(low.cpu, conv),
    )
    low.values[var] = outs


def _conv_gradient(low: Lowering, var: Any, call: Any) -> None:
    """A sum over examples: weighted by c, or of the whole batch where there is none."""
    gradient = clipping.from_attributes(_attributes(call))
    conv = gradient.conv
    x, d, *c = (low.value(v) for v in _operands(call))
    out = low.new(var, (conv.weights,))
    label, product = (
        ("conv_gradient", "weighted_gradient") if c else ("conv_batch_gradient", "batch_gradient")
    )
    build = lambda: getattr(gradient.templates, product)(low.cpu, conv)  # noqa: E731
    work = getattr(cost, product)(low.cpu, conv, gradient.algorithm)
    low.emit(label, (label, gradient), build, [Activations(x, conv), d, *c], [out], work=work)
    low.values[var] = out


def _bias_stored(low: Lowering, var: Any, call: Any) -> None:
    n, pixels, size = _attributes(call)
    (d,) = (low.value(v) for v in _operands(call))
    outs = _pair(low, (n, size), (n,))
    build = lambda: conv_kernels.stored_bias(low.cpu, n, pixels, size)  # noqa: E731
    low.emit("bias_stored", ("bias_stored", n, pixels, size), build, [d], outs)
    low.values[var] = outs


def _weighted_sum(low: Lowering, var: Any, call: Any) -> None:
    g, c = (low.value(v) for v in _operands(call))
    n, m = g.stored
    out = low.new(var, (m,))
    build = lambda: clip_kernels.weighted_sum(low.cpu, n, m)  # noqa: E731
    work = replace(cost.elementwise(low.cpu, n * m, 2), cold=g.buffer.bytes)
    low.emit("weighted_sum", ("weighted_sum", n, m), build, [g, c], [out], work=work)
    low.values[var] = out


def _norms(low: Lowering, var: Any, call: Any) -> None:
    """Clip factors, or the sum of some of the norms before."""
    terms, grams, *limits = _attributes(call)
    name = template_name(call)
    template = clip_kernels.clip_factors if name == "myelin.clip-factors" else clip_kernels.norm_sum
    inputs = [low.value(v) for v in _operands(call)]
    (n,) = dims(var)
    bounds_ = [clipping.real(limit) for limit in limits]
    out = low.new(var, (n,))
    inflation, kappa = bounds_[:terms], bounds_[terms:]
    build = lambda: template(low.cpu, n, terms, grams, inflation=inflation, kappa=kappa)  # noqa: E731
    low.emit("norms", (name, n, terms, grams, *limits), build, inputs, [out])
    low.values[var] = out


TEMPLATES: Templates = {
    "relax.matmul": _matmul,
    "relax.permute_dims": _permute_dims,
    "relax.nn.conv2d": _conv2d,
    "relax.nn.conv2d_transpose": _conv2d_transpose,
    "relax.reshape": _reshape,
    "relax.concat": _concat,
    "relax.split": _split,
    "relax.nn.max_pool2d": _pool,
    "relax.nn.avg_pool2d": _pool,
    "relax.grad.max_pool2d_backward": _pool_adjoint,
    "relax.grad.avg_pool2d_backward": _pool_adjoint,
    "relax.sum": _sum,
    "relax.nn.softmax": _softmax,
    "relax.nn.group_norm": _normalise,
    "relax.nn.layer_norm": _normalise,
    "myelin.normalise-adjoint": _normalise_adjoint,
    "myelin.cross-entropy-adjoint": _adjoint,
    "myelin.binary-cross-entropy-adjoint": _adjoint,
    "myelin.mean-squared-error-adjoint": _adjoint,
    "myelin.linear-norm": _linear_norm,
    "myelin.linear-gradient": _linear_gradient,
    "myelin.bias-gradient": _bias_gradient,
    "myelin.conv-stored": _conv_stored,
    "myelin.conv-norm": _conv_norm,
    "myelin.conv-gram": _conv_gram,
    "myelin.conv-gradient": _conv_gradient,
    "myelin.conv-batch-gradient": _conv_gradient,
    "myelin.bias-stored": _bias_stored,
    "myelin.scale-stored": _scale_stored,
    "myelin.weighted-sum": _weighted_sum,
    "myelin.norm-sum": _norms,
    "myelin.clip-factors": _norms,
}
"""Where an operator's kernel is chosen: operator → the function that emits its calls."""


def _pair(low: Lowering, *shapes: Shape) -> tuple[Value, ...]:
    return tuple(Value(Buffer(bytes=4 * math.prod(shape)), shape) for shape in shapes)


def _operands(call: Any) -> list[Any]:
    return list(call.args[1].fields)[:-1]


def _attributes(call: Any) -> list[int]:
    return [int(value) for value in call.args[1].fields[-1].values]
