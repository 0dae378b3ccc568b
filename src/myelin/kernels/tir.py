"""The words in which kernels are written: ordinary Python that emits TIR loops, loads and stores.

Vectors have exactly the width asked for, 1 included, so that a tail is written like the rest:

    with Kernel(x=(n,), y=(n,)) as kernel:
        x, y = kernel.buffers
        for at, lanes in pieces(n, cpu.lanes):
            store(y, load(x, at, lanes=lanes) * splat(2.0, lanes), at)
    kernel.function
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, cast

from tvm import DataType, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import ForKind

STACK = 1024
"""Bytes of the largest local buffer: larger ones come from the heap."""

# Below this many vector operations a kernel runs on one thread: waking others takes longer.
PARALLEL_WORK = 16_384


class Kernel:
    """One PrimFunc under construction; parameters are float32 unless given as (shape, dtype)."""

    def __init__(self, **parameters: tuple[Any, ...]) -> None:
        """Takes name=shape or name=(shape, dtype), in the order of the arguments."""
        self._parameters = parameters
        self._stack = ExitStack()

    def __enter__(self) -> Kernel:
        """Starts the function; statements that follow go into it."""
        self._builder = self._stack.enter_context(IRBuilder())
        self._stack.enter_context(T.prim_func())
        T.func_name("kernel")
        T.func_attr({"tirx.noalias": True})
        self.buffers = []
        for name, parameter in self._parameters.items():
            shape, dtype = (
                parameter
                if parameter and isinstance(parameter[0], tuple)
                else (parameter, "float32")
            )
            self.buffers.append(T.arg(name, T.Buffer(shape, dtype)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the function."""
        self._stack.__exit__(kind, error, trace)

    @property
    def function(self) -> Any:
        """The finished `tvm.tirx.PrimFunc`."""
        return self._builder.get()


def local(*shape: int, dtype: str = "float32") -> Any:
    """Makes a buffer of this thread, on its stack or in registers.

    TVM puts a buffer of under 1 KiB there, and `myelin.kernels.object` one of 1 KiB, but only in
    the default scope: one of scope "local" is taken from the heap and given back by two calls.
    """
    if math.prod(shape) * DataType(dtype).bits // 8 > STACK:
        raise ValueError(f"a local buffer of shape {shape} is too large for the stack")
    return T.alloc_buffer(shape, dtype)


def workspace(*shape: int, dtype: str = "float32") -> Any:
    """Makes a buffer that parallel iterations inside its scope share; of any size."""
    return T.alloc_buffer(shape, dtype)


def load(buffer: Any, *index: Any, lanes: int = 1) -> Any:
    """Reads `lanes` neighbours along the last axis from `index` on."""
    return buffer[_at(index, lanes)]


def store(buffer: Any, value: Any, *index: Any) -> None:
    """Writes a scalar or a vector along the last axis from `index` on."""
    T.buffer_store(buffer, value, list(_at(index, _lanes(value))))


def prefetch(buffer: Any, *index: Any) -> None:
    """Asks for the line of an element that is read later, into the second level of caches: there it
    does not take the place of what is read now.
    """
    reads, level, data = 0, 2, 1
    address = T.address_of(buffer[index])
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, reads, level, data))


PRAGMA = "pragma_import_llvm"


def llvm(text: str) -> Any:
    """The scope in which the functions of a text in LLVM's language may be called."""
    return T.attr(T.int32(0), PRAGMA, text)


def splat(value: Any, lanes: int) -> Any:
    """Repeats a number or a scalar expression in a vector."""
    if isinstance(value, int | float):
        value = number(value)
    return T.Broadcast(value, lanes) if lanes > 1 else value


def number(value: float) -> Any:
    """Makes a float32 constant, rounded here and not by a printer or the compiler."""
    return T.float32(struct.unpack("<f", struct.pack("<f", value))[0])


def select(condition: Any, then: Any, otherwise: Any) -> Any:
    """Chooses lane by lane without a branch; both values are computed."""
    return T.Select(condition, then, otherwise)


def serial(extent: Any) -> Any:
    """Loops on this thread."""
    return T.serial(extent)


def tasks(extent: int, work: int) -> Any:
    """Loops over independent iterations, on all threads if `work` vector operations merit it."""
    return T.parallel(extent) if extent > 1 and work >= PARALLEL_WORK else T.serial(extent)


def pieces(extent: int, lanes: int) -> list[tuple[int, int]]:
    """Cuts `extent` into vectors: (offset, lanes) of each, the last one narrower."""
    return [(at, min(lanes, extent - at)) for at in range(0, extent, lanes)]


def blocks(
    extent: int, block: int, loop: Callable[[int], Any] = serial
) -> Iterator[tuple[Any, int]]:
    """Loops over `extent` in blocks; the body is emitted for full blocks and again for the rest.

    Gives (offset, size). Use as `for at, size in blocks(...)` without break.

    """
    full, rest = divmod(extent, block)
    if full == 1:
        yield 0, block
    elif full > 1:
        with loop(full) as index:
            yield index * block, block
    if rest:
        yield full * block, rest


