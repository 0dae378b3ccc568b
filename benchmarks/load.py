"""How fast a sealed file gets into enclave memory: read, carried, decrypted, checked.

`python -m benchmarks.load [RECORDS] [LAUNCHES]`. Decrypt and check alone is the enclave's own code
on one core, outside any enclave (benchmarks/enclave/sealed.rs). For the whole path the same
records go into fresh cells, alone and beside two processes that never rest. Launches that get
memory which a virtual machine has not used yet wait for its hypervisor, so every rate is listed.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.models import case_named
from benchmarks.report import ROOT, Section, Table
from benchmarks.step import Run, build
from benchmarks.threads import busy
from myelin import recipe
from myelin.cpu import Cpu

RECORDS, LAUNCHES = 40_000, 5
PARTS = {
    "hash": "hash for the commitment, one core",
    "decrypt": "check tags and decrypt, one core",
    "both": "decrypt and check: both, one core",
}


def main() -> None:
    """Build, load, print."""
    records = int(sys.argv[1]) if len(sys.argv) > 1 else RECORDS
    launches = int(sys.argv[2]) if len(sys.argv) > 2 else LAUNCHES
    with report.alone():
        section(records, launches).print()


def section(records: int = RECORDS, launches: int = LAUNCHES) -> Section:
    """GB/s of the parts and of the whole."""
    level = Cpu.native().runtime
    rows = [(PARTS[part], f"{rate:.2f}", "") for part, rate in alone(level).items()]
    case = case_named("mlp 784-256-128-10")
    with tempfile.TemporaryDirectory() as folder:
        built = build(case, records, Path(folder))
        for beside in (0, 2):
            report.say(f"loading beside {beside}")
            with busy(beside):
                rates = [loaded(built, records) for _ in range(launches)]
            what = f"whole path, beside {beside} busy processes" if beside else "whole path"
            every = " ".join(f"{rate:.2f}" for rate in rates)
            rows.append((what, f"{statistics.median(rates):.2f}", every))
    report.say("")
    size = records * (4 * math.prod(case.shape) + 4) / 1e6
    return Section(
        title="Loading records",
        text=(
            f"A sealed file of {size:.0f} MB on its way into enclave memory, runtime of {level}. "
            "Whole path: the host has it in memory and sends requests of 15 chunks, each while the "
            "enclave works on the one before; the cell receives them; the enclave copies them in, "
            "hashes, checks and decrypts them into memory that nobody has touched. The enclave "
            "works on one core, the host on the other."
        ),
        tables=[
            Table(title="Loading", columns=("what", "GB/s, median", "every launch"), rows=rows)
        ],
    )


def alone(level: str) -> dict[str, float]:
    """GB/s of the enclave's code for sealed files on one core, by part."""
    report.say(f"decrypt and check alone, {level}")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["sh", ROOT / "enclave" / "build.sh", level, folder, "sealed"], check=True)
        done = subprocess.run([Path(folder, "sealed")], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def loaded(built: recipe.Build, records: int) -> float:
    """GB/s into one fresh cell."""
    run = Run(built, case_named("mlp"), records, "process")
    with run.cell:
        return run.load().load_gb_s


if __name__ == "__main__":
    main()
