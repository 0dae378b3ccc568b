"""What a cell costs: launch, an empty call, a call with 1 MiB in.

`python -m benchmarks.cell IMAGE [THREADS]` prints one JSON line a backend: medians, in milliseconds
and microseconds. The call is an operation that no image has; a refusal costs what a reply does.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from myelin.cell import MESSAGE_BYTES, Cell, backends
from myelin.errors import EnclaveRefused

UNKNOWN = 0xFFFF
MEBIBYTE = bytes(MESSAGE_BYTES - 4)


def main() -> None:
    image = Path(sys.argv[1])
    threads = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    for backend, problem in backends().items():
        if problem is not None:
            print(json.dumps({"backend": backend, "skipped": problem}))
            continue

        def launch(backend: str = backend) -> None:
            with Cell(image, backend=backend, threads=threads, features=[]) as cell:
                call(cell, b"")

        launch_ms = 1e3 * median(launch, 30)
        with Cell(image, backend=backend, threads=threads, features=[]) as cell:
            row = {
                "backend": backend,
                "threads": threads,
                "cores": cell.cores,
                "launch_call_close_ms": round(launch_ms, 3),
                "empty_call_us": round(1e6 * median(lambda: call(cell, b""), 3000), 1),
                "mebibyte_in_ms": round(1e3 * median(lambda: call(cell, MEBIBYTE), 300), 3),
            }
        print(json.dumps(row))


def call(cell: Cell, body: bytes) -> None:
    with contextlib.suppress(EnclaveRefused):
        cell.request(UNKNOWN, body)


def median(step: Callable[[], None], times: int) -> float:
    """Seconds that `step` takes."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
