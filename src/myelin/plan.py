"""From a training graph to a list of kernel calls on one arena.

`compile_training` lowers the Relax functions of `myelin.training` operator by operator: `TEMPLATES`
is the one place where an operator's kernel is chosen. Images are stored channels last (NHWC),
everything else as Relax sees it; elementwise chains become one kernel; temporaries share memory by
a linear scan over their lifetimes. The result is a `Program`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tvm import DataType, ir, relax
from tvm.script.ir_builder import tirx as T  # noqa: N812

from myelin import clipping, cost, planner, training
from myelin.cost import Work
from myelin.cpu import Cpu, Precision
from myelin.errors import ModelRefused
from myelin.kernels import (
    bounds,
    elementwise,
    functions,
    layout,
    loss,
    normalise,
    pool,
    reduce,
)
from myelin.kernels import clipping as clip_kernels
from myelin.kernels import conv as conv_kernels
from myelin.kernels import object as kernel_object
from myelin.kernels.conv import Conv
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.pool import Pool
from myelin.kernels.tir import is_parallel, select, splat
from myelin.kernels.update import HYPER
from myelin.model import Model
from myelin.optimizer import Optimizer
from myelin.outside import Outside
from myelin.planner import Decision
from myelin.program import Call, Program
from myelin.training import Objective, bindings, operands, operator, returned
from myelin.weights import Parameter, align, flat_size, place

__all__ = ["Outside", "Program", "compile_training"]

Shape = tuple[int, ...]

FUSED = 8
"""Values that elementwise operators in one kernel read, so that none has too many arguments."""
ARENA_LIMIT = (1 << 32) - 64
"""Bytes of an arena: the enclave keeps offsets in 32 bits."""


def compile_training(
    model: Model,
    *,
    loss: str,
    optimizer: Optimizer,
    batch: int,
    cpu: Cpu,
    precision: Precision = "float32",
    private: bool = True,
    stored_bytes: int = planner.STORED_BYTES,
    threads: int = 2,
    dump: Path | None = None,
) -> Program:
    """Derive the training graph of `model` and plan it for physical batches of `batch` examples.

    `private=False` leaves norms and factors out and sums the unmasked examples' gradients: a
    baseline, never an image. `precision` is one of `cpu.precisions`. `stored_bytes` bounds the
    memory for the stored per-example gradients of all convolutions together. `threads` are those
    that times are predicted for; nothing else depends on them. `dump` receives the IR after each
    pass, one file each. Raises ModelRefused or UnsupportedLayer, or BoundsError where a
    kernel cannot be shown to be safe.
    """
    if precision not in cpu.precisions:
        raise ModelRefused(
            f"precision {precision!r}: {cpu.level} has {', '.join(cpu.precisions)} only"
        )
    objective = Objective(
        names=tuple(model.shapes),
        loss=training.check_loss(loss),
        clipping="per-example" if private else "none",
        precision=precision,
        level=cpu.level,
        stored_bytes=stored_bytes,
    )
    if batch < 1:
        raise ModelRefused(f"a physical batch has at least 1 example, not {batch}")
    if loss == "cross-entropy" and model.outputs < 2:
        raise ModelRefused(
            "cross-entropy needs 2 outputs or more: use binary-cross-entropy for one"
        )
    recorder = _Recorder(dump)
    forward = model.relax(batch)
    recorder("import", forward)
    graph = training.training_graph(forward, objective, record=recorder)
    library = Kernels(
        cpu=cpu, precision=precision, linear=clipping.LINEAR[precision], threads=threads
    )
    return _plan(model, forward, graph, objective, optimizer, batch, library, recorder)


def _plan(
    model: Model,
    forward: Any,
    graph: Any,
    objective: Objective,
    optimizer: Optimizer,
    batch: int,
    library: Kernels,
    recorder: _Recorder,
) -> Program:
    parameters = place({n: (s, model.layout(n)) for n, s in model.shapes.items()})
    weights = flat_size(parameters)
    features = math.prod(model.input)
    label_bytes = 4 if objective.loss == "cross-entropy" else 4 * model.outputs
    sizes = {
        "x": 4 * batch * features,
        "y": batch * label_bytes,
        "mask": 4 * batch,
        "hyper": 4 * HYPER,
        "weights": 4 * weights,
        "gradient": 4 * weights,
        "state": 4 * optimizer.state(weights),
        "output": 4 * batch * model.outputs,
    }
    base, buffers = 0, {}
    for name, size in sizes.items():
        buffers[name] = (base, size)
        base = align(base + size)

    def fixed(name: str) -> Buffer:
        return Buffer(bytes=sizes[name], offset=buffers[name][0])

    def inside(name: str) -> list[Value]:
        at = buffers[name][0]
        return [Value(Buffer(bytes=p.bytes, offset=at + p.offset), p.stored) for p in parameters]

    methods = dict(clipping.methods(forward, objective))
    x = Value(fixed("x"), (batch, *model.input))
    labels = Value(fixed("y"), (batch,) if label_bytes == 4 else (batch, model.outputs))
    mask, hyper = Value(fixed("mask"), (batch,)), Value(fixed("hyper"), (HYPER,))
    weight_values = inside("weights")
    output = Value(fixed("output"), (batch, model.outputs))

    gradient = Lowering(library, graph["main"])
    sums = inside("gradient")
    gradient.run([x, *weight_values, labels, mask, hyper], sums)
    predict = Lowering(library, forward["main"])
    predict.run([x, *weight_values], [output])
    update = library.add("update", ("update",), lambda: optimizer.kernel(library.cpu, weights))
    steps = [fixed(name).offset for name in ("weights", "state", "gradient", "hyper")]

    ends = [allocate(lowering.steps, base) for lowering in (gradient, predict)]
    arena = max(base, *ends)
    if arena > ARENA_LIMIT:
        raise ModelRefused(
            f"the training graph needs {arena >> 20} MiB at batch {batch}, an arena has at most "
            f"{ARENA_LIMIT >> 20}: use a smaller physical batch"
        )
    program = Program(
        kernels=dict(library.functions),
        gradient=gradient.calls(),
        predict=predict.calls(),
        update=(Call(kernel=update, offsets=tuple(offset or 0 for offset in steps)),),
        buffers=buffers,
        arena=arena,
        parameters=parameters,
        batch=batch,
        outputs=model.outputs,
        features=features,
        label_bytes=label_bytes,
        loss=objective.loss,
        optimizer=optimizer,
        additions=clipping.additions(forward, objective),
        clipping=tuple(methods.items()),
        decisions=(
            *_decisions(gradient, [x, *weight_values], sums, parameters, methods),
            _decision(library, update, "", "none"),
        ),
    )
    recorder.program(program)
    for kernel in program.kernels.values():
        bounds.prove(kernel)
    return program


def _decisions(
    lowering: Lowering,
    arguments: Sequence[Value],
    results: Sequence[Value],
    parameters: Sequence[Parameter],
    methods: Mapping[str, planner.Method],
) -> tuple[Decision, ...]:
    """A row for each call. A call belongs to the layer whose parameters, or sums of gradients, it
    names; else to that of a call which reads its results; else to that of one which reads the same
    adjoint.
    """
    owner: dict[int, str] = {}
    for parameter, weight, total in zip(parameters, arguments[1:], results, strict=True):
        layer = parameter.name.rpartition(".")[0] or parameter.name
        owner |= {id(weight.buffer): layer, id(total.buffer): layer}
    direct = [next((owner[id(b)] for b in bs if id(b) in owner), "") for _, bs in lowering.steps]
    readers: dict[int, str] = {}
    for layer, (_, buffers) in zip(direct, lowering.steps, strict=True):
        if layer:
            for b in buffers[:-1]:
                readers.setdefault(id(b), layer)
    rows = []
    for layer, (name, buffers) in zip(direct, lowering.steps, strict=True):
        found = layer or next((readers[id(b)] for b in reversed(buffers) if id(b) in readers), "")
        rows.append(_decision(lowering.library, name, found, methods.get(found, "none")))
    return tuple(rows)


def _decision(library: Kernels, kernel: str, layer: str, method: planner.Method) -> Decision:
    known = library.costs[kernel]
    return Decision(
        layer=layer,
        kernel=kernel,
        method=method,
        algorithm=known.work.algorithm,
        threads=known.threads,
        gflop=known.work.gflop,
        ms=known.ms,
        bytes=sum(kernel_object.argument_bytes(library.functions[kernel])),
    )


@dataclass(eq=False)
class Buffer:
    """Memory of a value: bytes, and its offset in the arena once it is known."""

    bytes: int
    offset: int | None = None


@dataclass(frozen=True)
class Value:
    """A value in memory: its buffer, and its shape as stored (images channels last)."""

    buffer: Buffer
    stored: Shape


@dataclass(frozen=True)
class Activations:
    """What a convolution reads: x, or x within its zero border where its kernel asks for that."""

    x: Value
    conv: Conv


@dataclass(frozen=True)
class Lazy:
    """An elementwise operator that has not been computed: its users compute it."""

    call: Any
    stored: Shape


@dataclass(frozen=True, eq=False, kw_only=True)
class Pending:
    """A product, or an adjoint of pooling, that has not been computed: the one elementwise operator
    that reads it becomes its epilogue, where shapes allow.
    """

    label: str
    key: tuple[Any, ...]
    build: Callable[[Epilogue], Any]
    inputs: Sequence[Value | Activations]
    stored: Shape
    work: Work


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a kernel does, the milliseconds it should take, and how many threads it runs on."""

    work: Work
    ms: float
    threads: int


