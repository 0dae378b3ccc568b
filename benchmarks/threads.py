"""How long a helping thread should spin for work before it leaves, and what a second thread brings.

`python -m benchmarks.threads [--limits] [--speedup] [--models NAME,…|all] [--seconds S]` (both
where neither is named). The limit is a constant of the enclave runtime, so each one is measured in
a runtime of its own, built here from a copy of the sources.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import report
from benchmarks.burst import machine
from benchmarks.models import SMALL, Case, cases_named
from benchmarks.report import ROOT, Section, Table
from benchmarks.step import Run, build
from myelin import native
from myelin.cpu import Cpu

FOREVER = 2**32 - 1
LIMITS = (0, 1_000, 5_000, 20_000, 100_000, FOREVER)
BESIDE = (0, 1, 2)
ROUNDS = 5
SPIN = [sys.executable, "-c", "while True: pass"]
PATIENCE = re.compile(r"(?<=^const PATIENCE: u32 = )[0-9_]+(?=;$)", re.MULTILINE)


def main() -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits", action="store_true", help="the limit of spinning only")
    parser.add_argument("--speedup", action="store_true", help="one thread against two only")
    parser.add_argument("--models", default="all", help="of the speed-up")
    parser.add_argument("--seconds", type=float, default=1.0)
    asked = parser.parse_args()
    both = asked.limits == asked.speedup
    with report.alone():
        if both or asked.limits:
            limits(asked.seconds).print()
        if both or asked.speedup:
            speedup(cases_named(asked.models), asked.seconds).print()


def limits(seconds: float) -> Section:
    """Time of a step over limits, quiet and beside processes that want the cores."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as cells:
        folder = Path(name)
        runtimes = {limit: runtime(limit, folder / "sources", folder) for limit in LIMITS}
        runs: dict[tuple[str, int], Run] = {}
        for case in SMALL:
            for limit, files in runtimes.items():
                report.say(f"{case.name}, limit {limit:,}")
                with mock.patch.object(native, "_FOLDER", files):
                    built = build(case, case.batch, folder / f"{case.name}-{limit}")
                    run = Run(built, case, case.batch, "process")
                cells.enter_context(run.cell)
                runs[case.name, limit] = run.load()
        rows = []
        for beside in BESIDE:
            with busy(beside):
                for case in SMALL:
                    report.say(f"{case.name} beside {beside}")
                    of = {limit: runs[case.name, limit] for limit in LIMITS}
                    found = (f"{ms:.2f}" for ms in medians(of, seconds, quiet=beside == 0))
                    rows.append((case.name, str(beside), *found))
    report.say("")
    return Section(
        title="Helping threads: how long they wait inside",
        text=(
            "Between two parallel loops a helping thread spins inside the enclave, at most so many "
            "pauses of the processor; then it leaves, sleeps in the cell (50 µs, and up to 1 ms "
            "while it comes back for nothing) or until the next request, and comes back. "
            "Milliseconds of a step, median, for each limit, alone and beside processes that never "
            "rest."
        ),
        tables=[
            Table(
                title="Milliseconds of a step over the limit in pauses",
                columns=(
                    *("model", "busy processes beside"),
                    *("for ever" if limit == FOREVER else f"{limit:,}" for limit in LIMITS),
                ),
                rows=rows,
                words=1,
            )
        ],
    )


def medians(runs: Mapping[Any, Run], seconds: float, *, quiet: bool = True) -> list[float]:
    """Milliseconds of a step of each run, rounds in turn; `quiet` where nothing is beside it."""
    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(ROUNDS):
        for key, run in runs.items():
            found = machine.undisturbed(partial(run.times, seconds / ROUNDS), quiet * seconds)
            times[key].append(statistics.median(found))
    return [1e3 * statistics.median(same) for same in times.values()]


def speedup(cases: list[Case], seconds: float) -> Section:
    """One thread against two in the cell, rounds in turn."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cells:
            runs = {}
            for threads in (1, report.THREADS):
                report.say(f"{case.name}, {threads} threads")
                built = build(case, case.batch, Path(folder, str(threads)), threads=threads)
                run = Run(built, case, case.batch, "process")
                cells.enter_context(run.cell)
                runs[threads] = run.load()
            one, two = medians(runs, seconds)
        rows.append((f"{case.name} ({case.batch})", f"{one:.2f}", f"{two:.2f}", f"{one / two:.2f}"))
    report.say("")
    return Section(
        title="One thread and two",
        text=(
            "Milliseconds of a private step in the cell, everything it does. Where a second thread "
            "brings less than 1.85×, `make bench-kernels` shows how near each kernel is to either "
            "limit of the machine: memory is shared by both threads."
        ),
        tables=[
            Table(
                title="A second thread",
                columns=("model (batch)", "ms, one thread", "ms, two threads", "times as fast"),
                rows=rows,
            )
        ],
    )


def runtime(limit: int, sources: Path, folder: Path) -> Path:
    """A folder of native files whose enclave runtime spins for `limit` pauses."""
    level = Cpu.native().runtime
    report.say(f"runtime {level}, limit {limit:,}")
    if not sources.exists():
        shutil.copytree(ROOT / "enclave", sources, ignore=shutil.ignore_patterns("target"))
    code = sources / "gate" / "src" / "threads.rs"
    text, found = PATIENCE.subn(str(limit), code.read_text())
    assert found == 1, f"{code} has {found} limits"
    code.write_text(text)
    files = folder / f"native-{limit}"
    shutil.copytree(native.native_file("cell").parent, files)
    subprocess.run(["sh", sources / "build.sh", level, files], check=True)
    (files / "libmyelin_enclave.a").rename(files / f"libmyelin_enclave-{level}.a")
    return files


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Beside so many processes that never rest."""
    processes = [subprocess.Popen(SPIN) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
