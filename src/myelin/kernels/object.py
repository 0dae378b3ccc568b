"""Compiles kernels to one relocatable object with a plain C ABI, or for TVM's own runtime.

In the object every kernel is `int32_t name(void *a0, ...)`, one pointer a buffer, result 0 unless
it failed. Shapes are not checked there: `argument_bytes` is what the caller has to check against,
and `bounds.prove` shows that a kernel stays inside them.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm_ffi import structural_map

from myelin.cpu import Cpu, CpuUnsupported
from myelin.errors import MyelinError
from myelin.kernels.tir import STACK, walk

# What the enclave runtime supplies: two memory functions and TVM's backend calls, which the object
# reaches through weak cells of one pointer each.
ALLOWED = frozenset(
    {
        "memcpy",
        "memset",
        "__TVMBackendParallelLaunch",
        "__TVMBackendAllocWorkspace",
        "__TVMBackendFreeWorkspace",
    }
)
MAX_ARGUMENTS = 14


class KernelRefused(MyelinError):
    """A kernel that cannot go into an image: too many arguments, or a symbol of someone else's."""


def build(kernels: Mapping[str, Any], cpu: Cpu) -> bytes:
    """Compiles `kernels` (name to PrimFunc) to a relocatable ELF64 object for `cpu`.

    Raises `KernelRefused` when a kernel has more than 14 arguments or leaves a symbol undefined
    that is not `ALLOWED`.
    """
    for name, kernel in kernels.items():
        if len(kernel.params) > MAX_ARGUMENTS:
            raise KernelRefused(
                f"kernel {name} has {len(kernel.params)} arguments, the runtime passes at most"
                f" {MAX_ARGUMENTS}: split it"
            )
    module = tvm.get_global_func("target.build.llvm")(_lower(kernels, cpu, _c_abi), cpu.target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.o")
        module.write_to_file(str(path), "o")
        code = path.read_bytes()
    if foreign := undefined(code) - ALLOWED:
        raise KernelRefused(
            f"kernels leave {', '.join(sorted(foreign))} undefined; the enclave supplies only"
            f" {', '.join(sorted(ALLOWED))}: use kernels.functions instead of library functions"
        )
    return code


def library(kernels: Mapping[str, Any], cpu: Cpu) -> Any:
    """Compiles the same kernels for TVM's runtime: `library(...)[name](tensor, ...)` runs one.

    Where they need tile registers it asks the system for them, as the cell does.
    """
    if "amx_tile" in cpu.features:
        _permit_tiles()
    return tvm.get_global_func("target.build.llvm")(_lower(kernels, cpu, _packed), cpu.target)


def argument_bytes(kernel: Any) -> list[int]:
    """Gives the size in bytes of every argument of a PrimFunc."""
    return [_bytes(parameter) for parameter in kernel.params]


def workspace_bytes(kernels: Mapping[str, Any], cpu: Cpu) -> int:
    """Bounds the workspace in bytes that one thread slot needs for any of `kernels`.

    TVM's calls take and give back blocks like a stack; a block is rounded up to 64 bytes.
    """
    needed = [0]
    for function in _lower(kernels, cpu, _c_abi).functions.values():
        total = 0
        for node in walk(function.body):
            if isinstance(node, tvm.ir.Call) and node.op.name == "tirx.TVMBackendAllocWorkspace":
                total += -(-int(node.args[2].value) // 64) * 64
        needed.append(total)
    return max(needed)


def undefined(code: bytes) -> set[str]:
    """Lists the symbols that a little-endian ELF64 object needs from elsewhere."""
    section_headers = struct.unpack_from("<Q", code, 0x28)[0]
    header_size, count = struct.unpack_from("<HH", code, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", code, section_headers + header_size * i)
        for i in range(count)
    ]
    names: set[str] = set()
    for _, kind, _, _, offset, size, link, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        strings = sections[link][4]
        for symbol in range(offset + entry, offset + size, entry):
            name, _, _, section = struct.unpack_from("<IBBH", code, symbol)
            if section == 0:
                end = code.index(b"\0", strings + name)
                names.add(code[strings + name : end].decode())
    return names


def _permit_tiles() -> None:
    """Lets this process use the tile registers of AMX: a process has them off until it asks."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    if ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request, tile_data):
        reason = os.strerror(ctypes.get_errno())
        raise CpuUnsupported(f"the system gives this process no AMX tile registers: {reason}")


def _lower(kernels: Mapping[str, Any], cpu: Cpu, abi: Any) -> Any:
    """Lowers PrimFuncs for the code generator; `abi` gives the pass that fixes how to call them."""
    target = cpu.target
    module = tvm.IRModule({n: f.with_attr("global_symbol", n) for n, f in kernels.items()})
    # TVM's own list for a CPU without the passes that would change what we wrote:
    # RewriteUnsafeSelect turns selects into branches on data, LoopPartition and HoistIfThenElse
    # copy code.
    passes = [
        tirx.transform.BindTarget(target.with_host(target)),
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        _on_stack(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        abi(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.LowerTVMBuiltin(),
        tirx.transform.LowerIntrin(),
    ]
    with tvm.transform.PassContext(), target:
        return tvm.ir.transform.Sequential(passes)(module)


def _on_stack() -> Any:
    """Keeps local buffers of `STACK` bytes on the stack; TVM does so for smaller ones only."""
    marked = {"disable_lower_builtin": tirx.IntImm("bool", 1)}

    def mark(node: Any) -> Any:
        return tirx.AllocBuffer(node.buffer, marked) if _bytes(node.buffer) == STACK else node

    def transform(function: Any, _module: Any, _context: Any) -> Any:
        return function.with_body(structural_map(function.body, (tirx.AllocBuffer, mark)))

    return tirx.transform.prim_func_pass(transform, opt_level=0, name="OnStack")


def _packed() -> Any:
    return tirx.transform.MakePackedAPI()


def _c_abi() -> Any:
    def transform(module: Any, _context: Any) -> Any:
        return tvm.IRModule({g: _pointers(f) for g, f in module.functions.items()})

    return tvm.transform.module_pass(transform, opt_level=0, name="CAbi")


def _pointers(function: Any) -> Any:
    """Turns buffer parameters into pointers and returns 0."""
    if not any(tirx.buffer.is_buffer_var(p) for p in function.params):
        return function
    pointers = [
        tirx.Var(f"{p.name}_pointer", tvm.ir.PointerType(p.ty.dtype)) for p in function.params
    ]
    body = function.body
    # LowerTVMBuiltin wants the device. `return` stays outside of this scope, or workspaces would
    # never be freed.
    for key, value in (("device_id", 0), ("device_type", 1)):
        body = tirx.AttrStmt(tvm.ir.StringImm("default"), key, tirx.const(value, "int32"), body)
    declared = [tirx.DeclBuffer(b, data=p) for b, p in zip(function.params, pointers, strict=True)]
    body = tirx.SeqStmt([*declared, body, tirx.stmt.Return(tirx.const(0, "int32"))])
    return tirx.PrimFunc(pointers, body, tvm.ir.PrimType("int32"), function.attrs)


def _bytes(buffer: Any) -> int:
    elements = math.prod(int(extent) for extent in buffer.ty.shape)
    return elements * int(tvm.DataType(str(buffer.ty.dtype)).bits) // 8