@dataclass(kw_only=True)
class Kernels:
    """The kernels of a program, each shape once; `linear` holds the templates of products."""

    cpu: Cpu
    precision: Precision
    linear: Any
    threads: int
    functions: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    _names: dict[Any, str] = field(default_factory=dict)

    def add(
        self,
        label: str,
        key: tuple[Any, ...],
        build: Callable[[], Any],
        work: Work | None = None,
        moved: int | None = None,
    ) -> str:
        """The name of the kernel with this key, built if it is new.

        `work` is one instruction for each vector of its arguments unless given; `moved` are bytes
        that it reads or writes, those of all its arguments unless given.
        """
        if key not in self._names:
            name = f"k{len(self.functions)}_{label}"
            self._names[key] = name
            function = self.functions[name] = build().with_attr("global_symbol", name)
            size = sum(kernel_object.argument_bytes(function))
            work = work or cost.elementwise(self.cpu, size // 4, 1)
            threads = self.threads if is_parallel(function) else 1
            ms = cost.RATES[self.cpu.level].milliseconds(
                work, size if moved is None else moved, threads=threads
            )
            self.costs[name] = Cost(work=work, ms=ms, threads=threads)
        return self._names[key]


class Lowering:
    """Turns one Relax function into kernel calls."""

    def __init__(self, library: Kernels, function: Any) -> None:
        """Prepare for `run`; kernels go to `library`."""
        self.library = library
        self.cpu = library.cpu
        self.linear = library.linear
        self.precision = library.precision
        self.function = function
        self.steps: list[tuple[str, tuple[Buffer, ...]]] = []
        self.values: dict[Any, Value | Lazy | Pending | tuple[Value, ...]] = {}
        self.places: dict[Any, Value] = {}
        self.spreads: dict[int, tuple[tuple[int, int, int, int], Value]] = {}
        self.pooled: dict[tuple[int, Pool], Value] = {}
        self._padded: dict[tuple[int, Conv], Value] = {}
        self._biased: dict[Any, tuple[Any, Any]] = {}
        self._uses: dict[Any, list[Any]] = {}

    def run(self, arguments: Sequence[Value], results: Sequence[Value]) -> None:
        """Lower the whole function; arguments and results lie where the caller says."""
        self._find_uses()
        for var, value in zip(self.function.params, arguments, strict=True):
            self.values[var] = self._argument(var, value)
        result = returned(self.function)
        outputs = list(result.fields) if isinstance(result, relax.Tuple) else [result]
        aliases = {
            b.var: b.value for b in bindings(self.function) if isinstance(b.value, relax.Var)
        }
        for output, place_ in zip(outputs, results, strict=True):
            while output in aliases:
                output = aliases[output]  # noqa: PLW2901
            self.places[output] = place_
        for binding in bindings(self.function):
            self._lower(binding.var, binding.value)
        for output, place_ in self.places.items():
            found = self.value(output)
            if found.buffer is not place_.buffer:
                self._copy(found, place_)

    def calls(self) -> tuple[Call, ...]:
        """The calls, once every buffer has its offset."""
        return tuple(
            Call(kernel=name, offsets=tuple(_placed(b) for b in buffers))
            for name, buffers in self.steps
        )

    def value(self, var: Any) -> Value:
        """A variable in memory; computes it if it was put off."""
        found = self.values[var]
        if isinstance(found, Lazy):
            found = self._materialise(var, found)
            self.values[var] = found
        if isinstance(found, Pending):
            found = self._multiply(var, found)
            self.values[var] = found
        if isinstance(found, tuple):
            raise ModelRefused(f"a tuple of {len(found)} values is used as one")
        return found

    def new(self, var: Any, stored: Shape) -> Value:
        """Memory for a result: where the caller wants it, or a temporary."""
        wanted = self.places.get(var)
        if wanted is not None and wanted.buffer.bytes == 4 * math.prod(stored):
            return Value(wanted.buffer, stored)
        return Value(Buffer(bytes=4 * math.prod(stored)), stored)

    def emit(
        self,
        label: str,
        key: tuple[Any, ...],
        build: Callable[[], Any],
        inputs: Sequence[Value | Activations],
        outputs: Sequence[Value],
        *,
        work: Work | None = None,
    ) -> None:
        """Append a call: inputs, then a scratch vector where the template has one, then outputs."""
        plain = [v.x if isinstance(v, Activations) else v for v in inputs]
        moved = sum(v.buffer.bytes for v in (*plain, *outputs))
        name = self.library.add(label, key, build, work, moved)
        sizes = kernel_object.argument_bytes(self.library.functions[name])
        for i, v in enumerate(inputs):
            if isinstance(v, Activations) and sizes[i] != v.x.buffer.bytes:
                plain[i] = self._padded_copy(v.x, v.conv)
        scratch = sizes[len(inputs) : len(sizes) - len(outputs)]
        buffers = [
            *(v.buffer for v in plain),
            *(Buffer(bytes=size) for size in scratch),
            *(v.buffer for v in outputs),
        ]
        if [b.bytes for b in buffers] != sizes:
            raise ModelRefused(
                f"kernel {name} takes {sizes} bytes, the graph gives {[b.bytes for b in buffers]}"
            )
        self.steps.append((name, tuple(buffers)))

    # What templates ask.

    def _padded_copy(self, x: Value, conv: Conv) -> Value:
        """x within the zero border that the convolution reads; one copy serves all its kernels."""
        key = (id(x.buffer), conv)
        if key not in self._padded:
            xp = Value(
                Buffer(bytes=4 * conv.n * conv.hp * conv.wp * conv.ci),
                (conv.n, conv.hp, conv.wp, conv.ci),
            )
            build = lambda: conv_kernels.pad(self.cpu, conv)  # noqa: E731
            work = cost.copy(self.cpu, math.prod(xp.stored), cold=xp.buffer.bytes)
            self.emit("pad", ("pad", conv), build, [x], [xp], work=work)
            self._padded[key] = xp
        return self._padded[key]

    def bias(self, var: Any) -> Value | None:
        """The bias that is added to `var` and nothing else: the kernel adds it."""
        return self.value(self._biased[var][1]) if var in self._biased else None

    def product(
        self,
        var: Any,
        stored: Shape,
        label: str,
        key: tuple[Any, ...],
        build: Callable[[Epilogue], Any],
        inputs: Sequence[Value | Activations],
        *,
        work: Work,
        finishes: bool = True,
    ) -> None:
        """Record a product, for the sum with its bias as well where its kernel adds that.

        `build` takes an `Epilogue`; any but `PLAIN` only where it `finishes`.
        """
        target = self._biased[var][0] if var in self._biased else var
        self.values[target] = self.values[var] = Pending(
            label=label,
            key=key,
            build=build,
            inputs=inputs,
            stored=stored,
            work=work,
        )
        reader = self._reader(target)
        if not finishes or reader is None or _is_bool(reader):
            self.values[var] = self.value(target)

    def temporary(self, stored: Shape) -> Value:
        """Memory for something between."""
        return Value(Buffer(bytes=4 * math.prod(stored)), stored)

    def channels_last(self, x: Value, shape: Shape) -> Value:
        """A copy of x, channels first of the given shape, in the order images are stored in."""
        y = self.temporary(_stored(shape))
        build = lambda: layout.nhwc(self.cpu, *shape)  # noqa: E731
        work = cost.copy(self.cpu, math.prod(shape), scalar=True)
        self.emit("nhwc", ("nhwc", shape), build, [x], [y], work=work)
        return y

    def channels_first(self, x: Value, shape: Shape) -> Value:
        """A copy of an image as stored, of Relax's shape, in channels-first order."""
        y = self.temporary(shape)
        build = lambda: layout.nchw(self.cpu, *_stored(shape))  # noqa: E731
        work = cost.copy(self.cpu, math.prod(shape), scalar=True)
        self.emit("nchw", ("nchw", shape), build, [x], [y], work=work)
        return y

    def map(
        self, label: str, inputs: Sequence[Value], out: Value, function: Callable[..., Any]
    ) -> None:
        """Append out = function(inputs…) element by element; `label` names the function."""
        shapes = tuple(v.stored for v in inputs)
        build = lambda: elementwise.map(self.cpu, shapes, out.stored, function)  # noqa: E731
        self.emit(label, (label, shapes, out.stored), build, inputs, [out])

    # Walking the function.

    def _copy(self, x: Value, y: Value) -> None:
        flat = (math.prod(x.stored),)
        self.map("copy", [Value(x.buffer, flat)], Value(y.buffer, flat), lambda a: a)

    def _argument(self, var: Any, value: Value) -> Value:
        shape = _dims(var)
        if len(shape) == 4 and var.same_as(self.function.params[0]):
            if _same_order(shape):
                return Value(value.buffer, _stored(shape))
            return self.channels_last(value, shape)
        return value

    def _find_uses(self) -> None:
        weights = {p: p for p in self.function.params[1:]}  # reshaped parameters: to themselves
        for b in bindings(self.function):
            for operand in operands(b.value):
                self._uses.setdefault(operand, []).append(b.var)
            if operator(b.value) == "relax.reshape" and b.value.args[0] in weights:
                weights[b.var] = b.value.args[0]
        result = returned(self.function)
        for output in result.fields if isinstance(result, relax.Tuple) else [result]:
            self._uses.setdefault(output, []).append(None)
        products = {
            b.var
            for b in bindings(self.function)
            if operator(b.value) in ("relax.matmul", "relax.nn.conv2d")
        }
        for b in bindings(self.function):
            if operator(b.value) != "relax.add":
                continue
            y, bias = b.value.args
            if y in products and bias in weights and len(self._uses[y]) == 1:
                self._biased[y] = (b.var, weights[bias])

    def _lower(self, var: Any, value: Any) -> None:
        if var in self.values:
            return
        if isinstance(value, relax.Var):
            self.values[var] = self.values[value]
        elif isinstance(value, relax.TupleGetItem):
            whole = self.values[value.tuple_value]
            assert isinstance(whole, tuple)
            self.values[var] = whole[value.index]
        elif isinstance(value, relax.Tuple):
            return
        elif operator(value) in ELEMENTWISE:
            if len(list(self._leaves(value))) > FUSED:
                for operand in value.args:
                    if isinstance(self.values.get(operand), Lazy) and operand.ty.dtype != "bool":
                        self.value(operand)
            stored = _stored(_dims(var))
            self.values[var] = Lazy(value, stored)
            if self._keeps(var):
                self.value(var)
        else:
            template = TEMPLATES.get(_template(value))
            if template is None:
                raise ModelRefused(f"no kernel for {_template(value)}")
            template(self, var, value)

    def _keeps(self, var: Any) -> bool:
        """Whether an elementwise result must be in memory: anything but one elementwise user."""
        return var.ty.dtype != "bool" and self._reader(var) is None

    def _reader(self, var: Any) -> str | None:
        """The elementwise operator that reads a variable, if nothing else does."""
        uses = self._uses.get(var, [])
        if len(uses) != 1 or uses[0] is None:
            return None
        (reader,) = (operator(b.value) for b in bindings(self.function) if b.var == uses[0])
        return reader if reader in ELEMENTWISE else None

    def _materialise(self, var: Any, lazy: Lazy) -> Value:
        pending = self._epilogue_of(lazy)
        inputs: list[Any] = [] if pending is None else [pending]
        key, build = self._expression(lazy.call, inputs)
        apply = lambda *loaded: build(loaded)  # noqa: E731
        if pending is not None:
            finish = Epilogue(function=apply, others=len(inputs) - 1)
            return self._multiply(var, pending, finish, key, inputs[1:])
        label, operations = _label(key), _operations(key)
        out = self.new(var, lazy.stored)
        shapes = tuple(v.stored for v in inputs)
        kernel = lambda: elementwise.map(  # noqa: E731
            self.cpu, shapes, lazy.stored, apply, operations=operations
        )
        work = cost.elementwise(self.cpu, math.prod(lazy.stored), operations)
        self.emit(label, ("map", shapes, lazy.stored, key), kernel, inputs, [out], work=work)
        return out

    def _epilogue_of(self, lazy: Lazy) -> Pending | None:
        """The product that can compute this operator: all else that it reads has the same shape."""
        leaves = list(self._leaves(lazy.call))
        if any(leaf.stored != lazy.stored for leaf in leaves):
            return None
        return next((leaf for leaf in leaves if isinstance(leaf, Pending)), None)

    def _leaves(self, call: Any) -> Iterator[Any]:
        for operand in call.args:
            if isinstance(operand, ir.Constant):
                continue
            found = self.values[operand]
            yield from self._leaves(found.call) if isinstance(found, Lazy) else [found]

    def _multiply(
        self,
        var: Any,
        pending: Pending,
        finish: Epilogue = PLAIN,
        operation: Any = None,
        others: Sequence[Value] = (),
    ) -> Value:
        """Append a product that was put off; `operation` is the key of its epilogue."""
        out, work = self.new(var, pending.stored), pending.work
        more = cost.elementwise(
            self.cpu, math.prod(pending.stored), _operations(operation) + len(others)
        )
        self.emit(
            pending.label if operation is None else f"{pending.label}_{_label(operation)}",
            (*pending.key, operation),
            lambda: pending.build(finish),
            [*pending.inputs, *others],
            [out],
            work=replace(work, steps=work.steps + more.steps),
        )
        return out

    def _expression(
        self, call: Any, inputs: list[Any]
    ) -> tuple[Any, Callable[[Sequence[Any]], Any]]:
        """A key of the expression, and what builds it from the loaded inputs."""
        parts = [self._part(operand, inputs) for operand in call.args]
        function = ELEMENTWISE[operator(call)]

        def build(loaded: Sequence[Any]) -> Any:
            values = [part(loaded) for _, part in parts]
            like = next(v for v in values if not isinstance(v, float))
            result = function(*(_like(like, v) for v in values))
            return result if _is_bool(operator(call)) else T.bind(result)

        return (operator(call), *(key for key, _ in parts)), build

    def _part(self, operand: Any, inputs: list[Any]) -> tuple[Any, Callable[[Sequence[Any]], Any]]:
        if isinstance(operand, ir.Constant):
            number = float(operand.value.numpy())
            return number, lambda _: number
        found = self.values[operand]
        if isinstance(found, Lazy):
            return self._expression(found.call, inputs)
        value = found if found in inputs else self.value(operand)
        if value not in inputs:
            inputs.append(value)
        at = inputs.index(value)
        return ("in", at), lambda loaded: loaded[at]


def allocate(steps: Sequence[tuple[str, tuple[Buffer, ...]]], base: int) -> int:
    """Give every temporary an offset from `base` on: first fit among those alive; returns the end.

    A buffer lives from the first step that names it to the last one; steps are run in order.
    """
    lives: dict[int, tuple[Buffer, int, int]] = {}
    for i, (_, buffers) in enumerate(steps):
        for b in buffers:
            if b.offset is None:
                _, first, _ = lives.get(id(b), (b, i, i))
                lives[id(b)] = (b, first, i)
    end = base
    alive: list[tuple[int, int, int]] = []  # (offset, end, last step)
    for b, first, last in lives.values():
        alive = sorted(entry for entry in alive if entry[2] >= first)
        at = base
        for start, stop, _ in alive:
            if at + b.bytes <= start:
                break
            at = max(at, align(stop))
        b.offset = at
        alive.append((at, at + b.bytes, last))
        end = max(end, align(at + b.bytes))
    return end


def _is_bool(name: str) -> bool:
    return name == "relax.greater"


def _label(key: Any) -> str:
    """The name of an expression's last operator."""
    return str(key[0]).rpartition(".")[2]


def _operations(key: Any) -> int:
    """Instructions of an expression, roughly."""
    if not isinstance(key, tuple) or key[0] == "in":
        return 0
    own = _HEAVY_OPERATIONS if key[0] in _HEAVY else 1
    return own + sum(map(_operations, key[1:]))


# Operators and their kernels.


def _like(x: Any, value: Any) -> Any:
    """A number in as many lanes as x."""
    return splat(value, int(DataType(str(x.ty.dtype)).lanes)) if isinstance(value, float) else value


def _relu(a: Any) -> Any:
    # NaN stays NaN, so that norms further on see it as well.
    return select(a < _like(a, 0.0), _like(a, 0.0), a)


def _gelu(a: Any) -> Any:
    return a * _like(a, 0.5) * (functions.erf(a * _like(a, math.sqrt(0.5))) + _like(a, 1.0))


def _gelu_tanh(a: Any) -> Any:
    inner = a * _like(a, math.sqrt(2 / math.pi)) * (a * a * _like(a, 0.044715) + _like(a, 1.0))
    return a * _like(a, 0.5) * (functions.tanh(inner) + _like(a, 1.0))


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "relax.add": lambda a, b: a + b,
    "relax.subtract": lambda a, b: a - b,
    "relax.multiply": lambda a, b: a * b,
    "relax.negative": lambda a: _like(a, 0.0) - a,
    "relax.exp": functions.exp,
    "relax.tanh": functions.tanh,
    "relax.sigmoid": functions.sigmoid,
    "relax.erf": functions.erf,
    "relax.greater": lambda a, b: a > b,
    "relax.where": select,
    "relax.nn.relu": _relu,
    "relax.nn.silu": lambda a: a * functions.sigmoid(a),
    "relax.nn.gelu": _gelu,
    "relax.nn.gelu_tanh": _gelu_tanh,
}
"""Elementwise operators as expressions; chains of them become one kernel."""

