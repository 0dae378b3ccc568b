"""How fast noise is drawn: the enclave's own code, generator included, outside any enclave.

`python -m benchmarks.noise`. Two cores are two processes at once: threads of a step share the
coordinates in the same way, without talking to each other.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from benchmarks import report
from benchmarks.report import ROOT, Section, Table
from myelin.cpu import Cpu


def main() -> None:
    """Builds, measures, prints."""
    with report.alone():
        section().print()


def section() -> Section:
    """Samples a second of each runtime that this machine can run."""
    rows: list[tuple[str, ...]] = []
    for level in dict.fromkeys((Cpu.native().runtime, "x86-64-v3")):
        report.say(f"noise, {level}")
        with tempfile.TemporaryDirectory() as folder:
            build = ROOT / "enclave" / "build.sh"
            subprocess.run(["sh", build, level, folder, "noise"], check=True)
            one, two = (rates(Path(folder, "noise"), cores) for cores in (1, 2))
        rows += [
            (level, f"{int(count):,}", f"{one[count]:.0f}", f"{two[count]:.0f}") for count in one
        ]
    report.say("")
    return Section(
        title="Noise",
        text=(
            "Rounded Gaussian samples, each from fresh bits of AES-256 in counter mode, added to a "
            "sum of clipped gradients and scaled to the mean. x86-64-v4 has eight lanes of the "
            "sampler and VAES, x86-64-v3 four lanes and AES. Two cores are two processes at once, "
            "outside any enclave."
        ),
        tables=[
            Table(
                title="Millions of samples a second",
                columns=("runtime", "coordinates at once", "one core", "two cores"),
                rows=rows,
            )
        ],
    )


def rates(program: Path, cores: int) -> dict[str, float]:
    """Summed over so many processes at once."""
    runs = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(cores)]
    answers = [dict(json.loads(run.communicate()[0])) for run in runs]
    return {count: sum(answer[count] for answer in answers) for count in answers[0]}


if __name__ == "__main__":
    main()
