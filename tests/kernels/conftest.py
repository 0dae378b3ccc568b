"""Fixtures that prove a kernel in bounds, compile it and run it through TVM's runtime."""

import os

import numpy as np
import pytest
import tvm

from myelin.cpu import LEVELS, machine_features
from myelin.kernels import bounds
from myelin.kernels import object as kernel_object

# Or TVM may start one thread only; the pool starts with the first parallel loop.
os.environ.setdefault("TVM_NUM_THREADS", "2")


# Templates know nothing of a level but its lanes, its cache, and whether there are products of
# bfloat16 and registers for tiles: those have tests of their own. A cache decides how many tiles
# Winograd takes at once and whether a linear layer packs its weights: tests there make it small.
GENERIC = [cpu for cpu in LEVELS if cpu.runtime == cpu.level]


# What stands in memory before: not a number, or two that are none.
UNSET = {"float32": (np.nan, np.float32), "int32": (0x7FC07FC0, np.int32)}


@pytest.fixture(params=GENERIC, ids=lambda cpu: cpu.level)
def cpu(request):
    missing = request.param.missing(machine_features())
    if missing:
        pytest.skip(f"this machine lacks {' '.join(missing)}")
    return request.param


@pytest.fixture
def call(cpu):
    """call(kernel, *inputs) → outputs: the parameters beyond `inputs`, filled with NaN before.

    Inputs may have more axes than the parameters, as documented for merged axes.
    """

    def run(kernel, *inputs, outputs=1):
        bounds.prove(kernel)
        shapes = [tuple(int(extent) for extent in p.ty.shape) for p in kernel.params]
        assert len(inputs) + outputs == len(shapes)
        arrays = [np.ascontiguousarray(a).reshape(s) for a, s in zip(inputs, shapes, strict=False)]
        arrays += [
            np.full(shape, *UNSET[str(parameter.ty.dtype)])
            for shape, parameter in list(zip(shapes, kernel.params, strict=True))[len(inputs) :]
        ]
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        kernel_object.library({"kernel": kernel}, cpu)["kernel"](*tensors)
        results = [tensor.numpy() for tensor in tensors]
        # A kernel writes nothing but its outputs.
        for given, result in zip(arrays[: len(inputs)], results, strict=False):
            assert given.tobytes() == result.tobytes()
        return results[-1] if outputs == 1 else results[len(inputs) :]

    return run


@pytest.fixture
def in_place(cpu):
    """in_place(kernel, *arguments) → all arguments after the call."""

    def run(kernel, *arguments):
        bounds.prove(kernel)
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arguments]
        kernel_object.library({"kernel": kernel}, cpu)["kernel"](*tensors)
        return [tensor.numpy() for tensor in tensors]

    return run
