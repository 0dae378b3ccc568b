"""`make bench`: examples per second beside PyTorch and Opacus, in one run on one machine.

`python -m benchmarks [--models NAME,…|all] [--rounds N] [--seconds S] [--rest S] [--steps N]
[--page [NAME,…]]`. Every row is a process of its own with two threads; all of a model work in turn
(`benchmarks.burst`), and a row's time is the median of its rounds' medians. Writes
build/bench.json. `--page` measures memory, kernels, the cost of privacy by layer, threads, records,
noise, loading, scaling, inference and accuracy as well and writes docs/benchmarks.md and its
pictures; with names of sections only these, and leaves the others of the page as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    accuracy,
    inference,
    kernels,
    load,
    memory,
    noise,
    pictures,
    records,
    report,
    scaling,
    threads,
)
from benchmarks.burst import ALLOCATOR, KEPT, in_turn, machine
from benchmarks.models import SMALL, Case, cases_named
from benchmarks.report import BUILD, PICTURES, ROOT, Section, Table
from myelin.cpu import Cpu, Precision

BF16: list[Precision] = ["bf16"] if "bf16" in Cpu.native().precisions else []
"""The precision beside float32, where this machine's level has it."""
PLAN = [
    ("peers", "eager", "float32"),
    ("peers", "channels_last", "float32"),
    ("peers", "compile", "float32"),
    *(("peers", mode, "bf16") for mode in ("eager", "channels_last", "compile")),
    ("peers", "hooks", "float32"),
    ("peers", "ghost", "float32"),
    *(("peers", mode + KEPT, "float32") for mode in ("eager", "channels_last", "hooks", "ghost")),
    *(("peers", mode + KEPT, "bf16") for mode in ("eager", "channels_last")),
    ("ours", "outside" + KEPT, "float32"),
    ("ours", "outside-private" + KEPT, "float32"),
    ("ours", "cell-plain", "float32"),
    ("ours", "cell", "float32"),
    *(("ours", "cell", precision) for precision in BF16),
]
FORM = (
    *("model", "batch", "system", "mode", "precision", "private"),
    *("median_ms", "examples_per_second", "peak_mib"),
)
NONE = float("nan")
PAGE = ROOT / "docs" / "benchmarks.md"

Rows = list[dict[str, Any]]
Failures = list[dict[str, str]]


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(case.name.split()[0] for case in SMALL))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument(
        "--rest",
        type=float,
        default=0.0,
        help="seconds of rest before each: cores that rested are often woken side by side",
    )
    parser.add_argument("--page", nargs="?", const="", help="write docs/benchmarks.md, or sections")
    parser.add_argument("--steps", type=int, default=accuracy.STEPS, help="of the loss curves")
    asked = parser.parse_args()
    folder = BUILD if asked.page is None else PICTURES
    sections = measures(asked, folder)
    names = list(sections) if asked.page == "" else (asked.page or "speed").split(",")
    if unknown := set(names) - set(sections):
        raise SystemExit(f"no section {sorted(unknown)}: choose from {', '.join(sections)}")
    with report.alone():
        for name in names:
            before, counted = report.load(), (machine.measured, machine.disturbed)
            section = sections[name]()
            section.print()
            print(f"load average {before} at the start, {report.load()} at the end")
            if asked.page is not None:  # After each section: what ends early loses none of them.
                origin = provenance(asked, before, counted)
                whole = asked.page == "" and name == names[0]
                old = PAGE.read_text() if PAGE.exists() and not whole else ""
                PAGE.write_text(page(old, section, origin))


def measures(asked: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Section]]:
    """What measures each section, in the order of the page."""
    cases = cases_named(asked.models)
    return {
        "speed": lambda: speed(*all_rows(cases, asked), folder),
        "memory": lambda: memory.section(cases),
        "kernels": lambda: kernels.roofline(cases, asked.seconds, worst=5, predicted=BF16),
        "layers": lambda: kernels.cost_by_layer(cases, asked.seconds, folder),
        "threads": lambda: threads.speedup(cases, asked.seconds),
        "limits": lambda: threads.limits(asked.seconds),
        "records": lambda: records.section(SMALL, asked.seconds),
        "noise": noise.section,
        "loading": load.section,
        "scaling": lambda: scaling.section(scaling.MODEL, asked.seconds, folder),
        "inference": lambda: inference.section(cases, asked.seconds, rounds=asked.rounds),
        "accuracy": lambda: accuracy.section(accuracy.MODELS, asked.steps, folder),
    }


def all_rows(cases: list[Case], asked: argparse.Namespace) -> tuple[Rows, Failures]:
    """Those of each model, measured and failed; they go to build/bench.json."""
    rows: Rows = []
    failed: Failures = []
    for case in cases:
        measured, others = measure(case.name, asked.rounds, asked.seconds, asked.rest)
        rows += measured
        failed += others
    BUILD.mkdir(exist_ok=True)
    (BUILD / "bench.json").write_text(json.dumps(facts(rows, failed), indent=1) + "\n")
    return rows, failed


