"""Front ends: PyTorch, ONNX and Relax, all read through Relax into the operators of `myelin.model`.

Front ends say one thing in many ways (SiLU as x · sigmoid(x), group norm as a reshaped instance
norm). The reader walks a Relax function once: what is an operator becomes a node at once, what may
be part of one waits as an open expression until its pattern closes, and what is neither is refused.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from myelin.errors import ModelRefused, UnsupportedLayer
from myelin.model import INPUT, Builder, Model, Node, Shape

_BATCH = 2
"""Examples in the example that a front end traces: not 1, which would be specialised away."""

_ADVICE = {
    "batch_norm": (
        "batch normalisation mixes the examples of a batch, so none has a gradient of its own",
        "use GroupNorm or LayerNorm instead",
    ),
    "instance_norm": (
        "it is not among Myelin's operators",
        "use GroupNorm with as many groups as channels",
    ),
    "dropout": (
        "it draws random numbers, which the enclave's training graph does not",
        "remove it: the noise of private training regularises already",
    ),
}
_ADVICE["native_batch_norm"] = _ADVICE["batch_norm"]
_ADVICE["alpha_dropout"] = _ADVICE["feature_dropout"] = _ADVICE["dropout"]

_ATEN = frozenset(
    (
        *("conv2d", "linear", "group_norm", "layer_norm", "softmax", "mean"),
        *("relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "gelu", "silu", "silu_"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "add", "add_", "cat", "concat"),
        *("flatten", "view", "reshape", "squeeze", "unsqueeze"),
    )
)


def load(source: Any, example: Any = None, *, seed: int | np.random.Generator = 0) -> Model:
    """Read a model.

    `source`: a `torch.nn.Module`, the path of an .onnx file, a layer of `myelin.nn`, or a Relax
    module. `example`: an array of one or more examples, batch first (or for layers the shape of
    one example as a tuple).
    `seed`: where the weights of `myelin.nn` layers are drawn from; the others bring their own.
    Raises UnsupportedLayer or ModelRefused, naming the layer, why, and what to do.
    """
    if hasattr(source, "build"):
        return _from_layers(source, example, seed)
    if isinstance(source, str | Path):
        return from_onnx(Path(source), example)
    if any(base.__module__.startswith("torch.nn") for base in type(source).__mro__):
        return from_torch(source, example)
    if type(source).__name__ == "IRModule":
        return from_relax(source)
    raise ModelRefused(
        f"{type(source).__name__} is no model: give a torch.nn.Module, the path of an .onnx file, "
        "layers of myelin.nn or a Relax module"
    )


def _from_layers(layer: Any, example: Any, seed: int | np.random.Generator) -> Model:
    if example is None:
        raise ModelRefused("layers of myelin.nn need an example, or its shape")
    shape = tuple(example) if isinstance(example, tuple) else tuple(np.shape(example)[1:])
    builder = Builder(shape)
    layer.build(builder, "", INPUT, np.random.default_rng(seed))
    return builder.finish()


def from_torch(module: Any, example: Any) -> Model:
    """Read a `torch.nn.Module` by `torch.export` and TVM's front end.

    `example` is an array or tensor whose first axis is the batch. Raises UnsupportedLayer naming
    the module's own layer.
    """
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    if example is None:
        raise ModelRefused("a torch.nn.Module needs an example, batch first")
    one = torch.as_tensor(np.asarray(example, np.float32)[:1])
    _check_parameters(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)  # torch.export logs whole tracebacks beside what it raises
        try:
            traced = torch.export.export(module, (torch.cat([one] * _BATCH),))
        except Exception as error:  # shapes that do not fit, branches on data, anything in forward
            raise ModelRefused(
                f"torch.export cannot trace the module on this example: {_first_line(error)}"
            ) from error
        finally:
            logging.disable(disabled)
        _check_operators(traced)
        imported = from_exported_program(
            traced, keep_params_as_input=True, run_ep_decomposition=False
        )
    targets = {
        spec.arg.name: spec.target
        for spec in traced.graph_signature.input_specs
        if spec.kind.name in ("PARAMETER", "BUFFER")
    }
    values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    parameters = {
        var: (targets[var.name], values[targets[var.name]].detach().cpu().numpy())
        for var in imported["main"].params
        if var.name in targets
    }
    return _Reader(imported["main"], parameters).model()


def from_onnx(path: Path, example: Any = None) -> Model:
    """Read an ONNX file by TVM's front end; `example` (batch first) fixes free dimensions."""
    import onnx
    from tvm.relax.frontend import detach_params
    from tvm.relax.frontend import onnx as frontend

    try:
        proto = onnx.load(path)
    except OSError:
        raise
    except Exception as error:  # the parser raises what its own library has
        raise ModelRefused(f"{path} is no ONNX file: {_first_line(error)}") from error
    initializers = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in initializers]
    if len(inputs) != 1:
        raise ModelRefused(f"{path} has {len(inputs)} inputs: a model has one")
    dimensions = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
    batch = dimensions[0] or _BATCH if dimensions else _BATCH  # a file may have folded it in
    if example is not None:
        given = list(np.shape(example)[1:])
        if len(given) != len(dimensions) - 1 or any(
            fixed not in (0, size) for fixed, size in zip(dimensions[1:], given, strict=True)
        ):
            raise ModelRefused(
                f"{path} takes inputs of shape {dimensions[1:]} (0: any), the example has {given}"
            )
        dimensions = [0, *given]
    if not dimensions or min(dimensions[1:], default=0) < 1:
        raise ModelRefused(f"{path} leaves the shape of its input open: give an example")
    for node in proto.graph.node:
        _check_onnx(node)
    _fold_unit_norms(proto.graph)
    _unshare(proto.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = frontend.from_onnx(
                proto,
                shape_dict={inputs[0].name: [batch, *dimensions[1:]]},
                keep_params_in_input=True,
                sanitize_input_names=False,
            )
        except Exception as error:
            raise ModelRefused(
                f"TVM cannot read {path} for {dimensions[1:]}: {_first_line(error)}"
            ) from error
    module, detached = detach_params(module)
    function = module["main"]
    values = [tensor.numpy() for tensor in detached["main"]]
    parameters = {
        var: (_plain(var.name), value)
        for var, value in zip(function.params[1:], values, strict=True)
    }
    return _Reader(function, parameters).model()


def _fold_unit_norms(graph: Any) -> None:
    """Make constants of the ones and zeros by which PyTorch's exporter writes a group norm.

    It reshapes to groups, normalises by an instance norm whose scale and shift are initializers of
    ones and zeros, reshapes back and applies the real scale. An instance norm that stands alone is
    left as it is: its scale and shift are parameters.
    """
    import onnx

    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def after(node: Any) -> list[str]:
        return [user.op_type for user in users.get(node.output[0], ())]

    constants: dict[str, Any] = {}
    for node in graph.node:
        before = maker.get(node.input[0]) if node.op_type == "InstanceNormalization" else None
        if before is None or before.op_type != "Reshape" or after(node) != ["Reshape"]:
            continue
        if "Mul" not in after(users[node.output[0]][0]):
            continue
        for place, unit in ((1, 1), (2, 0)):
            name = node.input[place]
            if name in tensors and np.all(tensors[name] == unit):
                folded = _fresh(f"{name}.constant", {*tensors, *maker})
                constants[folded] = onnx.helper.make_node(
                    "Constant", [], [folded], value=onnx.numpy_helper.from_array(tensors[name])
                )
                node.input[place] = folded
    for made in constants.values():
        graph.node.insert(0, made)


def _unshare(graph: Any) -> None:
    """Give each use of a constant scale, shift or bias an initializer of its own.

    Exporters merge initializers of equal content, such as the scales of two norms before training.
    A weight of a linear or convolutional layer is never parted, constant or not: a file cannot say
    whether its sharing was meant, and parting it would train another model. It stays refused.
    """
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    taken = {*tensors, *(name for node in graph.node for name in (*node.input, *node.output))}
    origin = {name: name for name in tensors}  # through Identity, which PyTorch's exporter puts in
    uses: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
            continue
        for place, name in enumerate(node.input):
            if name in origin:
                uses.setdefault(origin[name], []).append((node, place))
    for name, found in uses.items():
        value = onnx.numpy_helper.to_array(tensors[name])
        row = value.ndim > 0 and value.size > 0 and value.dtype == np.float32
        constant = row and np.ptp(value) == 0
        if constant and all(place in _ONNX_PARTED.get(node.op_type, ()) for node, place in found):
            for use, (node, place) in enumerate(found[1:], 2):
                own = onnx.numpy_helper.from_array(value, _fresh(f"{name}.{use}", taken))
                taken.add(own.name)
                graph.initializer.append(own)
                node.input[place] = own.name


_ONNX_PARTED = {
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    **dict.fromkeys(("Conv", "Gemm"), (2,)),
    **dict.fromkeys(("Mul", "Add"), (0, 1)),  # norms as patterns of primitive operators
}
"""Inputs of ONNX operators that are scales, shifts or biases."""


def from_relax(module: Any) -> Model:
    """Read a Relax module whose `main` takes x and then its parameters.

    Their values are in the function attribute `params`, as TVM's front ends leave them.
    """
    from tvm.relax.frontend import detach_params

    module, detached = detach_params(module)
    function = module["main"]
    values = [tensor.numpy() for tensor in detached.get("main", [])]
    if len(values) != len(function.params) - 1:
        raise ModelRefused(
            f"main has {len(function.params) - 1} parameters and {len(values)} values: attach them "
            "as the function attribute `params`, as TVM's front ends do"
        )
    parameters = {
        var: (_plain(var.name), value)
        for var, value in zip(function.params[1:], values, strict=True)
    }
    return _Reader(function, parameters).model()


def _check_parameters(module: Any) -> None:
    seen: dict[int, str] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        layer = name.rpartition(".")[0] or name
        if value.data_ptr() in seen and value.numel():
            raise UnsupportedLayer(
                layer,
                f"its parameter {name} is shared with {seen[value.data_ptr()]}, and the norm of a "
                "shared gradient is not the sum of the uses' norms",
                "give every layer its own parameters",
            )
        seen[value.data_ptr()] = name
        if not value.requires_grad:
            raise UnsupportedLayer(
                layer,
                f"its parameter {name} is frozen, and every parameter of an image is trained",
                "call requires_grad_(True), or leave the layer out",
            )
        if str(value.dtype) != "torch.float32":
            raise UnsupportedLayer(
                layer, f"its parameter {name} is {value.dtype}", "convert the module: .float()"
            )


def _check_operators(traced: Any) -> None:
    for node in traced.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(getattr(node.target, "_opname", node.target))
        if name in _ATEN:
            continue
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path, kind = (stack[-1][0], str(stack[-1][1]).rpartition(".")[2]) if stack else ("", "")
        why, advice = _ADVICE.get(
            name,
            (
                f"the operator {name} is not among Myelin's",
                "replace it by operators of myelin.model.OPERATORS",
            ),
        )
        raise UnsupportedLayer(f"{path or 'model'} ({kind or name})", why, advice)


def _check_onnx(node: Any) -> None:
    known = {
        "BatchNormalization": "batch_norm",
        "Dropout": "dropout",
    }.get(node.op_type)
    if known is not None:
        why, advice = _ADVICE[known]
        raise UnsupportedLayer(f"{node.name or node.output[0]} ({node.op_type})", why, advice)
    if node.op_type not in _ONNX_OPERATORS:
        raise UnsupportedLayer(
            node.name or node.output[0],
            f"the ONNX operator {node.op_type} is not one that Myelin can train privately",
            "replace it by operators of myelin.model.OPERATORS",
        )


_ONNX_OPERATORS = frozenset(
    (
        *("Conv", "Gemm", "MatMul", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Erf", "Reciprocal"),
        *("Relu", "Tanh", "Sigmoid", "Gelu", "Softmax", "MaxPool", "AveragePool", "Concat"),
        *("GlobalAveragePool", "ReduceMean", "LayerNormalization", "GroupNormalization"),
        *("InstanceNormalization", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"),
        # What exporters compute shapes and constants with; TVM folds it away.
        *("Constant", "ConstantOfShape", "Identity", "Shape", "Gather", "Slice", "Cast", "Expand"),
    )
)


@dataclass(frozen=True)
class _Data:
    """A value of the graph, by its name in the builder."""

    name: str


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter, perhaps transposed or with axes of extent 1 put in."""

    name: str
    value: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Open:
    """Part of a pattern that has not closed."""

    op: str
    args: tuple[Any, ...]


_Found = _Data | _Weight | _Open | float | npt.NDArray[Any] | tuple[Any, ...]


class _Reader:
    """Walks one Relax function."""

    def __init__(
        self, function: Any, parameters: Mapping[Any, tuple[str, npt.NDArray[Any]]]
    ) -> None:
        from myelin.graph import bindings, returned

        self._function = function
        self._bindings = bindings(function)
        self._returned = returned(function)
        x = next(p for p in function.params if p not in parameters)
        self._batch, *shape = _dims(x)
        self.builder = Builder(tuple(shape))
        self._env: dict[Any, _Found] = {x: _Data(INPUT)}
        for var, (name, value) in parameters.items():
            self._env[var] = _Weight(name, value)

    def model(self) -> Model:
        """The model read; raises UnsupportedLayer or ModelRefused."""
        from tvm import relax

        for binding in self._bindings:
            self._env[binding.var] = self._read(binding.var, binding.value)
        result = self._returned
        if isinstance(result, relax.Tuple):
            if len(result.fields) != 1:
                raise ModelRefused(
                    f"the model returns {len(result.fields)} values: it may return one"
                )
            (result,) = result.fields
        return self._finish(self.data(self._env[result], "the output"))

    def data(self, found: Any, user: str) -> str:
        """The name of a graph value that `user` reads."""
        if isinstance(found, _Data):
            return found.name
        if isinstance(found, _Open):
            raise _unknown(found.op)
        kind = f"parameter {found.name}" if isinstance(found, _Weight) else "a constant"
        raise UnsupportedLayer(
            user,
            f"it takes {kind} where the data of an example is needed",
            "use parameters only as weights, biases, scales and shifts of layers",
        )

    def append(self, op: str, *inputs: str, **attributes: Any) -> _Data:
        """A new node."""
        return _Data(self.builder.append(Node(op=op, inputs=inputs, attributes=attributes)))

    def node(self, found: Any) -> Node | None:
        """The node that made a value."""
        if isinstance(found, _Data) and found.name != INPUT:
            return self.builder.nodes[int(found.name[1:])]
        return None

    def parameter(self, weight: _Weight, shape: Shape | None = None) -> str:
        """Enter a parameter, seen as `shape`, into the model."""
        value = weight.value if shape is None else weight.value.reshape(shape)
        if weight.name in self.builder.parameters:
            raise UnsupportedLayer(
                weight.name.rpartition(".")[0] or weight.name,
                f"its parameter {weight.name} is used more than once, and the norm of a shared "
                "gradient is not the sum of the uses' norms",
                "give every layer its own parameters",
            )
        return self.builder.parameter(weight.name, value)

    def give(self, found: _Data, *weights: str) -> _Data:
        """Add parameters to the node that made a value."""
        at = int(found.name[1:])
        node = self.builder.nodes[at]
        self.builder.nodes[at] = replace(node, inputs=(*node.inputs, *weights))
        return found

    def shape(self, found: _Data) -> Shape:
        """Shape of one example's value."""
        return self.builder.shape(found.name)

    def alone(self, shape: Sequence[int], what: str) -> Shape:
        """A shape without its batch; refuses to mix examples."""
        if not shape or shape[0] != self._batch:
            raise UnsupportedLayer(
                what,
                f"its result {list(shape)} does not keep the batch of {self._batch} as first axis, "
                "so it mixes examples",
                "keep the batch in the first axis",
            )
        return tuple(shape[1:])

    def _read(self, var: Any, value: Any) -> _Found:
        from tvm import ir, relax

        def known(operand: Any) -> _Found:
            if isinstance(operand, relax.Var):
                return self._env[operand]
            if isinstance(operand, relax.Tuple):
                return tuple(known(entry) for entry in operand.fields)
            if isinstance(operand, ir.Constant):
                array = operand.value.numpy()
                return float(array) if array.ndim == 0 else np.asarray(array)
            return ()  # a shape: the result's type has it as well

        if isinstance(value, relax.TupleGetItem):
            whole = known(value.tuple_value)
            if not isinstance(whole, tuple):
                raise _unknown("split")
            return whole[value.index]  # type: ignore[no-any-return]
        if not isinstance(value, relax.Call):
            return known(value)
        name = str(getattr(value.op, "name", value.op))
        reader = _READERS.get(name)
        if reader is None:
            raise _unknown(name)
        return reader(self, var, value.attrs, [known(a) for a in value.args])

    def _finish(self, output: str) -> Model:
        """Keep what the output needs, in order, under new names."""
        nodes = self.builder.nodes
        needed: set[str] = set()
        stack = [output]
        while stack:
            name = stack.pop()
            if name.startswith("%") and name != INPUT and name not in needed:
                needed.add(name)
                stack.extend(nodes[int(name[1:])].inputs)
        order = sorted(needed, key=lambda name: int(name[1:]))
        fresh = {name: f"%{i}" for i, name in enumerate(order)}
        kept = tuple(
            replace(node, inputs=tuple(fresh.get(name, name) for name in node.inputs))
            for node in (nodes[int(name[1:])] for name in order)
        )
        used = {name for node in kept for name in node.inputs}
        parameters = {n: v for n, v in self.builder.parameters.items() if n in used}
        return Model(
            input=self.builder.input,
            nodes=kept,
            shapes={name: value.shape for name, value in parameters.items()},
            parameters=parameters,
        )


_Args = list[Any]


def _conv2d(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    groups, dilation = int(attrs.groups), [int(d) for d in attrs.dilation]
    if not isinstance(args[1], _Weight):
        raise _unknown("conv2d with a computed weight")
    if groups != 1 or dilation != [1, 1]:
        raise UnsupportedLayer(
            args[1].name.rpartition(".")[0] or args[1].name,
            f"its convolution has groups {groups} and dilation {dilation}",
            "use groups 1 and dilation 1",
        )
    x = r.data(args[0], "conv2d")
    return r.append(
        "conv2d",
        x,
        r.parameter(args[1]),
        stride=tuple(int(s) for s in attrs.strides),
        padding=tuple(int(p) for p in attrs.padding),
    )


def _matmul(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    if not isinstance(args[1], _Weight) or args[1].value.ndim != 2:
        raise UnsupportedLayer(
            "matmul",
            "it multiplies two computed values",
            "multiply by a weight matrix: a linear layer",
        )
    x = r.data(args[0], "matmul")
    weight = _Weight(args[1].name, np.ascontiguousarray(args[1].value.T))
    return r.append("linear", x, r.parameter(weight))


def _add(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    a, b = args
    if isinstance(a, _Weight):
        a, b = b, a
    if isinstance(b, _Weight):
        node = r.node(a)
        if node is not None and node.op in ("linear", "conv2d") and len(node.inputs) == 2:
            _single(r, a)
            return r.give(a, r.parameter(b, (b.value.size,)))
        if isinstance(a, _Open) and a.op == "scaled":
            normalised, scale = a.args
            shape = _scale_shape(r, normalised)
            return r.give(normalised, r.parameter(scale, shape), r.parameter(b, shape))
    if isinstance(a, _Data) and isinstance(b, _Data):
        return r.append("add", a.name, b.name)
    if isinstance(a, _Open) and a.op == "normalised" and _all(b, 0.0):
        return a
    return _Open("add", (a, b))


def _multiply(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    a, b = args
    for x, y in ((a, b), (b, a)):
        node = r.node(y)
        maker = None if node is None else (node.op, node.inputs)
        if isinstance(x, _Data) and maker == ("sigmoid", (x.name,)):
            return r.append("silu", x.name)
        before = r.node(x)
        if isinstance(y, _Weight) and before is not None and before.op.endswith("_norm"):
            _single(r, x)
            return _Open("scaled", (x, y))
        if isinstance(x, _Open) and x.op == "normalised" and _all(y, 1.0):
            return x
    found = _gelu_of(_factors(_Open("multiply", (a, b))))
    return (
        _Open("multiply", (a, b))
        if found is None
        else r.append("gelu", found[0].name, approximate=found[1])
    )


def _factors(found: Any) -> list[Any]:
    if isinstance(found, _Open) and found.op == "multiply":
        return [f for arg in found.args for f in _factors(arg)]
    return [found]


def _gelu_of(factors: list[Any]) -> tuple[_Data, str] | None:
    """x and the kind of ½ · x · (1 + erf(x / √2)) or its tanh approximation, in any order."""
    if len(factors) != 3:
        return None
    halves = [f for f in factors if isinstance(f, float) and math.isclose(f, 0.5)]
    data = [f for f in factors if isinstance(f, _Data)]
    sums = [f for f in factors if isinstance(f, _Open) and f.op == "add"]
    if not (len(halves) == len(data) == len(sums) == 1):
        return None
    ones = [a for a in sums[0].args if _all(a, 1.0)]
    curves = [a for a in sums[0].args if isinstance(a, _Open) and a.op in ("erf", "tanh")]
    if len(ones) != 1 or len(curves) != 1 or not isinstance(curves[0].args[0], _Open):
        return None
    inner, x = curves[0].args[0], data[0]
    if curves[0].op == "tanh":
        return (x, "tanh") if _is_tanh_argument(inner, x) else None
    wanted = {"divide": math.sqrt(2), "multiply": math.sqrt(0.5)}.get(inner.op)
    if wanted is None or not any(a == x for a in inner.args if isinstance(a, _Data)):
        return None
    by = [a for a in inner.args if isinstance(a, float)]
    return (x, "none") if len(by) == 1 and math.isclose(by[0], wanted, rel_tol=1e-6) else None


def _is_tanh_argument(found: _Open, x: _Data) -> bool:
    """Whether it is √(2/π) · (x + 0.044715 · x³)."""
    scale, sums = _parted(_factors(found))
    if not math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=1e-6) or len(sums) != 1:
        return False
    if not isinstance(sums[0], _Open) or sums[0].op != "add" or x not in sums[0].args:
        return False
    (cube,) = [a for a in sums[0].args if a != x] or [None]
    weight, powers = _parted(_factors(cube))
    return math.isclose(weight, 0.044715, rel_tol=1e-6) and (
        powers == [x, x, x]
        or (
            len(powers) == 1
            and isinstance(powers[0], _Open)
            and powers[0].op == "power"
            and powers[0].args[0] == x
            and _all(powers[0].args[1], 3.0)
        )
    )


def _parted(factors: list[Any]) -> tuple[float, list[Any]]:
    """The product of the numbers among factors, and the rest."""
    numbers = [f for f in factors if isinstance(f, float)]
    return math.prod(numbers), [f for f in factors if not isinstance(f, float)]


def _tanh(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    """Of a value, or of an open pattern, which may become a GELU."""
    if isinstance(args[0], _Open):
        return _Open("tanh", tuple(args))
    return r.append("tanh", r.data(args[0], "tanh"))


def _divide(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    """(z - mean(z)) / √(variance(z) + ε) is a normalisation; anything else stays open."""
    above, below = args
    opened = _Open("divide", (above, below))
    if not isinstance(above, _Open) or above.op != "subtract":
        return opened
    if not isinstance(below, _Open) or below.op != "sqrt":
        return opened
    z, mean = above.args
    (inside,) = below.args
    if not (isinstance(mean, _Open) and mean.op == "mean" and mean.args[0] == z):
        return opened
    if not (isinstance(inside, _Open) and inside.op == "add"):
        return opened
    variances = [a for a in inside.args if isinstance(a, _Open) and a.op == "variance"]
    epsilons = [a for a in inside.args if isinstance(a, float)]
    if len(variances) != 1 or len(epsilons) != 1 or variances[0].args != mean.args:
        return opened
    return _Open("normalised", (z, epsilons[0]))


def _reshape(r: _Reader, var: Any, attrs: Any, args: _Args) -> _Found:
    x = args[0]
    shape = _dims(var)
    if isinstance(x, _Weight):
        return _Weight(x.name, x.value.reshape(shape))
    if isinstance(x, np.ndarray):
        return x.reshape(shape)
    if isinstance(x, _Open) and x.op == "normalised":
        z, epsilon = x.args
        node = r.node(z)
        before = _Data(node.inputs[0]) if node is not None and node.op == "reshape" else None
        own = r.alone(shape, "reshape")
        if before is not None and r.shape(before) == own and len(own) == 3:
            groups = r.shape(z)[0]
            return r.append("group_norm", before.name, groups=groups, epsilon=_decimal(epsilon))
    name = r.data(x, "reshape")
    own = r.alone(shape, "reshape")
    return _Data(name) if own == r.shape(_Data(name)) else r.append("reshape", name, shape=own)


def _permute_dims(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    if not isinstance(args[0], _Weight):
        raise _unknown("permute_dims of data")
    axes = attrs.axes
    order = None if axes is None else [int(a) for a in axes]
    return _Weight(args[0].name, np.transpose(args[0].value, order))


def _mean(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    if not isinstance(args[0], _Data):
        raise _unknown("mean")
    rank = len(r.shape(args[0])) + 1
    axes = sorted(int(a) % rank for a in attrs.axis)
    if rank == 4 and axes == [2, 3]:
        pooled = r.append("global_avg_pool2d", args[0].name)
        if attrs.keepdims:
            return pooled
        return r.append("reshape", pooled.name, shape=(r.shape(pooled)[0],))
    return _Open("mean", (args[0], tuple(axes), bool(attrs.keepdims)))


def _variance(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    if not isinstance(args[0], _Data):
        raise _unknown("variance")
    rank = len(r.shape(args[0])) + 1
    axes = sorted(int(a) % rank for a in attrs.axis)
    return _Open("variance", (args[0], tuple(axes), bool(attrs.keepdims)))


def _adaptive(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    size = [int(s) for s in attrs.output_size]
    if size != [1, 1]:
        raise UnsupportedLayer(
            "adaptive_avg_pool2d", f"its output is {size}", "use 1 × 1, or AvgPool2d with a kernel"
        )
    return r.append("global_avg_pool2d", r.data(args[0], "adaptive_avg_pool2d"))


def _pool(op: str) -> Callable[[_Reader, Any, Any, _Args], _Found]:
    def read(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
        if attrs.ceil_mode or [int(d) for d in attrs.dilation] != [1, 1]:
            raise UnsupportedLayer(
                op, "it uses ceil_mode or dilation", "pad the image, or use another kernel"
            )
        window: dict[str, Any] = {
            "kernel": tuple(int(k) for k in attrs.pool_size),
            "stride": tuple(int(s) for s in attrs.strides),
            "padding": tuple(int(p) for p in attrs.padding),
        }
        if op == "avg_pool2d":
            window["count_padding"] = bool(attrs.count_include_pad)
        return r.append(op, r.data(args[0], op), **window)

    return read


def _group_norm(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    x = r.data(args[0], "group_norm")
    axes = [int(a) for a in attrs.axes]
    if int(attrs.channel_axis) != 1 or axes != [2, 3]:
        raise UnsupportedLayer("group_norm", f"its axes are {axes}", "normalise NCHW images")
    found = r.append(
        "group_norm", x, groups=int(attrs.num_groups), epsilon=_decimal(float(attrs.epsilon))
    )
    return _affine(r, found, args[1], args[2])


def _layer_norm(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    x = r.data(args[0], "layer_norm")
    rank = len(r.builder.shape(x)) + 1
    axes = sorted(int(a) % rank for a in attrs.axes)
    if axes != list(range(axes[0], rank)) or axes[0] == 0:
        raise UnsupportedLayer("layer_norm", f"its axes are {axes}", "normalise the last axes")
    found = r.append("layer_norm", x, axes=len(axes), epsilon=_decimal(float(attrs.epsilon)))
    return _affine(r, found, args[1], args[2])


def _affine(r: _Reader, found: _Data, scale: Any, shift: Any) -> _Found:
    if isinstance(scale, _Weight) and isinstance(shift, _Weight):
        shape = _scale_shape(r, found)
        return r.give(found, r.parameter(scale, shape), r.parameter(shift, shape))
    if _all(scale, 1.0) and _all(shift, 0.0):
        return found
    raise UnsupportedLayer(
        "norm", "its scale or shift is a constant", "make both parameters, or leave both out"
    )


def _scale_shape(r: _Reader, normalised: _Data) -> Shape:
    node = r.node(normalised)
    assert node is not None
    shape = r.shape(normalised)
    return shape[:1] if node.op == "group_norm" else shape[len(shape) - node.attributes["axes"] :]


def _softmax(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    x = r.data(args[0], "softmax")
    rank = len(r.builder.shape(x)) + 1
    if int(attrs.axis) % rank != rank - 1:
        raise UnsupportedLayer("softmax", f"its axis is {attrs.axis}", "use the last axis")
    return r.append("softmax", x)


def _concat(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
    names = [r.data(part, "concat") for part in args[0]]
    axis = int(attrs.axis) % (len(r.builder.shape(names[0])) + 1)
    if axis == 0:
        raise UnsupportedLayer(
            "concat", "it joins along the batch, so it mixes examples", "join another axis"
        )
    return r.append("concat", *names, axis=axis - 1)


def _unary(op: str, **attributes: Any) -> Callable[[_Reader, Any, Any, _Args], _Found]:
    def read(r: _Reader, _: Any, attrs: Any, args: _Args) -> _Found:
        return r.append(op, r.data(args[0], op), **attributes)

    return read


def _opened(op: str) -> Callable[[_Reader, Any, Any, _Args], _Found]:
    def read(_: _Reader, __: Any, ___: Any, args: _Args) -> _Found:
        return _Open(op, tuple(args))

    return read


def _refused(op: str) -> Callable[[_Reader, Any, Any, _Args], _Found]:
    def read(_: _Reader, __: Any, ___: Any, args: _Args) -> _Found:
        layer = next((a.name for a in args if isinstance(a, _Weight)), op)
        why, advice = _ADVICE[op]
        raise UnsupportedLayer(layer.rpartition(".")[0] or layer, why, advice)

    return read


_READERS: dict[str, Callable[[_Reader, Any, Any, _Args], _Found]] = {
    "relax.nn.conv2d": _conv2d,
    "relax.matmul": _matmul,
    "relax.add": _add,
    "relax.multiply": _multiply,
    "relax.divide": _divide,
    "relax.subtract": _opened("subtract"),
    "relax.sqrt": _opened("sqrt"),
    "relax.erf": _opened("erf"),
    "relax.mean": _mean,
    "relax.variance": _variance,
    "relax.reshape": _reshape,
    "relax.flatten": _reshape,
    "relax.squeeze": _reshape,
    "relax.expand_dims": _reshape,
    "relax.nn.batch_flatten": _reshape,
    "relax.permute_dims": _permute_dims,
    "relax.concat": _concat,
    "relax.nn.adaptive_avg_pool2d": _adaptive,
    "relax.nn.max_pool2d": _pool("max_pool2d"),
    "relax.nn.avg_pool2d": _pool("avg_pool2d"),
    "relax.nn.group_norm": _group_norm,
    "relax.nn.layer_norm": _layer_norm,
    "relax.nn.softmax": _softmax,
    "relax.nn.relu": _unary("relu"),
    "relax.power": _opened("power"),
    "relax.tanh": _tanh,
    "relax.sigmoid": _unary("sigmoid"),
    "relax.nn.silu": _unary("silu"),
    "relax.nn.gelu": _unary("gelu", approximate="none"),
    "relax.nn.gelu_tanh": _unary("gelu", approximate="tanh"),
    "relax.nn.batch_norm": _refused("batch_norm"),
    "relax.nn.dropout": _refused("dropout"),
    "relax.nn.instance_norm": _refused("instance_norm"),
}


def _single(r: _Reader, found: _Data) -> None:
    """Refuse to fold a parameter into a value that was used without it before."""
    users = [node for node in r.builder.nodes if found.name in node.inputs]
    if users:
        raise UnsupportedLayer(
            users[0].op,
            "it uses a layer's result from before its bias or scale was applied",
            "use the layer's result with its bias",
        )


def _unknown(op: str) -> UnsupportedLayer:
    name = op.removeprefix("relax.")
    return UnsupportedLayer(
        name,
        f"the operator {name} is not among Myelin's, nor part of one that is recognised",
        "replace it by operators of myelin.model.OPERATORS",
    )


def _all(found: Any, value: float) -> bool:
    """Whether a constant has this value everywhere."""
    return isinstance(found, float | np.ndarray) and bool(np.all(np.asarray(found) == value))


def _fresh(name: str, taken: Collection[str]) -> str:
    """The name, lengthened until it is not among those taken."""
    while name in taken:
        name += "_"
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _decimal(epsilon: float) -> float:
    """A float32 epsilon (9.99999974e-06) as the decimal that was meant (1e-05)."""
    return float(f"{epsilon:.6g}")


def _plain(name: str) -> str:
    """An ONNX name in the letters that parameters may have."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._") else "_" for c in name)


def _dims(var: Any) -> Shape:
    return tuple(int(d) for d in var.ty.shape)
