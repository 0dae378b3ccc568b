"""Models: one small closed graph, whatever they were written in.

`load` reads a `torch.nn.Module`, an ONNX file, layers of `myelin.nn` or a Relax module and returns
a `Model`: operators of the table below on named parameters, channels first. `Model.document` writes
the graph without weights as canonical JSON, from which anybody can rebuild the same image with
neither torch nor ONNX. `Model.relax` emits the graph for a batch size, as the compiler's input.

Shapes leave out the batch: every value holds one such tensor an example, and no operator here can
let one example see another. That is what makes per-example gradients, and so privacy, meaningful.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from myelin.errors import ModelRefused, UnsupportedLayer

Shape = tuple[int, ...]
Array = npt.NDArray[np.float32]

TYPE = "myelin/model/1"
INPUT = "%in"
"""Name of the input; the output of node i is called "%i", anything else is a parameter."""

LIMITS = {"bytes": 1 << 20, "nodes": 4096, "elements": 1 << 28}


@dataclass(frozen=True, kw_only=True)
class Node:
    """One operator: its name in `OPERATORS`, the names of its operands, its attributes."""

    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A graph and, unless it came from a document, the values of its parameters.

    `input` is the shape of one example, `shapes` and `parameters` map a parameter's name to its
    shape and its float32 value in PyTorch's axis order (linear [out, in], conv [out, in, kh, kw]).
    """

    input: Shape
    nodes: tuple[Node, ...]
    shapes: Mapping[str, Shape]
    parameters: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the whole graph: operators, attributes, shapes, names, one rank-1 output.

        Raises ModelRefused.
        """
        _check_shape("the input", self.input)
        if not 0 < len(self.nodes) <= LIMITS["nodes"]:
            raise ModelRefused(
                f"a model has 1 to {LIMITS['nodes']} operators, not {len(self.nodes)}"
            )
        for name, shape in self.shapes.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,127}", name):
                raise ModelRefused(f"{name!r} is no parameter name: letters, digits, '_' and '.'")
            _check_shape(f"parameter {name}", shape)
        values = self.values()
        unused = set(self.shapes) - {name for node in self.nodes for name in node.inputs}
        if unused:
            raise ModelRefused(f"parameter {min(unused)} is used by no operator: remove it")
        output = values[f"%{len(self.nodes) - 1}"]
        if len(output) != 1:
            raise ModelRefused(
                f"the output of an example has shape {output}, but must be a row of numbers: "
                "end with a flatten"
            )
        for name, value in self.parameters.items():
            if value.shape != self.shapes.get(name) or value.dtype != np.float32:
                raise ModelRefused(
                    f"parameter {name} is {value.dtype}{list(value.shape)}, but the graph needs "
                    f"float32{list(self.shapes.get(name, ()))}"
                )

    @property
    def outputs(self) -> int:
        """Numbers in the output of one example."""
        return self.values()[f"%{len(self.nodes) - 1}"][0]

    def values(self) -> dict[str, Shape]:
        """Shape of every value, the input and the parameters included."""
        shapes: dict[str, Shape] = {INPUT: tuple(self.input), **self.shapes}
        for i, node in enumerate(self.nodes):
            shapes[f"%{i}"] = _infer(node, [_known(shapes, name, node) for name in node.inputs])
        return shapes

    def layer(self, node: Node) -> str:
        """What to call a node: the name of the layer whose parameters it uses, or its operator."""
        weights = [name for name in node.inputs if name in self.shapes]
        return weights[0].rpartition(".")[0] or weights[0] if weights else node.op

    def document(self) -> bytes:
        """The graph without weights as canonical JSON: sorted keys, no spaces, ASCII."""
        return _canonical(
            {
                "type": TYPE,
                "input": list(self.input),
                "parameters": [{"name": n, "shape": list(s)} for n, s in self.shapes.items()],
                "nodes": [
                    {
                        "op": node.op,
                        "inputs": list(node.inputs),
                        "attributes": {
                            key: list(value) if isinstance(value, tuple) else value
                            for key, value in node.attributes.items()
                        },
                    }
                    for node in self.nodes
                ],
            }
        )

    @classmethod
    def from_document(cls, document: bytes) -> Model:
        """Read what `document` wrote; raises ModelRefused for anything else, byte for byte."""
        if len(document) > LIMITS["bytes"]:
            raise ModelRefused(f"the document has {len(document)} bytes, at most {LIMITS['bytes']}")
        try:
            read = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ModelRefused(f"the document is no JSON: {error}") from None
        top = _fields(read, {"type": str, "input": list, "parameters": list, "nodes": list}, "top")
        if top["type"] != TYPE:
            raise ModelRefused(f"the document is of type {top['type']!r}, not {TYPE!r}")
        parameters = [
            _fields(entry, {"name": str, "shape": list}, "parameters")
            for entry in top["parameters"]
        ]
        nodes = [
            _fields(entry, {"op": str, "inputs": list, "attributes": dict}, "nodes")
            for entry in top["nodes"]
        ]
        if any(not isinstance(name, str) for node in nodes for name in node["inputs"]):
            raise ModelRefused("the inputs of a node are names")
        model = cls(
            input=tuple(top["input"]),
            nodes=tuple(
                Node(
                    op=node["op"],
                    inputs=tuple(node["inputs"]),
                    attributes={
                        key: tuple(value) if isinstance(value, list) else value
                        for key, value in node["attributes"].items()
                    },
                )
                for node in nodes
            ),
            shapes={entry["name"]: tuple(entry["shape"]) for entry in parameters},
        )
        if model.document() != document:
            raise ModelRefused(
                "the document is not in canonical form: write it with Model.document"
            )
        return model

    def relax(self, batch: int) -> Any:
        """The graph as a Relax module with one function `main(x, parameters…) -> output`.

        Values are [batch, …] float32, images channels first; a linear layer's weight is the
        variable [in, out], as it is stored, every other parameter has its own axis order. Layer and
        group norm are a normalisation by `relax.nn.*_norm` with unit scale, then scale and shift as
        operators of their own, so that everything that touches a parameter is linear in it.
        """
        import tvm
        from tvm import relax

        builder = relax.BlockBuilder()
        values = self.values()
        env = {INPUT: relax.Var("x", _tensor((batch, *self.input)))}
        for name, shape in self.shapes.items():
            stored = shape[::-1] if name in self._linear_weights() else shape
            env[name] = relax.Var(f"p_{name}", _tensor(stored))
        with builder.function("main", list(env.values())):
            with builder.dataflow():
                for i, node in enumerate(self.nodes):
                    operands = [env[name] for name in node.inputs]
                    target = (batch, *values[f"%{i}"])
                    env[f"%{i}"] = OPERATORS[node.op].emit(
                        builder, node.attributes, operands, target
                    )
                output = builder.emit_output(env[f"%{len(self.nodes) - 1}"])
            builder.emit_func_output(output)
        return cast(tvm.IRModule, builder.get())

    def layout(self, name: str) -> tuple[int, ...]:
        """Axis order in which a parameter is stored: `stored = value.transpose(layout)`."""
        users = {node.op for node in self.nodes if name in node.inputs[1:2]}
        rank = len(self.shapes[name])
        if "linear" in users:
            return (1, 0)
        if "conv2d" in users:
            return (2, 3, 1, 0)
        if "layer_norm" in {node.op for node in self.nodes if name in node.inputs} and rank == 3:
            return (1, 2, 0)
        return tuple(range(rank))

    def _linear_weights(self) -> set[str]:
        return {node.inputs[1] for node in self.nodes if node.op == "linear"}


class Builder:
    """Collects nodes and parameters of a model, telling shapes as it goes."""

    def __init__(self, shape: Shape) -> None:
        """`shape` of one example."""
        self.input = tuple(shape)
        self.nodes: list[Node] = []
        self.parameters: dict[str, Array] = {}
        self._shapes: dict[str, Shape] = {INPUT: self.input}

    def shape(self, name: str) -> Shape:
        """Shape of a value or parameter."""
        return self._shapes[name]

    def parameter(self, name: str, value: npt.NDArray[Any]) -> str:
        """Add a parameter and return its name."""
        if name in self.parameters:
            raise ModelRefused(f"two parameters are called {name}")
        self.parameters[name] = np.ascontiguousarray(value, np.float32)
        self._shapes[name] = value.shape
        return name

    def append(self, node: Node) -> str:
        """Add an operator and return the name of its output."""
        shape = _infer(node, [_known(self._shapes, name, node) for name in node.inputs])
        name = f"%{len(self.nodes)}"
        self.nodes.append(node)
        self._shapes[name] = shape
        return name

    def finish(self) -> Model:
        """The model; the last node is its output."""
        return Model(
            input=self.input,
            nodes=tuple(self.nodes),
            shapes={name: value.shape for name, value in self.parameters.items()},
            parameters=dict(self.parameters),
        )


@dataclass(frozen=True)
class Operator:
    """An operator: attribute checks, shape rule, and how it is said in Relax.

    `infer(attributes, shapes)` raises ValueError saying what does not fit.
    """

    attributes: Mapping[str, Callable[[Any], bool]]
    infer: Callable[[Mapping[str, Any], Sequence[Shape]], Shape]
    emit: Callable[[Any, Mapping[str, Any], Sequence[Any], Shape], Any]


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _same(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    _need(len(shapes) == 1, "it takes one operand")
    return shapes[0]


def _infer_linear(_: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    _need(len(shapes) in (2, 3), "it takes x, weight and perhaps bias")
    x, weight = shapes[:2]
    _need(len(x) in (1, 2), f"x of shape {x} is neither a row nor a list of rows")
    _need(len(weight) == 2 and weight[1] == x[-1], f"weight {weight} does not fit x {x}")
    _need(shapes[2:] in ([], [weight[:1]]), f"bias {shapes[2:]} does not fit weight {weight}")
    return (*x[:-1], weight[0])


def _infer_conv2d(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    _need(len(shapes) in (2, 3), "it takes x, weight and perhaps bias")
    x, weight = shapes[:2]
    _need(len(x) == 3, f"x of shape {x} is no image (channels, height, width)")
    _need(len(weight) == 4 and weight[1] == x[0], f"weight {weight} does not fit x {x}")
    _need(shapes[2:] in ([], [weight[:1]]), f"bias {shapes[2:]} does not fit weight {weight}")
    return (weight[0], *_slide(x[1:], weight[2:], attributes))


def _infer_pool(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    _need(len(shapes) == 1 and len(shapes[0]) == 3, "it takes one image (channels, height, width)")
    kernel, padding = attributes["kernel"], attributes["padding"]
    _need(
        all(p <= kernel[i % 2] // 2 for i, p in enumerate(padding)),
        f"padding {padding} is more than half the kernel {kernel}",
    )
    return (shapes[0][0], *_slide(shapes[0][1:], kernel, attributes))


def _slide(size: Shape, kernel: Shape, attributes: Mapping[str, Any]) -> Shape:
    stride, (top, left, bottom, right) = attributes["stride"], attributes["padding"]
    room = (size[0] + top + bottom - kernel[0], size[1] + left + right - kernel[1])
    _need(min(room) >= 0, f"the kernel {kernel} is larger than the padded image {size}")
    return (room[0] // stride[0] + 1, room[1] // stride[1] + 1)


def _infer_global(_: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    _need(len(shapes) == 1 and len(shapes[0]) == 3, "it takes one image (channels, height, width)")
    return (shapes[0][0], 1, 1)


def _infer_group_norm(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    x = shapes[0]
    _need(len(x) == 3, f"x of shape {x} is no image (channels, height, width)")
    _need(x[0] % attributes["groups"] == 0, f"{x[0]} channels do not divide into the groups")
    _need(list(shapes[1:]) in ([], [x[:1]] * 2), f"scale and shift {shapes[1:]} do not fit x {x}")
    return x


def _infer_layer_norm(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    x, axes = shapes[0], attributes["axes"]
    _need(axes <= len(x), f"{axes} axes are more than x {x} has")
    _need(
        axes == 3 or len(x) < 3, "over an image it normalises channels, height and width together"
    )
    _need(axes == len(x) or axes == 1, "it normalises the last axis or all axes")
    fits = [x[len(x) - axes :]] * 2
    _need(list(shapes[1:]) in ([], fits), f"scale and shift {shapes[1:]} do not fit x {x}")
    return x


def _infer_softmax(_: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    _need(len(shapes) == 1 and len(shapes[0]) in (1, 2), "it takes a row or a list of rows")
    return shapes[0]


def _infer_add(_: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    _need(len(shapes) == 2 and shapes[0] == shapes[1], f"it takes two of one shape, not {shapes}")
    return shapes[0]


def _infer_reshape(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    shape = tuple(attributes["shape"])
    _need(
        len(shapes) == 1 and 1 <= len(shape) <= 3 and math.prod(shape) == math.prod(shapes[0]),
        f"{list(shapes)} cannot be seen as {shape}",
    )
    return shape


def _infer_concat(attributes: Mapping[str, Any], shapes: Sequence[Shape]) -> Shape:
    axis = attributes["axis"]
    _need(
        len(shapes) >= 2 and axis < len(shapes[0]), "it joins two or more along an axis they have"
    )
    rests = {shape[:axis] + shape[axis + 1 :] for shape in shapes}
    _need(len(rests) == 1, f"{list(shapes)} differ outside axis {axis}")
    joined = sum(shape[axis] for shape in shapes)
    return (*shapes[0][:axis], joined, *shapes[0][axis + 1 :])


def _emit_linear(b: Any, _: Mapping[str, Any], v: Sequence[Any], __: Shape) -> Any:
    from tvm.relax import op

    y = b.emit(op.matmul(v[0], v[1]))
    return b.emit(op.add(y, v[2])) if len(v) == 3 else y


def _emit_conv2d(b: Any, a: Mapping[str, Any], v: Sequence[Any], shape: Shape) -> Any:
    from tvm.relax import op

    y = b.emit(op.nn.conv2d(v[0], v[1], strides=list(a["stride"]), padding=list(a["padding"])))
    if len(v) == 2:
        return y
    return b.emit(op.add(y, b.emit(op.reshape(v[2], (1, shape[1], 1, 1)))))


def _emit_group_norm(b: Any, a: Mapping[str, Any], v: Sequence[Any], shape: Shape) -> Any:
    from tvm.relax import op

    unit, zero = _unit((shape[1],))
    y = b.emit(op.nn.group_norm(v[0], unit, zero, a["groups"], 1, [2, 3], a["epsilon"]))
    return _emit_affine(b, y, v[1:], (1, shape[1], 1, 1))


def _emit_layer_norm(b: Any, a: Mapping[str, Any], v: Sequence[Any], shape: Shape) -> Any:
    from tvm.relax import op

    last = shape[len(shape) - a["axes"] :]
    unit, zero = _unit(last)
    axes = [-i for i in range(a["axes"], 0, -1)]
    y = b.emit(op.nn.layer_norm(v[0], unit, zero, axes, a["epsilon"]))
    return _emit_affine(b, y, v[1:], last)


def _emit_affine(b: Any, y: Any, v: Sequence[Any], shape: Shape) -> Any:
    from tvm.relax import op

    if not v:
        return y
    scale, shift = (u if tuple(u.ty.shape) == shape else b.emit(op.reshape(u, shape)) for u in v)
    return b.emit(op.add(b.emit(op.multiply(y, scale)), shift))


def _unit(shape: Shape) -> tuple[Any, Any]:
    from tvm import relax

    return (
        relax.const(np.ones(shape, np.float32), "float32"),
        relax.const(np.zeros(shape, np.float32), "float32"),
    )


def _emit_unary(name: str) -> Callable[[Any, Mapping[str, Any], Sequence[Any], Shape], Any]:
    def emit(b: Any, _: Mapping[str, Any], v: Sequence[Any], __: Shape) -> Any:
        from tvm.relax import op

        function = getattr(op, name, None) or getattr(op.nn, name)
        return b.emit(function(v[0]))

    return emit


def _emit_gelu(b: Any, a: Mapping[str, Any], v: Sequence[Any], _: Shape) -> Any:
    from tvm.relax import op

    function = op.nn.gelu_tanh if a["approximate"] == "tanh" else op.nn.gelu
    return b.emit(function(v[0]))


def _emit_max_pool2d(b: Any, a: Mapping[str, Any], v: Sequence[Any], _: Shape) -> Any:
    from tvm.relax import op

    kernel, stride, padding = (list(a[key]) for key in ("kernel", "stride", "padding"))
    return b.emit(op.nn.max_pool2d(v[0], kernel, stride, padding))


def _emit_avg_pool2d(b: Any, a: Mapping[str, Any], v: Sequence[Any], _: Shape) -> Any:
    from tvm.relax import op

    kernel, stride, padding = (list(a[key]) for key in ("kernel", "stride", "padding"))
    counted = a["count_padding"]
    return b.emit(op.nn.avg_pool2d(v[0], kernel, stride, padding, count_include_pad=counted))


def _emit_global(b: Any, _: Mapping[str, Any], v: Sequence[Any], __: Shape) -> Any:
    from tvm.relax import op

    size = [int(d) for d in v[0].ty.shape][2:]
    return b.emit(op.nn.avg_pool2d(v[0], size, size, count_include_pad=True))


def _emit_add(b: Any, _: Mapping[str, Any], v: Sequence[Any], __: Shape) -> Any:
    from tvm.relax import op

    return b.emit(op.add(v[0], v[1]))


def _emit_reshape(b: Any, _: Mapping[str, Any], v: Sequence[Any], shape: Shape) -> Any:
    from tvm.relax import op

    return b.emit(op.reshape(v[0], shape))


def _emit_concat(b: Any, a: Mapping[str, Any], v: Sequence[Any], _: Shape) -> Any:
    from tvm.relax import op

    return b.emit(op.concat(list(v), a["axis"] + 1))


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 20


def _ints(count: int, least: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return (
            isinstance(value, tuple)
            and len(value) == count
            and all(type(v) is int and least <= v <= 1 << 20 for v in value)
        )

    return check


def _dimensions(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(v) is int and v > 0 for v in value)


def _epsilon(value: Any) -> bool:
    return type(value) is float and 0 < value < 1


WINDOW = {"kernel": _ints(2, 1), "stride": _ints(2, 1), "padding": _ints(4, 0)}

OPERATORS: dict[str, Operator] = {
    "linear": Operator({}, _infer_linear, _emit_linear),
    "conv2d": Operator(
        {"stride": _ints(2, 1), "padding": _ints(4, 0)}, _infer_conv2d, _emit_conv2d
    ),
    "group_norm": Operator(
        {"groups": _positive, "epsilon": _epsilon}, _infer_group_norm, _emit_group_norm
    ),
    "layer_norm": Operator(
        {"axes": _positive, "epsilon": _epsilon}, _infer_layer_norm, _emit_layer_norm
    ),
    "relu": Operator({}, _same, _emit_unary("relu")),
    "tanh": Operator({}, _same, _emit_unary("tanh")),
    "sigmoid": Operator({}, _same, _emit_unary("sigmoid")),
    "silu": Operator({}, _same, _emit_unary("silu")),
    "gelu": Operator({"approximate": lambda v: v in ("none", "tanh")}, _same, _emit_gelu),
    "softmax": Operator({}, _infer_softmax, _emit_unary("softmax")),
    "max_pool2d": Operator(WINDOW, _infer_pool, _emit_max_pool2d),
    "avg_pool2d": Operator(
        {**WINDOW, "count_padding": lambda v: type(v) is bool}, _infer_pool, _emit_avg_pool2d
    ),
    "global_avg_pool2d": Operator({}, _infer_global, _emit_global),
    "add": Operator({}, _infer_add, _emit_add),
    "reshape": Operator({"shape": _dimensions}, _infer_reshape, _emit_reshape),
    "concat": Operator({"axis": lambda v: type(v) is int and v >= 0}, _infer_concat, _emit_concat),
}


def _tensor(shape: Shape) -> Any:
    from tvm import relax

    return relax.TensorType(shape, "float32")


def _known(shapes: Mapping[str, Shape], name: str, node: Node) -> Shape:
    if name not in shapes:
        raise ModelRefused(f"operator {node.op} uses {name!r}, which nothing before it makes")
    return shapes[name]


def _infer(node: Node, shapes: Sequence[Shape]) -> Shape:
    operator = OPERATORS.get(node.op)
    if operator is None:
        raise UnsupportedLayer(
            node.op, "it is not an operator of Myelin", f"use one of {', '.join(OPERATORS)}"
        )
    if set(node.attributes) != set(operator.attributes):
        raise ModelRefused(
            f"operator {node.op} has the attributes {sorted(node.attributes)}, not "
            f"{sorted(operator.attributes)}"
        )
    for key, check in operator.attributes.items():
        if not check(node.attributes[key]):
            raise ModelRefused(f"operator {node.op}: {key} is {node.attributes[key]!r}")
    if not shapes:
        raise ModelRefused(f"operator {node.op} has no operands")
    try:
        shape = operator.infer(node.attributes, list(shapes))
    except ValueError as error:
        raise ModelRefused(f"operator {node.op}: {error}") from None
    _check_shape(f"the result of {node.op}", shape)
    return shape


def _check_shape(what: str, shape: Shape) -> None:
    if not all(type(d) is int and d > 0 for d in shape) or not 1 <= len(shape) <= 4:
        raise ModelRefused(f"{what} has the shape {shape}: 1 to 4 positive numbers are needed")
    if math.prod(shape) > LIMITS["elements"]:
        raise ModelRefused(f"{what} has the shape {shape}, more than {LIMITS['elements']} numbers")


def _fields(value: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(kinds):
        raise ModelRefused(f"{where} must be an object with the keys {sorted(kinds)}")
    for key, kind in kinds.items():
        if type(value[key]) is not kind:
            raise ModelRefused(f"{where}: {key} must be a {kind.__name__}")
    return value


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