_HEAVY = {"relax.exp", "relax.tanh", "relax.sigmoid", "relax.erf"} | {
    f"relax.nn.{name}" for name in ("silu", "gelu", "gelu_tanh")
}
_HEAVY_OPERATIONS = 25
"""Instructions of a transcendental function, roughly: is a kernel worth two threads?"""


def _matmul(low: Lowering, var: Any, call: Any) -> None:
    a, b = call.args
    rows = _dims(a)
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
    conv = clipping.conv2d(_dims(call.args[0]), _dims(call.args[1]), call.attrs)
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
    conv = clipping.conv2d(_dims(var), _dims(call.args[1]), call.attrs)
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
    old, new = _dims(call.args[0]), _dims(var)
    if old == new:
        low.values[var] = x
        return
    if len(old) == 4 and not _same_order(old):
        x = low.channels_first(x, old)
    if len(new) == 4 and not _same_order(new):
        low.values[var] = low.channels_last(x, new)
        return
    low.values[var] = Value(x.buffer, _stored(new))


def _concat(low: Lowering, var: Any, call: Any) -> None:
    parts = [low.value(part) for part in call.args[0].fields]
    axis = _stored_axis(int(call.attrs.axis), len(_dims(var)))
    outer = math.prod(parts[0].stored[:axis])
    widths = tuple(math.prod(part.stored[axis:]) for part in parts)
    out = low.new(var, _stored(_dims(var)))
    build = lambda: layout.concatenate(low.cpu, outer, widths)  # noqa: E731
    low.emit("concat", ("concat", outer, widths), build, parts, [out])
    low.values[var] = out