def facts(rows: Rows, failed: Failures) -> dict[str, Any]:
    """What build/bench.json says: the machine, the versions, every row."""
    return {
        "cpu": report.cpu(),
        "threads": report.THREADS,
        "versions": report.versions(),
        "rows": [{name: row[name] for name in FORM} for row in rows],
        "failed": failed,
    }


def measure(case: str, rounds: int, seconds: float, rest: float) -> tuple[Rows, Failures]:
    """The rows of one model, timed in turn, and those that failed."""
    arguments = {
        (module, mode, precision): (module, case, mode, precision)
        for module, mode, precision in PLAN
    }
    turns = in_turn(arguments, rounds, seconds, what=case, rest=rest)
    rows = [finished(facts, turns.medians[key]) for key, facts in turns.facts.items()]
    return rows, [failure(case, *key, why) for key, why in turns.failed.items()]


def failure(case: str, module: str, mode: str, precision: str, why: str) -> dict[str, str]:
    """A row that has no numbers, and its last words."""
    way = mode.removesuffix(KEPT)
    peer = "opacus" if way in ("hooks", "ghost") else "pytorch"
    return {
        "model": case,
        "system": "myelin" if module == "ours" else peer,
        "mode": way if module == "ours" else mode,
        "precision": precision,
        "why": why,
    }


def finished(facts: dict[str, Any], medians: list[dict[str, float]]) -> dict[str, Any]:
    """A row of the table: medians over rounds.

    One that says what its gather takes has no privacy: the rest without that is noise, which it
    does not need.
    """
    noise = [each["rest"] - each["gather"] if "gather" in each else 0.0 for each in medians]
    steps = [each["step"] - less for each, less in zip(medians, noise, strict=True)]
    ms = statistics.median(steps)
    row = facts | {"median_ms": ms, "examples_per_second": facts["batch"] / ms * 1e3}
    if "rest" in medians[0]:
        row["kernels_ms"] = statistics.median(each["step"] - each["rest"] for each in medians)
    return row


def best(rows: Rows, **wanted: Any) -> dict[str, Any]:
    """The fastest row of those with these values; one of NaN where there is none."""
    fits = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    fastest = sorted(fits, key=lambda row: row["median_ms"])
    return fastest[0] if fastest else dict.fromkeys((*FORM, "before_mib", "kernels_ms"), NONE)


def quotients(rows: Rows) -> dict[str, dict[str, float]]:
    """For each model, private training in the cell against the others, from this run."""
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        ours = {"system": "myelin", "mode": "cell", "private": True}
        cell, fastest = best(own, **ours, precision="float32"), best(own, **ours)
        usual = [row for row in own if not row["mode"].endswith(KEPT)]
        plain = {"system": "pytorch", "precision": "float32"}
        half = plain | {"precision": "bf16"}
        ghost = best(own, mode="ghost")
        kernels = best(own, mode="outside", private=True)
        found[model] = {
            "speed ÷ PyTorch float32, not private": best(usual, **plain)["median_ms"]
            / cell["median_ms"],
            "the same, PyTorch's memory kept": best(own, **plain)["median_ms"] / cell["median_ms"],
            "speed ÷ PyTorch bf16, not private": best(usual, **half)["median_ms"]
            / fastest["median_ms"],
            "the same, its memory kept": best(own, **half)["median_ms"] / fastest["median_ms"],
            "speed ÷ better Opacus": best(usual, system="opacus")["median_ms"] / cell["median_ms"],
            "the same, Opacus' memory kept": best(own, system="opacus")["median_ms"]
            / cell["median_ms"],
            "time ÷ own not private": cell["median_ms"]
            / best(own, mode="cell", private=False)["median_ms"],
            "time of kernels ÷ outside": cell["kernels_ms"] / kernels["median_ms"],
            "memory ÷ Opacus ghost": cell["peak_mib"] / ghost["peak_mib"],
            "the same, ghost without its libraries": cell["peak_mib"]
            / (ghost["peak_mib"] - ghost["before_mib"]),
        }
    return found


