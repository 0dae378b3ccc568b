"""A row's process that tells how the machine is now: `python -m benchmarks.probe`.

A burst times, on both threads: "multiply", a fixed number of multiply-adds on registers; "copy",
where each copies its own numbers; "exchange", where each copies those that the other wrote last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm

from benchmarks.burst import serve, timed
from benchmarks.kernels import CHAINS, copy_loop, exchange_loop, fma_loop
from benchmarks.report import THREADS
from myelin.cpu import Cpu
from myelin.kernels import object as kernel_object

REPEATS = 100_000
"""About a third of a millisecond's."""
EXTENT = 1 << 14
"""Floats of a thread: they fit its own cache."""


def main() -> None:
    """Serves."""
    cpu = Cpu.native()
    run = kernel_object.library(
        {
            "multiply": fma_loop(cpu, REPEATS),
            "copy": copy_loop(cpu, EXTENT),
            "exchange": exchange_loop(cpu, EXTENT),
        },
        cpu,
    )
    chains, sums = _zeros(CHAINS + 2, cpu.lanes), _zeros(THREADS, CHAINS, cpu.lanes)
    x, y = (_zeros(THREADS, EXTENT) for _ in range(2))

    def there_and_back(name: str) -> None:
        run[name](x, y)
        run[name](y, x)

    steps: dict[str, Callable[[], object]] = {
        "multiply": lambda: run["multiply"](chains, sums),
        "copy": lambda: there_and_back("copy"),
        "exchange": lambda: there_and_back("exchange"),
    }
    serve(lambda seconds: {name: timed(step, seconds) for name, step in steps.items()}, dict)


def _zeros(*shape: int) -> Any:
    return tvm.runtime.tensor(np.zeros(shape, np.float32))


if __name__ == "__main__":
    main()
