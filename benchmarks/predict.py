"""Rows of inference: `python -m benchmarks.predict CASE SYSTEM BATCH` (`benchmarks.burst`).

SYSTEM is one of `SYSTEMS`. All have the same weights and the same random examples.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "2")

import numpy as np
import torch

from benchmarks.burst import serve, timed
from benchmarks.models import Case, case_named
from benchmarks.report import THREADS
from myelin import nn
from myelin.cpu import Cpu
from myelin.importers import load
from myelin.optimizer import SGD
from myelin.outside import Outside
from myelin.plan import compile_training


def main() -> None:
    """Serves one system on one case."""
    case, system, batch = case_named(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    draws = np.random.default_rng(0)
    step = SYSTEMS[system](case, draws.standard_normal((batch, *case.shape)).astype(np.float32))
    serve(lambda seconds: {"step": timed(step, seconds)}, dict)


def _ours(case: Case, x: Any) -> Callable[[], object]:
    """Kernels of `predict` alone, through TVM's own runtime."""
    cpu, model = Cpu.native("float32").of("float32"), load(case.layers(nn), case.shape)
    program = compile_training(
        model, loss="cross-entropy", optimizer=SGD(lr=0.1), batch=len(x), cpu=cpu
    )
    used = {call.kernel: program.kernels[call.kernel] for call in program.predict}
    alone = dataclasses.replace(program, kernels=used, gradient=(), update=(), decisions=())
    outside = Outside(alone, cpu)
    outside.predict(x, model.parameters)
    return outside.run_predict


def _torch(case: Case, x: Any, layout: torch.memory_format) -> Callable[[], object]:
    images = x.ndim == 4
    net = _net(case)
    examples = torch.tensor(x)
    if images:
        net, examples = net.to(memory_format=layout), examples.contiguous(memory_format=layout)

    def step() -> None:
        with torch.inference_mode():
            net(examples)

    return step


def _onnxruntime(case: Case, x: Any) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        torch.onnx.export(_net(case), (torch.tensor(x),), path, opset_version=20, dynamo=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


def _net(case: Case) -> torch.nn.Module:
    net: torch.nn.Module = case.layers(torch.nn).eval()
    ours = load(case.layers(nn), case.shape)
    net.load_state_dict({name: torch.tensor(value) for name, value in ours.parameters.items()})
    return net


SYSTEMS: dict[str, Callable[[Case, Any], Callable[[], object]]] = {
    "PyTorch": lambda case, x: _torch(case, x, torch.contiguous_format),
    "PyTorch, channels_last": lambda case, x: _torch(case, x, torch.channels_last),
    "ONNX Runtime": _onnxruntime,
    "Myelin, outside": _ours,
}


if __name__ == "__main__":
    main()
