"""One Relax function as kernel calls in memory: what is put off, fused, padded, kept.

`Lowering` walks a function's bindings and asks a table of templates (`myelin.operators`) for each
operator's calls. Images are stored channels last (NHWC), everything else as Relax sees it;
elementwise chains become one kernel, or the epilogue of the product before them; temporaries that
never live together share memory (`allocate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tvm import DataType, ir, relax
from tvm.script.ir_builder import tirx as T  # noqa: N812

from myelin import cost
from myelin.cost import Work
from myelin.cpu import Cpu, Precision
from myelin.errors import ModelRefused
from myelin.graph import bindings, operands, operator, returned
from myelin.kernels import conv as conv_kernels
from myelin.kernels import elementwise, functions, layout
from myelin.kernels import object as kernel_object
from myelin.kernels.conv import Conv
from myelin.kernels.epilogue import PLAIN, Epilogue
from myelin.kernels.pool import Pool
from myelin.kernels.tir import is_parallel, select, splat
from myelin.program import Call
from myelin.weights import ALIGNMENT, align

Shape = tuple[int, ...]
Templates = Mapping[str, Callable[["Lowering", Any, Any], None]]
"""Operator → the function that emits its calls, given the lowering, its variable and its call."""

FUSED = 8
"""Values that elementwise operators in one kernel read, so that none has too many arguments."""


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

    def __init__(self, library: Kernels, function: Any, templates: Templates) -> None:
        """Prepare for `run`; kernels go to `library`."""
        self.templates = templates
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
    ) -> None:
        """Record a product, for the sum with its bias as well where its kernel adds that.

        `build` takes an `Epilogue`.
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
        if reader is None or _is_bool(reader):
            self.values[var] = self.value(target)

    def temporary(self, stored: Shape) -> Value:
        """Memory for something between."""
        return Value(Buffer(bytes=4 * math.prod(stored)), stored)

    def channels_last(self, x: Value, shape: Shape) -> Value:
        """A copy of x, channels first of the given shape, in the order images are stored in."""
        y = self.temporary(stored_shape(shape))
        build = lambda: layout.nhwc(self.cpu, *shape)  # noqa: E731
        work = cost.copy(self.cpu, math.prod(shape), scalar=True)
        self.emit("nhwc", ("nhwc", shape), build, [x], [y], work=work)
        return y

    def channels_first(self, x: Value, shape: Shape) -> Value:
        """A copy of an image as stored, of Relax's shape, in channels-first order."""
        y = self.temporary(shape)
        build = lambda: layout.nchw(self.cpu, *stored_shape(shape))  # noqa: E731
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
        shape = dims(var)
        if len(shape) == 4 and var.same_as(self.function.params[0]):
            if same_order(shape):
                return Value(value.buffer, stored_shape(shape))
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
            stored = stored_shape(dims(var))
            self.values[var] = Lazy(value, stored)
            if self._keeps(var):
                self.value(var)
        else:
            template = self.templates.get(template_name(value))
            if template is None:
                raise ModelRefused(f"no kernel for {template_name(value)}")
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
    """Give every temporary an offset from `base` on, those that never live together in one place;
    returns the end.

    A buffer lives from the first step that names it to the last one; steps are run in order. The
    largest come first, each into the first place that is free while it lives (greedy by size:
    Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020). A place is
    not divided.

    Buffers of a place share its middle. Examples are dealt out to threads from both ends, so of two
    threads the same one writes on the same side of any buffer that is laid out by example, as most
    are: between cores without a common cache, writing where the other wrote last takes several
    times as long.
    """
    lives: dict[int, tuple[Buffer, int, int]] = {}
    for i, (_, buffers) in enumerate(steps):
        for b in buffers:
            if b.offset is None:
                _, first, _ = lives.get(id(b), (b, i, i))
                lives[id(b)] = (b, first, i)
    places: list[list[tuple[Buffer, int, int]]] = []
    for b, first, last in sorted(lives.values(), key=lambda life: -life[0].bytes):
        free = (p for p in places if all(last < start or end < first for _, start, end in p))
        place = next(free, [])
        if not place:
            places.append(place)
        place.append((b, first, last))
    for place in places:
        half = align(-(-place[0][0].bytes // 2))
        for b, _, _ in place:
            b.offset = base + (half - b.bytes // 2) // ALIGNMENT * ALIGNMENT
        base += 2 * half
    return base


# Elementwise operators.


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


# Shapes and calls.


def dims(var: Any) -> Shape:
    """A variable's shape in Relax."""
    return tuple(int(d) for d in var.ty.shape)


def stored_shape(shape: Shape) -> Shape:
    """A Relax shape as stored: images channels last."""
    if len(shape) != 4:
        return shape
    n, c, h, w = shape
    return (n, h, w, c)


def stored_axis(axis: int, rank: int) -> int:
    """A Relax axis as stored."""
    return (0, 3, 1, 2)[axis] if rank == 4 else axis


def same_order(shape: Shape) -> bool:
    """Whether channels first and channels last are the same order of the same numbers."""
    _, c, h, w = shape
    return c == 1 or h * w == 1


def template_name(call: Any) -> str:
    """Name of a call among templates."""
    if operator(call) == "relax.call_dps_packed":
        return str(call.args[0].global_symbol)
    return operator(call)


def _placed(buffer: Buffer) -> int:
    assert buffer.offset is not None
    return buffer.offset