def _split(low: Lowering, var: Any, call: Any) -> None:
    x = low.value(call.args[0])
    rank = len(_dims(call.args[0]))
    axis = _stored_axis(int(call.attrs.axis) % rank, rank)
    outer, width, start = math.prod(x.stored[:axis]), math.prod(x.stored[axis:]), 0
    parts = []
    for ty in var.ty.fields:
        part = low.temporary(_stored(tuple(int(d) for d in ty.shape)))
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
    window = _window(_stored(_dims(var)), call)
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
        finishes=window.tiled,
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
    name = _template(call)
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
        work=cost.matrix(low.cpu, k, m, n, low.precision),
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
    gradient = clipping.from_attributes(_attributes(call))
    conv = gradient.conv
    x, d, c = (low.value(v) for v in _operands(call))
    out = low.new(var, (conv.weights,))
    build = lambda: gradient.templates.weighted_gradient(low.cpu, conv)  # noqa: E731
    low.emit(
        "conv_gradient",
        ("conv_gradient", gradient),
        build,
        [Activations(x, conv), d, c],
        [out],
        work=cost.weighted_gradient(low.cpu, conv, gradient.algorithm),
    )
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
    name = _template(call)
    template = clip_kernels.clip_factors if name == "myelin.clip-factors" else clip_kernels.norm_sum
    inputs = [low.value(v) for v in _operands(call)]
    (n,) = _dims(var)
    bounds_ = [clipping.real(limit) for limit in limits]
    out = low.new(var, (n,))
    inflation, kappa = bounds_[:terms], bounds_[terms:]
    build = lambda: template(low.cpu, n, terms, grams, inflation=inflation, kappa=kappa)  # noqa: E731
    low.emit("norms", (name, n, terms, grams, *limits), build, inputs, [out])
    low.values[var] = out


