"""`make bench-records`: where a private step's time goes, over the number of records it draws from.

`python -m benchmarks.records [--models NAME,…|all] [--records N] [--backend B] [--seconds S]`. Each
row is of several images, each with something left out, which work in turn; a part is the difference
of two.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.models import SMALL, Case, cases_named
from benchmarks.report import Section, Table
from benchmarks.step import Run, build, smallest
from benchmarks.threads import medians
from myelin.features import Features

RECORDS = 60_000
KINDS = (Features(), Features(type="uint8", unit=255))
SPARE = 4
"""Standard deviations between the records that a step draws on average and a physical batch."""
PARTS = {
    "whole": (),
    "no gradient": ("gradient",),
    "no kernels": ("gradient", "update"),
}
"""Images of the model, by the programs that are left out."""


def main() -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(case.name.split()[0] for case in SMALL))
    parser.add_argument("--records", type=int, default=RECORDS)
    parser.add_argument("--backend", default="process")
    parser.add_argument("--seconds", type=float, default=1.0)
    asked = parser.parse_args()
    with report.alone():
        section(cases_named(asked.models), asked.seconds, asked.records, asked.backend).print()


def section(
    cases: Sequence[Case], seconds: float, records: int = RECORDS, backend: str = "process"
) -> Section:
    """As many records as a physical batch has, and so many more, as float32 and as bytes."""
    rows = []
    for case in cases:
        for size, features in ((case.batch, KINDS[0]), *((records, kind) for kind in KINDS)):
            found = parts(case, size, features, seconds, backend)
            bytes_ = size * (features.bytes * math.prod(case.shape) + 4)
            rows.append(
                (
                    f"{case.name} ({case.batch})",
                    features.type,
                    f"{size:,}",
                    f"{bytes_ / 2**20:.1f}",
                    *(f"{ms:.3f}" for ms in found.values()),
                )
            )
    report.say("")
    return Section(
        title="Records",
        text=(
            "Milliseconds of the parts of a private step in the cell: over as many records as a "
            f"physical batch has, which caches hold, and over {records:,}. A step draws as many on "
            f"average either way, so few that a physical batch is {SPARE} standard deviations "
            "more. *Draws* decide for each record whether it is in the step, and have requests and "
            "an empty batch with them; *gather* copies the records drawn, wherever they lie. Parts "
            "are differences between images with something left out: what a gradient has to fetch "
            "again after another part used the cache counts as the gradient's."
        ),
        tables=[
            Table(
                title="Milliseconds of a step",
                columns=(
                    *("model (batch)", "features", "records", "MiB", "step"),
                    *("draws", "gather", "noise", "gradient", "update"),
                ),
                rows=rows,
                words=2,
            )
        ],
    )


def parts(
    case: Case, records: int, features: Features, seconds: float, backend: str
) -> dict[str, float]:
    """Milliseconds of a step and of its parts."""
    drawn = max(1, round(case.batch - SPARE * math.sqrt(case.batch)))
    small = smallest(case)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as cells:

        def running(what: str, of: Case, left_out: Sequence[str], mean: int) -> Run:
            report.say(f"{case.name}: {records:,} records, {features.type}, {what}")
            built = build(of, records, Path(name, what), *left_out, features=features)
            run = Run(built, of, records, backend, drawn=mean)
            cells.enter_context(run.cell)
            return run.load()

        runs = {what: running(what, case, left, drawn) for what, left in PARTS.items()}
        left_out = PARTS["no kernels"]
        runs["no noise"] = running("no noise", small, left_out, drawn)
        runs["one drawn"] = running("one drawn", small, left_out, 1)
        whole, no_gradient, no_kernels, no_noise, one_drawn = medians(runs, seconds)
    return {
        "step": whole,
        "draws": one_drawn,
        "gather": no_noise - one_drawn,
        "noise": no_kernels - no_noise,
        "gradient": whole - no_gradient,
        "update": no_gradient - no_kernels,
    }


if __name__ == "__main__":
    main()
