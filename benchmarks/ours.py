"""Myelin's rows: kernels outside the cell, and whole private steps inside it.

`python -m benchmarks.ours CASE MODE SECONDS PRECISION` prints one JSON line; MODE is one of

    outside          gradient and update without privacy, through TVM's own runtime
    outside-private  the same with norms and clipping, without noise
    cell             everything that a private step does: gather, gradient, noise, update
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("TVM_NUM_THREADS", "2")

import numpy as np

from benchmarks.models import Case, case_named
from benchmarks.step import Run, build
from myelin import nn
from myelin.cpu import Cpu, Precision
from myelin.model import load
from myelin.optimizer import SGD
from myelin.outside import Outside
from myelin.plan import compile_training

MODES = ("outside", "outside-private", "cell")
LAUNCHES = 20
OPTIMIZER = SGD(lr=0.01, momentum=0.9)


def main() -> None:
    """Runs one mode of one case."""
    case, mode, seconds = case_named(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    precision = cast(Precision, sys.argv[4])
    measure = _cell if mode == "cell" else _outside
    times, peak, more = measure(case, mode, seconds, precision)
    median = statistics.median(times)
    print(
        json.dumps(
            {
                "model": case.name,
                "batch": case.batch,
                "system": "myelin",
                "mode": mode.removesuffix("-private"),
                "precision": precision,
                "private": mode != "outside",
                "median_ms": 1e3 * median,
                "examples_per_second": case.batch / median,
                "peak_mib": peak,
                **more,
            }
        )
    )


def _data(case: Case) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(case.batch, *case.shape)).astype(np.float32)
    return x, generator.integers(0, case.classes, case.batch).astype(np.int32)


def _outside(
    case: Case, mode: str, seconds: float, precision: Precision
) -> tuple[list[float], float, dict[str, Any]]:
    cpu = Cpu.native()
    model = load(case.layers(nn), np.zeros((1, *case.shape), np.float32))
    program = compile_training(
        model,
        loss="cross-entropy",
        optimizer=OPTIMIZER,
        batch=case.batch,
        cpu=cpu,
        precision=precision,
        private=mode != "outside",
    )
    outside = Outside(program, cpu)
    x, y = _data(case)
    outside.gradient(x, y, np.ones(case.batch, np.float32), model.parameters, 1.0)
    for _ in range(3):
        outside.step()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 10 or time.perf_counter() < until:
        start = time.perf_counter()
        outside.step()
        times.append(time.perf_counter() - start)
    return times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, {}


def _cell(
    case: Case, mode: str, seconds: float, precision: Precision
) -> tuple[list[float], float, dict[str, Any]]:
    """Records = batch, so sample_rate is 1 and a step exactly one physical batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        built = build(case, case.batch, folder / "whole", precision=precision)
        facts = {
            "build_seconds": time.perf_counter() - start,
            "image_bytes": len(built.image.content),
        }
        launches = []
        for _ in range(LAUNCHES):
            run = Run(built, case, case.batch, "process")
            launches.append(run.launch_ms)
            run.cell.close()
        facts["launch_ms"] = statistics.median(launches)
        run = Run(built, case, case.batch, "process").load()
        times, peak = run.times(seconds), peak_mib(run.cell.pid)
        run.cell.close()
        # The same without kernels: what is left is gather, sampling and noise.
        parts = ("gradient", "update")
        bare = build(case, case.batch, folder / "bare", *parts, precision=precision)
        run = Run(bare, case, case.batch, "process").load()
        left = run.step()
        run.cell.close()
        return times, peak, facts | {"kernels_ms": 1e3 * statistics.median(times) - left}


def peak_mib(pid: int) -> float:
    """The most memory that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
