"""A row's process that tells the machine's speed of now: `python -m benchmarks.probe`.

A step is a fixed number of multiply-adds on registers, on both threads (`kernels.fma_loop`).
"""

from __future__ import annotations

import numpy as np
import tvm

from benchmarks.burst import serve, timed
from benchmarks.kernels import CHAINS, fma_loop
from benchmarks.report import THREADS
from myelin.cpu import Cpu
from myelin.kernels import object as kernel_object

REPEATS = 100_000
"""About a third of a millisecond."""


def main() -> None:
    """Serves."""
    cpu = Cpu.native()
    run = kernel_object.library({"fma": fma_loop(cpu, REPEATS)}, cpu)["fma"]
    x, y = (
        tvm.runtime.tensor(np.zeros(shape, np.float32))
        for shape in ((CHAINS + 2, cpu.lanes), (THREADS, CHAINS, cpu.lanes))
    )
    serve(lambda seconds: {"step": timed(lambda: run(x, y), seconds)}, dict)


if __name__ == "__main__":
    main()