TEMPLATES: dict[str, Callable[[Lowering, Any, Any], None]] = {
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
    "myelin.conv-gram": _conv_gram,
    "myelin.conv-gradient": _conv_gradient,
    "myelin.bias-stored": _bias_stored,
    "myelin.scale-stored": _scale_stored,
    "myelin.weighted-sum": _weighted_sum,
    "myelin.norm-sum": _norms,
    "myelin.clip-factors": _norms,
}
"""Where an operator's kernel is chosen: operator → the function that emits its calls."""


# Shapes and calls.


def _dims(var: Any) -> Shape:
    return tuple(int(d) for d in var.ty.shape)


def _stored(shape: Shape) -> Shape:
    """A Relax shape as stored: images channels last."""
    if len(shape) != 4:
        return shape
    n, c, h, w = shape
    return (n, h, w, c)


def _stored_axis(axis: int, rank: int) -> int:
    return (0, 3, 1, 2)[axis] if rank == 4 else axis


def _same_order(shape: Shape) -> bool:
    """Whether channels first and channels last are the same order of the same numbers."""
    _, c, h, w = shape
    return c == 1 or h * w == 1


def _pair(low: Lowering, *shapes: Shape) -> tuple[Value, ...]:
    return tuple(Value(Buffer(bytes=4 * math.prod(shape)), shape) for shape in shapes)


