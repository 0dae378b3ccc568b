import ctypes
import subprocess

import numpy as np
import pytest
import tvm
from templates import every_template
from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels import elementwise, layout, linear, loss, reduce
from myelin.kernels import object as kernel_object


def test_templates_leave_only_what_the_enclave_supplies(cpu):
    kernels = every_template(cpu)
    code = kernel_object.build(kernels, cpu)
    assert kernel_object.undefined(code) <= kernel_object.ALLOWED
    assert code[:5] == b"\x7fELF\x02"
    assert code == kernel_object.build(kernels, cpu), "the same kernels gave other bytes"


def test_library_function_is_refused_by_name():
    cpu = Cpu.native()
    kernel = elementwise.map(cpu, [(100,)], (100,), T.exp)
    with pytest.raises(kernel_object.KernelRefused, match="expf"):
        kernel_object.build({"uses_exp": kernel}, cpu)


def test_too_many_arguments_are_refused():
    cpu = Cpu.native()
    kernel = layout.concatenate(cpu, 2, [1] * 14)
    with pytest.raises(kernel_object.KernelRefused, match="kernel join has 15 arguments"):
        kernel_object.build({"join": kernel}, cpu)


def test_argument_bytes():
    kernel = loss.cross_entropy_adjoint(Cpu.native(), 7, 10)
    assert kernel_object.argument_bytes(kernel) == [280, 28, 280]


def test_workspace_bytes():
    cpu = Cpu.native()
    assert kernel_object.workspace_bytes({"serial": reduce.softmax(cpu, 3, 5)}, cpu) == 0
    panel = 200 * 2 * cpu.lanes * 4  # of its own for each task
    kernels = {"packs": linear.backward_data(cpu, 256, 50, 200)}
    assert kernel_object.workspace_bytes(kernels, cpu) == panel


def test_object_runs_with_a_plain_c_abi_and_gives_the_same_bits(tmp_path):
    cpu = Cpu.native()
    kernels = {"product": linear.matmul(cpu, 5, 7, 3, bias=True)}
    (tmp_path / "kernels.o").write_bytes(kernel_object.build(kernels, cpu))
    # The cells of TVM's backend are weak and stay empty: this kernel is small and calls none.
    shared = tmp_path / "kernels.so"
    subprocess.run(["cc", "-shared", "-o", shared, tmp_path / "kernels.o"], check=True)
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(s).astype(np.float32) for s in ((5, 7), (7, 3), (3,)))
    raw = np.empty((5, 3), np.float32)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (x, w, b, raw)]
    assert ctypes.CDLL(str(shared)).product(*pointers) == 0
    tensors = [tvm.runtime.tensor(a) for a in (x, w, b, np.empty_like(raw))]
    kernel_object.library(kernels, cpu)["product"](*tensors)
    assert raw.tobytes() == tensors[-1].numpy().tobytes()