def vectors(extent: int, lanes: int, unroll: int = 4) -> Iterator[tuple[Any, int]]:
    """Loops over `extent` in vectors, `unroll` of them an iteration; gives (offset, lanes)."""
    for at, size in blocks(extent, lanes * unroll):
        for offset, width in pieces(size, lanes):
            yield at + offset, width


def total(buffer: Any, extent: int, add: Callable[[Any, Any], Any] = operator.add) -> Any:
    """Adds (or combines otherwise) the elements of a small local buffer as a balanced tree."""
    terms = [buffer[i] for i in range(extent)]
    while len(terms) > 1:
        pairs = [add(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def transposed(rows: Sequence[Any]) -> list[Any]:
    """The columns of a matrix whose rows are vectors.

    Square matrices by shuffles of pairs of vectors, half a vector's neighbours at a time; others
    number by number.
    """
    height, width = len(rows), _lanes(rows[0])
    bound = [T.bind(row) for row in rows]
    if height != width or width & (width - 1) or width == 1:
        return [
            joined([row if width == 1 else _shuffle([row], [column]) for row in bound])
            for column in range(width)
        ]
    step = 1
    while step < width:
        swapped = list(bound)
        for i in range(width):
            if not i & step:
                pair = [bound[i], bound[i + step]]
                low = [j if not j & step else width + j - step for j in range(width)]
                high = [j + step if not j & step else width + j for j in range(width)]
                swapped[i] = T.bind(_shuffle(pair, low))
                swapped[i + step] = T.bind(_shuffle(pair, high))
        bound, step = swapped, 2 * step
    return bound


def joined(values: Sequence[Any]) -> Any:
    """One vector of the lanes of scalars or vectors, one after the other."""
    return values[0] if len(values) == 1 else _shuffle(values, range(sum(map(_lanes, values))))


def _shuffle(vectors: Sequence[Any], lanes: Sequence[int]) -> Any:
    """Lanes of vectors that follow each other."""
    return tirx.Shuffle(list(vectors), [tirx.IntImm("int32", lane) for lane in lanes])


TINY = 2.0**-126
"""The smallest normal float32: what flushing to zero can take from one term."""


def gamma(additions: int) -> float:
    """γ_n = n·u / (1 − n·u), u = 2⁻²⁴: bounds the relative error of n float32 roundings in a row.

    (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, lemma 3.1.) It holds for a
    sum of non-negative terms in any order, fused multiply-adds included.
    """
    error = additions * 2.0**-24
    return error / (1 - error)


def is_parallel(function: Any) -> bool:
    """Whether any loop of a kernel runs on all threads."""
    return any(
        type(node).__name__ == "For" and node.kind == ForKind.PARALLEL
        for node in walk(function.body)
    )


def walk(node: Any) -> Iterator[Any]:
    """Visits every statement and expression below `node`, itself included, in order."""
    yield node
    for name in _CHILDREN.get(type(node).__name__, ()):
        child = getattr(node, name)
        if child is None:
            continue
        for part in child if _is_sequence(child) else [child]:
            yield from walk(part)


# Where each node of TIR keeps its statements and expressions.
_CHILDREN: dict[str, tuple[str, ...]] = {
    "SeqStmt": ("seq",),
    "For": ("min", "extent", "step", "body"),
    "While": ("condition", "body"),
    "AttrStmt": ("value", "body"),
    "IfThenElse": ("condition", "then_case", "else_case"),
    "DeclBuffer": ("data",),
    "AllocBuffer": (),
    "Bind": ("value",),
    "BufferStore": ("value", "indices"),
    "TensorLoad": ("indices",),
    "Evaluate": ("value",),
    "Return": ("value",),
    "AssertStmt": ("condition",),
    "Let": ("value", "body"),
    "Cast": ("value",),
    "Not": ("a",),
    "Select": ("condition", "true_value", "false_value"),
    "Ramp": ("base", "stride", "lanes"),
    "Broadcast": ("value", "lanes"),
    "Shuffle": ("vectors", "indices"),
    "Call": ("args",),
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Mod", "FloorDiv", "FloorMod", "Min", "Max"), ("a", "b")
    ),
    **dict.fromkeys(("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LShift", "RShift"), ("a", "b")),
    **dict.fromkeys(("EQ", "NE", "LT", "LE", "GT", "GE", "And", "Or"), ("a", "b")),
}


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) or type(value).__name__ == "Array"


def _at(index: tuple[Any, ...], lanes: int) -> tuple[Any, ...]:
    *outer, last = index
    return (*outer, T.Ramp(last, 1, lanes)) if lanes > 1 else (*outer, last)


def _lanes(value: Any) -> int:
    return cast(int, DataType(str(value.ty.dtype)).lanes)
