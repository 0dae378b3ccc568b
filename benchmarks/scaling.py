"""`make bench-scaling`: private training in the cell over batch and width of one model.

`python -m benchmarks.scaling [--model mnist_cnn|cifar_cnn|vgg9] [--seconds S]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "2")

from benchmarks import pictures, report
from benchmarks.burst import machine
from benchmarks.models import WIDENED, Case, case_named
from benchmarks.report import BUILD, Section, Table, peak_mib
from benchmarks.step import Run, build

MODEL = "mnist_cnn"
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
PHYSICAL = 256
"""Examples that are computed at once, at most: a larger batch is several of these."""
WIDTHS = (0.5, 1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One image, measured."""

    x: float
    physical: int
    weights: int
    ms: float
    per_second: float
    mib: float


def main() -> None:
    """Measures, prints, draws build/scaling.svg."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL, choices=list(WIDENED))
    parser.add_argument("--seconds", type=float, default=2.0)
    asked = parser.parse_args()
    with report.alone():
        section(asked.model, asked.seconds, BUILD).print()


def section(model: str, seconds: float, folder: Path) -> Section:
    """Tables and a picture over batch, at width 1, and over width, at the model's own batch."""
    case, layers = case_named(model), WIDENED[model]

    def over_batch(batch: int, physical: int) -> Point:
        return measure(dataclasses.replace(case, batch=physical), batch, batch, seconds)

    batches = [over_batch(batch, min(batch, PHYSICAL)) for batch in BATCHES]
    whole = [over_batch(batch, batch) for batch in BATCHES if batch > PHYSICAL]
    widths = [
        measure(
            dataclasses.replace(case, layers=partial(layers, width=width)),
            width,
            case.batch,
            seconds,
        )
        for width in WIDTHS
    ]
    report.say("")
    picture = pictures.scaling(
        {
            "examples/s over batch": line(batches, lambda point: point.per_second),
            "peak MiB over batch": line(batches, lambda point: point.mib),
            "10⁹ weights·examples/s over width": line(
                widths, lambda point: point.per_second * point.weights / 1e9
            ),
            "peak MiB over width": line(widths, lambda point: point.mib),
        },
        folder,
    )
    return Section(
        title="Scaling",
        text=(
            f"{case.name}, private training in the cell, everything a step does; peak memory is "
            "that of the cell's process, with the records of one batch. At most "
            f"{PHYSICAL} examples are computed at once, which an image's `batch` says: a larger "
            "batch is several physical ones, whose sums are added in float64; the last table has "
            "large batches computed at once, whose activations leave the caches. Width multiplies "
            "channels "
            f"and hidden units, at batch {case.batch}: weights, and so the work of an example, "
            "grow with its square."
        ),
        tables=[
            table("batch", batches),
            table("width", widths),
            table("batch, computed at once", whole),
        ],
        pictures=[("Scaling over batch and width", picture)],
    )


def measure(case: Case, x: float, batch: int, seconds: float) -> Point:
    """Builds an image for physical batches of the case and trains in it, records = batch."""
    report.say(f"{case.name}: batch {batch}, {case.batch} at once, point {x:g}")
    with tempfile.TemporaryDirectory() as name:
        built = build(case, batch, Path(name))
        run = Run(built, case, batch, "process", drawn=batch).load()
        median = statistics.median(machine.undisturbed(partial(run.times, seconds), seconds))
        point = Point(
            x=x,
            physical=case.batch,
            weights=built.weights.size,
            ms=1e3 * median,
            per_second=batch / median,
            mib=peak_mib(run.cell.pid),
        )
        run.cell.close()
    return point


def line(points: list[Point], value: Callable[[Point], float]) -> tuple[list[float], list[float]]:
    """What a panel of the picture shows."""
    return [point.x for point in points], [value(point) for point in points]


def table(what: str, points: list[Point]) -> Table:
    """A row a point; microseconds an example should fall or stay with batch."""
    rows: list[tuple[Any, ...]] = [
        (
            f"{point.x:g}",
            f"{point.physical}",
            f"{point.weights:,}",
            f"{point.ms:.2f}",
            f"{point.per_second:,.0f}",
            f"{1e6 / point.per_second:.1f}",
            f"{point.mib:.1f}",
        )
        for point in points
    ]
    columns = (what, "physical batch", "weights", "ms", "examples/s", "µs an example", "peak MiB")
    return Table(title=f"Over {what}", columns=columns, rows=rows, words=0)


if __name__ == "__main__":
    main()
