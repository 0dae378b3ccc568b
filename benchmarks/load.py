"""How fast a sealed file gets into enclave memory: read, carried, decrypted, checked.

`python -m benchmarks.load [RECORDS] [LAUNCHES]` loads the same records into fresh cells, once alone
and once beside two processes that spin, and prints one JSON line each. Launches that get memory
which a virtual machine has not used yet wait for its hypervisor, so every rate is listed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.models import case_named
from benchmarks.step import Run, build

SPIN = [sys.executable, "-c", "while True: pass"]


def main() -> None:
    """Build, load, print."""
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000
    launches = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    case = case_named("mlp 784-256-128-10")
    with tempfile.TemporaryDirectory() as folder:
        built = build(case, records, Path(folder))
        for beside in (0, 2):
            busy = [subprocess.Popen(SPIN) for _ in range(beside)]
            try:
                rates = []
                for _ in range(launches):
                    run = Run(built, case, records, "process").load()
                    rates.append(round(run.load_gb_s, 3))
                    run.cell.close()
            finally:
                for process in busy:
                    process.kill()
                    process.wait()
            median = statistics.median(rates)
            print(json.dumps({"beside": beside, "median_gb_s": median, "gb_s": rates}))


if __name__ == "__main__":
    main()
