"""Proves that a kernel stays inside its buffers.

The C ABI passes bare pointers and checks nothing, so what `prove` accepts is what keeps the
enclave's memory apart: every load, store and prefetch, vectors included, has indices that depend on
loop variables only and lie in the buffer's shape for all their values. Control flow must not depend
on data either. Anything that is not understood is refused.

The words of `myelin.kernels.bf16` are accepted in LLVM's language, these very bytes: they compute
values from values. So are those of `myelin.kernels.stream`, of which one stores a whole line: that
is in bounds like any other store, and begins where a line of an argument does, or the processor
would stop. The proof is about TIR as the template wrote it; that TVM and LLVM compile it faithfully
is trusted.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import DataType, tirx
from tvm.ir import Op, Range, TensorLoad, Var
from tvm.sym import Analyzer
from tvm.tirx.buffer import is_buffer_var

from myelin.errors import MyelinError
from myelin.kernels import bf16, stream
from myelin.kernels.tir import PRAGMA, walk

# Index arithmetic is done in 32 bits.
_LARGEST = 2**31 - 1

# Calls that compute a value from values.
_PURE = frozenset(
    f"tirx.{name}"
    for name in (
        *("reinterpret", "sqrt", "floor", "ceil", "trunc", "round", "nearbyint", "fabs", "fma"),
        *("isnan", "likely"),
    )
)


_PREFETCH, _ADDRESS_OF, _EXTERN = (
    Op.get(f"tirx.{name}") for name in ("prefetch", "address_of", "call_extern")
)
# What may stand in LLVM's language.
_TEXTS = bf16.TEXTS | {stream.WORDS}


class BoundsError(MyelinError):
    """A kernel is not shown to stay inside its buffers.

    `kernel`, `buffer` and `index` name the access, `range` says what was found about the index.
    """

    def __init__(self, kernel: str, buffer: str, index: str, range: str) -> None:  # noqa: A002
        """Keeps the parts, so that a caller can tell them apart."""
        super().__init__(f"kernel {kernel}: {buffer}[{index}]: {range}")
        self.kernel = kernel
        self.buffer = buffer
        self.index = index
        self.range = range


def prove(function: Any, name: str | None = None) -> None:
    """Returns if every access of the PrimFunc `function` is in bounds, else raises `BoundsError`.

    `name` is what errors call the kernel; by default its `global_symbol`.
    """
    attributes = function.attrs
    symbol = attributes["global_symbol"] if attributes and "global_symbol" in attributes else None
    proof = _Proof(name or str(symbol or "(unnamed)"), list(function.params))
    for parameter in function.params:
        if not is_buffer_var(parameter):
            raise BoundsError(proof.kernel, parameter.name, "", "parameter is not a buffer")
        proof.declare(parameter)
    proof.statement(function.body)
    proof.ended("kernel")


class _Proof:
    """Walks one kernel in program order, keeping what is known of its variables."""

    def __init__(self, kernel: str, arguments: list[Any]) -> None:
        self.kernel, self.arguments = kernel, arguments
        self._analyzer = Analyzer()
        self._data: list[Any] = []
        self._streaming = False
        self._shapes: list[tuple[Any, tuple[int, ...]]] = []

    def declare(self, buffer: Any) -> None:
        shape = []
        for extent in buffer.ty.shape:
            if not isinstance(extent, tirx.IntImm):
                raise self._refusal(buffer, extent, "shape is not constant")
            shape.append(int(extent.value))
        if len(buffer.strides) or str(buffer.elem_offset) != "0":
            raise self._refusal(buffer, "", "buffer has strides or an offset")
        if math.prod(shape) > _LARGEST:
            raise self._refusal(buffer, "", f"shape {shape} is too large for 32-bit indices")
        self._shapes.append((buffer, tuple(shape)))

    def statement(self, node: Any) -> None:
        match type(node).__name__:
            case "SeqStmt":
                for part in node.seq:
                    self.statement(part)
            case "For":
                self._loop(node)
            case "IfThenElse":
                self._oblivious(node.condition, "condition")
                self.expression(node.condition)
                before = self._streaming
                with self._analyzer.constraint_scope(node.condition):
                    self.statement(node.then_case)
                then, self._streaming = self._streaming, before
                if node.else_case is not None:
                    with self._analyzer.constraint_scope(tirx.Not(node.condition)):
                        self.statement(node.else_case)
                self._streaming |= then
            case "AllocBuffer":
                self.declare(node.buffer)
            case "Bind":
                self._bind(node)
            case "BufferStore":
                self.expression(node.value)
                self._access(node.buffer, node.indices, _lanes(node.value))
            case "Evaluate" if getattr(node.value, "op", None) == _PREFETCH:
                self._prefetch(node.value)
            case "Evaluate" if getattr(node.value, "op", None) == _EXTERN:
                self._stream(node.value)
            case "Evaluate":
                self.expression(node.value)
            case "AttrStmt" if node.attr_key == PRAGMA and _text(node.value) in _TEXTS:
                self.statement(node.body)
            case kind:
                raise self._refusal(kind, "", "statement is not one that this proof understands")

    def expression(self, node: Any) -> None:
        """Checks every load below `node`; both values of a select are always computed."""
        for part in walk(node):
            match type(part).__name__:
                case "TensorLoad":
                    self._access(part.source, part.indices, _lanes(part))
                case "Call" if part.op.name == "tirx.call_pure_extern":
                    if _text(part.args[0]) not in bf16.NAMES:
                        raise self._refusal(_text(part.args[0]), "", "function is not one of ours")
                case "Call" if part.op.name not in _PURE:
                    raise self._refusal(part.op.name, "", "call is not one that computes a value")
                case "Var" if is_buffer_var(part):
                    raise self._refusal(part.name, "", "buffer is used without an index")
                case kind if kind not in _EXPRESSIONS:
                    raise self._refusal(kind, "", "expression is not understood by this proof")

    def _loop(self, node: Any) -> None:
        self._oblivious(node.min, "loop")
        self._oblivious(node.extent, "loop")
        self.expression(node.min)
        self.expression(node.extent)
        if node.step is not None and not (
            isinstance(node.step, tirx.IntImm) and int(node.step.value) == 1
        ):
            raise self._refusal("loop", node.loop_var.name, "step is not 1")
        bound = self._analyzer.const_int_bound(node.min + node.extent)
        if int(bound.max_value) > _LARGEST:
            raise self._refusal("loop", node.loop_var.name, "extent is not bounded")
        self._analyzer.bind(node.loop_var, Range.from_min_extent(node.min, node.extent))
        before = self._streaming
        self.statement(node.body)
        if node.kind == tirx.ForKind.PARALLEL:
            self.ended("loop")
        self._streaming |= before

    def _bind(self, node: Any) -> None:
        self.expression(node.value)
        if self._depends_on_data(node.value):
            self._data.append(node.var)
        elif _lanes(node.value) == 1 and str(node.value.ty.dtype).startswith(("int", "uint")):
            self._analyzer.bind(node.var, node.value)
        else:
            self._data.append(node.var)

    def _prefetch(self, node: Any) -> None:
        """A prefetch is of an element that could be read."""
        address, *hints = list(node.args) or [None]
        taken = list(address.args) if getattr(address, "op", None) == _ADDRESS_OF else []
        known = len(hints) == 3 and all(isinstance(hint, tirx.IntImm) for hint in hints)
        if not known or len(taken) != 1 or not isinstance(taken[0], TensorLoad):
            raise self._refusal("tirx.prefetch", node, "is not of an element")
        self.expression(taken[0])

    def _stream(self, node: Any) -> None:
        """A line that is stored past the caches, or the end of some."""
        match [_text(node.args[0]), *node.args[1:]]:
            case [stream.END] if _type(node) == "int32":
                self._streaming = False
                return
            case [stream.LINE, address, value] if (
                getattr(address, "op", None) == _ADDRESS_OF and _type(node) == "int32"
            ):
                taken = list(address.args)
            case [name, *_]:
                raise self._refusal(name, node, "function is not one of ours")
        if len(taken) != 1 or not isinstance(taken[0], TensorLoad) or _lanes(taken[0]) != 1:
            raise self._refusal(stream.LINE, node, "is not of an element")
        if _type(taken[0]) != "float32" or _type(value) != f"float32x{stream.LANES}":
            raise self._refusal(stream.LINE, node, "is not of a line's numbers")
        buffer, (*outer, last) = taken[0].source, taken[0].indices
        self.expression(value)
        self._access(buffer, [*outer, tirx.Ramp(last, 1, stream.LANES)], _lanes(value))
        if not any(buffer.same_as(argument) for argument in self.arguments):
            raise self._refusal(buffer, last, "is no argument, whose lines are known")
        row, start = self._shape(buffer)[-1], self._analyzer.modular_set(last)
        if row % stream.LANES or start.coeff % stream.LANES or start.base % stream.LANES:
            raise self._refusal(buffer, last, "is not shown to begin a line")
        self._streaming = True

    def ended(self, what: str) -> None:
        """Other threads may read what was stored past the caches."""
        if self._streaming:
            raise self._refusal(what, "", f"{stream.END} is missing at its end")

    def _access(self, buffer: Any, indices: Any, lanes: int) -> None:
        shape = self._shape(buffer)
        if len(indices) != len(shape):
            raise self._refusal(buffer, "", f"has {len(shape)} axes, not {len(indices)}")
        *outer, last = indices
        for index, extent in zip(outer, shape, strict=False):
            self._inside(buffer, index, index, extent)
        if isinstance(last, tirx.Ramp):
            if not isinstance(last.stride, tirx.IntImm) or int(last.stride.value) < 1:
                raise self._refusal(buffer, last, "vector has no constant positive stride")
            self._inside(buffer, last.base, last.base, shape[-1])
            reach = int(last.stride.value) * (_lanes(last) - 1)
            self._inside(buffer, last, last.base + reach, shape[-1])
        else:
            self._inside(buffer, last, last, shape[-1])
        if lanes != _lanes(last):
            raise self._refusal(buffer, last, f"moves {lanes} lanes at {_lanes(last)} places")

    def _inside(self, buffer: Any, shown: Any, index: Any, extent: int) -> None:
        if isinstance(index, int | tirx.IntImm):
            value = index if isinstance(index, int) else int(index.value)
            if 0 <= value < extent:
                return
            raise self._refusal(buffer, shown, f"reaches {value}, outside of 0 … {extent - 1}")
        if _lanes(index) != 1:
            raise self._refusal(buffer, shown, "vector index is not a ramp along the last axis")
        if self._depends_on_data(index):
            raise self._refusal(buffer, shown, "index depends on data")
        self.expression(index)
        bound = self._analyzer.const_int_bound(index)
        low, high = int(bound.min_value), int(bound.max_value)
        if low >= 0 and high < extent:
            return
        if self._analyzer.can_prove(tirx.And(index >= 0, index < extent)):
            return
        raise self._refusal(
            buffer, shown, f"reaches {low} … {high}, not shown inside of 0 … {extent - 1}"
        )

    def _oblivious(self, node: Any, what: str) -> None:
        if self._depends_on_data(node):
            raise self._refusal(what, node, "control flow depends on data")

    def _depends_on_data(self, node: Any) -> bool:
        return any(
            isinstance(part, TensorLoad)
            or (isinstance(part, Var) and any(part.same_as(v) for v in self._data))
            for part in walk(node)
        )

    def _shape(self, buffer: Any) -> tuple[int, ...]:
        for known, shape in self._shapes:
            if known.same_as(buffer):
                return shape
        raise self._refusal(buffer, "", "buffer is not declared in this kernel")

    def _refusal(self, buffer: Any, index: Any, found: str) -> BoundsError:
        name = buffer if isinstance(buffer, str) else buffer.name or "(local)"
        return BoundsError(self.kernel, name, str(index), found)


# What may stand in an expression; `walk` knows the parts of each.
_EXPRESSIONS = frozenset(
    {
        *(
            "IntImm",
            "FloatImm",
            "StringImm",
            "Var",
            "TensorLoad",
            "Call",
            "Cast",
            "Select",
            "Not",
            "Ramp",
        ),
        *("Broadcast", "Shuffle", "Add", "Sub", "Mul", "Div", "Mod", "FloorDiv", "FloorMod"),
        *("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LShift", "RShift"),
        *("Min", "Max", "EQ", "NE", "LT", "LE", "GT", "GE", "And", "Or", "int"),
    }
)


def _text(node: Any) -> str:
    return str(getattr(node, "value", node))


def _type(node: Any) -> str:
    return str(node.ty.dtype)


def _lanes(node: Any) -> int:
    return int(DataType(_type(node)).lanes)
