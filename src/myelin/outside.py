"""Runs a program on this machine, outside any enclave."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from myelin.cpu import Cpu
from myelin.errors import DataRefused
from myelin.kernels import object as kernel_object
from myelin.program import Call, Program
from myelin.weights import pack

Array = npt.NDArray[np.float32]


class Outside:
    """Runs a program's kernels through TVM's runtime, on this machine and outside any enclave.

    For tests, baselines and benchmarks: nothing here is protected, and nothing is noised.
    """

    def __init__(self, program: Program, cpu: Cpu) -> None:
        """Compile the kernels and make an arena of zeros."""
        import tvm

        self.program = program
        memory = np.zeros(program.arena + 64, np.uint8)
        first = -memory.ctypes.data % 64
        self._arena = memory[first : first + program.arena]
        compiled = kernel_object.library(program.kernels, cpu)

        def tensor(parameter: Any, offset: int) -> Any:
            shape = tuple(int(d) for d in parameter.ty.shape)
            kind = np.dtype(str(parameter.ty.dtype))
            size = math.prod(shape) * kind.itemsize
            view = self._arena[offset : offset + size].view(kind).reshape(shape)
            return tvm.runtime.from_dlpack(view)

        def prepared(calls: Sequence[Call]) -> list[tuple[Any, tuple[Any, ...]]]:
            return [
                (
                    compiled[call.kernel],
                    tuple(map(tensor, program.kernels[call.kernel].params, call.offsets)),
                )
                for call in calls
            ]

        self._gradient = prepared(program.gradient)
        self._predict = prepared(program.predict)
        self._update = prepared(program.update)

    def buffer(self, name: str) -> npt.NDArray[Any]:
        """A view of one of the program's buffers: int32 for class labels, else float32."""
        offset, size = self.program.buffers[name]
        kind = np.int32 if name == "y" and self.program.loss == "cross-entropy" else np.float32
        return self._arena[offset : offset + size].view(kind)

    def gradient(
        self,
        x: npt.ArrayLike,
        y: npt.ArrayLike,
        mask: npt.ArrayLike,
        weights: npt.ArrayLike,
        max_grad_norm: float,
    ) -> Array:
        """The clipped sum, flat [D], of one physical batch; weights flat [D] or by name."""
        self._fill("x", x)
        self._fill("y", y)
        self._fill("mask", mask)
        self._fill_weights(weights)
        self.buffer("hyper")[0] = max_grad_norm
        self.run_gradient()
        return np.array(self.buffer("gradient"))

    def predict(self, x: npt.ArrayLike, weights: npt.ArrayLike) -> Array:
        """The outputs, [batch, outputs]."""
        self._fill("x", x)
        self._fill_weights(weights)
        self.run_predict()
        return np.array(self.buffer("output")).reshape(-1, self.program.outputs)

    def update(self, gradient: npt.ArrayLike, step: int) -> Array:
        """The weights, flat [D], after `step` (1, 2, …) by the gradient given; state stays here."""
        self._fill("gradient", gradient)
        self.buffer("hyper")[1] = step
        for function, arguments in self._update:
            function(*arguments)
        return np.array(self.buffer("weights"))

    def step(self) -> None:
        """A gradient and an update on what the buffers hold, the sum used as the mean gradient."""
        for function, arguments in (*self._gradient, *self._update):
            function(*arguments)

    def run_gradient(self) -> None:
        """The gradient calls on what the buffers hold: the part that benchmarks time."""
        for function, arguments in self._gradient:
            function(*arguments)

    def run_predict(self) -> None:
        """The prediction's calls on what the buffers hold, for benchmarks."""
        for function, arguments in self._predict:
            function(*arguments)

    def time_step(self) -> list[float]:
        """The seconds that each call of a step takes, in the order of `Program.decisions`."""
        times = []
        for function, arguments in (*self._gradient, *self._update):
            start = time.perf_counter()
            function(*arguments)
            times.append(time.perf_counter() - start)
        return times

    def _fill(self, name: str, value: npt.ArrayLike) -> None:
        view = self.buffer(name)
        array = np.asarray(value)
        if array.size != view.size or array.dtype.kind not in "fiub":
            raise DataRefused(f"{name} has {array.size} numbers, the program takes {view.size}")
        view[:] = array.reshape(-1)

    def _fill_weights(self, weights: Any) -> None:
        flat = pack(self.program, weights) if isinstance(weights, Mapping) else weights
        self._fill("weights", flat)