def speed(rows: Rows, failed: Failures, folder: Path) -> Section:
    """All rows, and what they mean."""
    ratios = quotients(rows)
    return Section(
        title="Speed",
        text=(
            "A private step in the cell does everything: it gathers the batch from the records in "
            "the enclave, computes forward, backward, norms, clipped sums, draws the noise and "
            "updates. It is one full physical batch, drawn from as many records at rate 1, for us "
            "and for Opacus: Poisson sampling gives batches of changing size, so give an image a "
            "physical batch that few draws exceed, for those take two. `outside` is our kernels "
            "through TVM's own runtime, without gather and noise; not private, gradients of "
            "weights are summed over the batch and no norms are taken. `cell`, not private, is an "
            "image of those kernels. Its cell draws noise all the same, but training without "
            "privacy needs none: the row is the whole step less the time that noise takes, which "
            "is that of the same image without kernels (gather, sampling and noise) less that of "
            "an image without kernels and with next to no weights (gather and sampling). *Time ÷ "
            "own not private* is the whole private step ÷ this row, both in the cell. "
            "PyTorch and Opacus count in their best mode, Myelin in float32, but against bf16 "
            "in its best precision. Peers allocate as their packages come; where a mode says "
            "*memory kept*, the C library was told never to give memory back "
            f"(`{' '.join(f'{name}={value}' for name, value in ALLOCATOR.items())}`), which "
            "spares them fresh pages, and the columns *memory kept* take the best of these rows "
            "and the others. "
            "`outside` keeps its memory always. Memory is the most that a process had: of peers "
            "the whole process, and besides without what it had before there was a model (Python "
            "and libraries); of ours the cell with all that is in it, but not the host's Python."
        ),
        tables=[
            Table(
                title="Private training in the cell, against",
                columns=("model", *next(iter(ratios.values()), {})),
                rows=[
                    (model, *(f"{value:.2f}" for value in values.values()))
                    for model, values in ratios.items()
                ],
            ),
            Table(
                title="Examples per second",
                columns=(
                    *("model (batch)", "system", "mode", "precision", "private"),
                    *("ms", "examples/s", "peak MiB", "of which before the model"),
                ),
                rows=[cells(row) for row in rows],
                words=5,
            ),
            *report.failures(
                [tuple(row.values()) for row in failed], "model", "system", "mode", "precision"
            ),
            Table(
                title="Images",
                columns=("model", "precision", "KiB", "build s", "launch to report data, ms"),
                rows=[
                    (
                        row["model"],
                        row["precision"],
                        f"{row['image_bytes'] / 1024:.0f}",
                        f"{row['build_seconds']:.1f}",
                        f"{row['launch_ms']:.1f}",
                    )
                    for row in rows
                    if "launch_ms" in row
                ],
                words=2,
            ),
        ],
        pictures=[("Examples per second", pictures.throughput(bars(rows), folder))] if rows else [],
    )


def bars(rows: Rows) -> dict[str, dict[str, float]]:
    """For each model, examples a second of the peers at their best and of ours."""
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        wanted: dict[str, dict[str, Any]] = {
            "PyTorch float32, not private": {"system": "pytorch", "precision": "float32"},
            "PyTorch bf16, not private": {"system": "pytorch", "precision": "bf16"},
            "Opacus, private": {"system": "opacus"},
            "Myelin, not private, in the cell": {"mode": "cell", "private": False},
            "Myelin, private, in the cell": {
                "mode": "cell",
                "private": True,
                "precision": "float32",
            },
        }
        found[f"{model} ({own[0]['batch']})"] = {
            name: best(own, **values)["examples_per_second"] for name, values in wanted.items()
        }
    return found


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    return (
        f"{row['model']} ({row['batch']})",
        row["system"],
        row["mode"],
        row["precision"],
        "yes" if row["private"] else "no",
        f"{row['median_ms']:.2f}",
        f"{row['examples_per_second']:,.0f}",
        f"{row['peak_mib']:,.0f}",
        f"{row['before_mib']:,.0f}",
    )


def provenance(asked: argparse.Namespace, before: str, counted: tuple[int, int]) -> str:
    """Where the numbers of a section come from; `counted` of the probe before it."""
    options = (
        f"--models {asked.models} --rounds {asked.rounds} --seconds {asked.seconds:g} "
        f"--rest {asked.rest:g} --steps {asked.steps}"
    )
    measured, disturbed = machine.measured - counted[0], machine.disturbed - counted[1]
    probed = f"; {disturbed} of {measured} measurements in spite of the probe" if measured else ""
    return (
        f"*{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, `{options}`; load average "
        f"{before} at the start, {report.load()} at the end{probed}.*"
    )


def page(old: str, section: Section, origin: str) -> str:
    """docs/benchmarks.md: the old one with this section, unless it is of another machine."""
    numbers = ", ".join(f"{name} {number}" for name, number in report.versions().items())
    head = (
        "# Benchmarks\n\n"
        "Written by `python -m benchmarks --page`; each section says by which run.\n\n"
        f"{report.cpu()}, {report.THREADS} threads on every side; {numbers}. Medians of rounds in "
        "turn; machines like this one are noisy, so believe ratios of one run only. The two cores "
        "of a virtual machine are moved about, and may for a while be one, or share no cache. So "
        "measurements wait until a probe finds them side by side, and are made again where it does "
        "not afterwards; what happens within a measurement it cannot see."
    )
    before, *parts = old.rstrip("\n").split("\n\n## ")
    found = {part.partition("\n")[0]: part for part in parts if before == head}
    title, _, text = section.markdown(ROOT / "docs").removeprefix("## ").partition("\n\n")
    found[title] = f"{title}\n\n{origin}\n\n{text}"
    return "\n\n## ".join((head, *found.values())) + "\n"


if __name__ == "__main__":
    main()