def _template(call: Any) -> str:
    """Name of a call in `TEMPLATES`."""
    if operator(call) == "relax.call_dps_packed":
        return str(call.args[0].global_symbol)
    return operator(call)


def _operands(call: Any) -> list[Any]:
    return list(call.args[1].fields)[:-1]


def _attributes(call: Any) -> list[int]:
    return [int(value) for value in call.args[1].fields[-1].values]


def _placed(buffer: Buffer) -> int:
    assert buffer.offset is not None
    return buffer.offset


# Around a program.


class _Recorder:
    """Writes the IR after each pass into a folder, if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, module: Any) -> None:
        self._write(f"{name}.py", lambda: str(module))

    def program(self, program: Program) -> None:
        """The list of calls, and every kernel's TIR."""
        lines = [
            f"{phase}: {call.kernel}({', '.join(map(str, call.offsets))})"
            for phase in ("gradient", "predict", "update")
            for call in getattr(program, phase)
        ]
        self._write("plan.txt", lambda: "\n".join([*lines, f"arena: {program.arena}", ""]))
        for name, kernel in program.kernels.items():
            self._write(f"{name}.py", lambda kernel=kernel: str(kernel))  # type: ignore[misc]

    def _write(self, name: str, text: Callable[[], str]) -> None:
        if self._folder is not None:
            (self._folder / f"{self._count:02d}-{name}").write_text(text())
            self._count += 1
