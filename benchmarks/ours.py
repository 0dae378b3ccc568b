"""Myelin's rows: kernels outside the cell, and whole private steps inside it.

`python -m benchmarks.ours CASE MODE PRECISION` is a row's process (`benchmarks.burst`); MODE is of

    outside          gradient and update without privacy, through TVM's own runtime
    outside-private  the same with norms and clipping, without noise
    cell             everything that a private step does: gather, gradient, noise, update
    cell-plain       the same of an image without privacy, and what its noise is told apart by
"""

from __future__ import annotations

import contextlib
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
from benchmarks.step import Run, build, smallest
from myelin import nn, recipe
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
        "mode": mode.partition("-")[0],
        "precision": precision,
        "private": mode in ("outside-private", "cell"),
    }
    if identity["mode"] == "cell":
        _serve_cell(case, precision, identity)
    else:
        _serve_outside(case, precision, identity)


def _data(case: Case) -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(case.batch, *case.shape)).astype(np.float32)
    return x, generator.integers(0, case.classes, case.batch).astype(np.int32)


def _serve_outside(case: Case, precision: Precision, identity: dict[str, Any]) -> None:
    cpu = Cpu.native(precision).of(precision)
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

    "rest" is the time of the same without kernels: gather, sampling and noise. "gather" is that
    without noise, for the row without privacy, which needs none.
    """
    private: bool = identity["private"]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as cells:
        folder = Path(name)

        def built(of: Case, *left_out: str) -> recipe.Build:
            to = folder / f"{of.name} {' '.join(left_out)}"
            return build(of, case.batch, to, *left_out, precision=precision, private=private)

        def running(image: recipe.Build, of: Case) -> Run:
            run = Run(image, of, case.batch, "process")
            cells.enter_context(run.cell)
            return run.load()

        start = time.perf_counter()
        image = built(case)
        seconds = time.perf_counter() - start
        of_image = _image(image, case, seconds) if private else {}
        parts = ("gradient", "update")
        whole = running(image, case)
        rests = {"rest": running(built(case, *parts), case)}
        if not private:
            rests["gather"] = running(built(smallest(case), *parts), smallest(case))

        def burst(seconds: float) -> dict[str, list[float]]:
            found = {"step": whole.times(seconds)}
            return found | {name: run.times(seconds / 4) for name, run in rests.items()}

        def facts() -> dict[str, Any]:
            return identity | of_image | {"peak_mib": peak_mib(whole.cell.pid), "before_mib": 0.0}

        serve(burst, facts)


def _image(image: recipe.Build, case: Case, seconds: float) -> dict[str, float]:
    """What the table of images says, `seconds` being those of the build."""
    launches = []
    for _ in range(LAUNCHES):
        run = Run(image, case, case.batch, "process")
        launches.append(run.launch_ms)
        run.cell.close()
    return {
        "build_seconds": seconds,
        "image_bytes": len(image.image.content),
        "launch_ms": statistics.median(launches),
    }


if __name__ == "__main__":
    main()
