"""Myelin's rows: kernels outside the cell, and whole private steps inside it.

`python -m benchmarks.ours CASE MODE PRECISION` is a row's process (`benchmarks.burst`); MODE is of

    outside          gradient and update without privacy, through TVM's own runtime
    outside-private  the same with norms and clipping, without noise
    cell             everything that a private step does: gather, gradient, noise, update
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TVM_NUM_THREADS", "2")

import numpy as np

from benchmarks.burst import KEPT, serve, timed
from benchmarks.models import Case, case_named
from benchmarks.report import peak_mib
from benchmarks.step import Run, build
from myelin import nn
from myelin.cpu import Cpu, Precision
from myelin.importers import load
from myelin.optimizer import SGD
from myelin.outside import Outside
from myelin.plan import compile_training

LAUNCHES = 20
OPTIMIZER = SGD(lr=0.01, momentum=0.9)


def main() -> None:
    """Serves one mode of one case."""
    case, precision = case_named(sys.argv[1]), cast(Precision, sys.argv[3])
    mode = sys.argv[2].removesuffix(KEPT)
    identity = {
        "model": case.name,
        "batch": case.batch,
        "system": "myelin",
        "mode": mode.removesuffix("-private"),
        "precision": precision,
        "private": mode != "outside",
    }
    if mode == "cell":
        _serve_cell(case, precision, identity)
    else:
        _serve_outside(case, precision, identity)


def _data(case: Case) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(case.batch, *case.shape)).astype(np.float32)
    return x, generator.integers(0, case.classes, case.batch).astype(np.int32)


def _serve_outside(case: Case, precision: Precision, identity: dict[str, Any]) -> None:
    cpu = Cpu.native()
    model = load(case.layers(nn), np.zeros((1, *case.shape), np.float32))
    before = peak_mib(os.getpid())
    program = compile_training(
        model,
        loss="cross-entropy",
        optimizer=OPTIMIZER,
        batch=case.batch,
        cpu=cpu,
        precision=precision,
        private=identity["private"],
    )
    outside = Outside(program, cpu)
    x, y = _data(case)
    outside.gradient(x, y, np.ones(case.batch, np.float32), model.parameters, 1.0)
    for _ in range(3):
        outside.step()

    def facts() -> dict[str, Any]:
        return identity | {"peak_mib": peak_mib(os.getpid()), "before_mib": before}

    serve(lambda seconds: {"step": timed(outside.step, seconds)}, facts)


def _serve_cell(case: Case, precision: Precision, identity: dict[str, Any]) -> None:
    """Records = batch, so sample_rate is 1 and a step exactly one physical batch.

    "rest" is the time of the same without kernels: gather, sampling and noise.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        built = build(case, case.batch, folder / "whole", precision=precision)
        build_seconds = time.perf_counter() - start
        launches = []
        for _ in range(LAUNCHES):
            run = Run(built, case, case.batch, "process")
            launches.append(run.launch_ms)
            run.cell.close()
        parts = ("gradient", "update")
        bare = build(case, case.batch, folder / "bare", *parts, precision=precision)
        whole = Run(built, case, case.batch, "process").load()
        rest = Run(bare, case, case.batch, "process").load()

        def burst(seconds: float) -> dict[str, list[float]]:
            return {"step": whole.times(seconds), "rest": rest.times(seconds / 4)}

        def facts() -> dict[str, Any]:
            return identity | {
                "peak_mib": peak_mib(whole.cell.pid),
                "before_mib": 0.0,
                "build_seconds": build_seconds,
                "image_bytes": len(built.image.content),
                "launch_ms": statistics.median(launches),
            }

        with whole.cell, rest.cell:
            serve(burst, facts)


if __name__ == "__main__":
    main()
