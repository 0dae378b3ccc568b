"""`make bench`: examples per second beside PyTorch and Opacus, in one run on one machine.

`python -m benchmarks [--models NAME,…|all] [--rounds N] [--seconds S] [--page]`. Every row is
measured in a process of its own, two threads, rounds interleaved; a row's time is the median of its
rounds' medians. Writes build/bench.json; `--page` also writes docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.models import CASES, SMALL

ROOT = Path(__file__).parent.parent
PLAN = [
    ("peers", "eager", "float32"),
    ("peers", "channels_last", "float32"),
    ("peers", "compile", "float32"),
    ("peers", "eager", "bf16"),
    ("peers", "hooks", "float32"),
    ("peers", "ghost", "float32"),
    ("ours", "outside", "float32"),
    ("ours", "outside-private", "float32"),
    ("ours", "cell", "float32"),
]
IDENTITY = ("model", "batch", "system", "mode", "precision", "private")
FORM = (*IDENTITY, "median_ms", "examples_per_second", "peak_mib")


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(case.name for case in SMALL))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--page", action="store_true", help="write docs/benchmarks.md")
    asked = parser.parse_args()
    names = asked.models.split(",")
    cases = CASES if asked.models == "all" else [case for case in CASES if case.name in names]
    rows = [row for case in cases for row in measure(case.name, asked.rounds, asked.seconds)]
    facts = {
        "cpu": cpu(),
        "threads": 2,
        "versions": {
            name: version(name) for name in ("myelin", "apache-tvm", "torch", "opacus", "numpy")
        },
        "rows": [{name: row[name] for name in FORM} for row in rows],
    }
    (ROOT / "build").mkdir(exist_ok=True)
    (ROOT / "build" / "bench.json").write_text(json.dumps(facts, indent=1) + "\n")
    console = Console(width=130)
    console.print(f"{facts['cpu']}, 2 threads, load average {os.getloadavg()[0]:.1f} at the end")
    for table in (speeds(rows), ratios(rows), images(rows)):
        console.print(table)
    if asked.page:
        (ROOT / "docs" / "benchmarks.md").write_text(page(facts, rows, asked))


def measure(case: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of one model, medians over interleaved rounds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for round_ in range(rounds):
        for module, mode, precision in PLAN:
            say = f"{case}: {mode} {precision}, round {round_ + 1} of {rounds}"
            print(f"\r{say:70}", end="", file=sys.stderr, flush=True)
            done = subprocess.run(
                [
                    *(sys.executable, "-m", f"benchmarks.{module}"),
                    *(case, mode, str(seconds), precision),
                ],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=os.environ | {"TVM_NUM_THREADS": "2"},
                check=False,
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no words"])[-1]
                print(f"\n{say}: did not run: {reason}", file=sys.stderr)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            found.setdefault(tuple(row[name] for name in IDENTITY), []).append(row)
    print(file=sys.stderr)
    rows = []
    for same in found.values():
        row = dict(same[0])
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = statistics.median(each[name] for each in same)
        row["examples_per_second"] = row["batch"] / row["median_ms"] * 1e3
        rows.append(row)
    return rows


def speeds(rows: list[dict[str, Any]]) -> Table:
    """All rows."""
    table = Table(title="examples per second", title_justify="left")
    for title in ("model (batch)", "system", "mode", "precision", "private", "ms", "per s", "MiB"):
        table.add_column(title, justify="right" if title in ("ms", "per s", "MiB") else "left")
    for row in rows:
        table.add_row(*cells(row))
    return table


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
    )


def quotients(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """For each model, private training in the cell against the others, from this run."""
    result = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]

        def best(own: list[dict[str, Any]] = own, **wanted: Any) -> float:
            fits = [row for row in own if all(row[key] == value for key, value in wanted.items())]
            return max((row["examples_per_second"] for row in fits), default=float("nan"))

        cell = best(system="myelin", mode="cell")
        outside = [row for row in own if row["mode"] == "outside" and row["private"]]
        inside = [row for row in own if row["mode"] == "cell"]
        kernels = (
            inside[0]["kernels_ms"] / outside[0]["median_ms"]
            if inside and outside
            else float("nan")
        )
        result.append(
            (
                model,
                {
                    "PyTorch float32, not private": cell
                    / best(system="pytorch", precision="float32"),
                    "PyTorch bf16, not private": cell / best(system="pytorch", precision="bf16"),
                    "better Opacus": cell / best(system="opacus"),
                    "own speed without privacy, outside": cell
                    / best(system="myelin", mode="outside", private=False),
                    "time of the same kernels, cell over outside": kernels,
                },
            )
        )
    return result


def ratios(rows: list[dict[str, Any]]) -> Table:
    """`quotients` as a table."""
    found = quotients(rows)
    table = Table(title="private, in the cell, against", title_justify="left")
    table.add_column("model")
    for title in found[0][1] if found else ():
        table.add_column(title, justify="right")
    for model, values in found:
        table.add_row(model, *(f"{value:.2f}" for value in values.values()))
    return table


def images(rows: list[dict[str, Any]]) -> Table:
    """What the images are like."""
    table = Table(title="images", title_justify="left")
    for title in ("model", "KiB", "build s", "launch to first evidence, ms"):
        table.add_column(title, justify="left" if title == "model" else "right")
    for row in rows:
        if "launch_ms" in row:
            table.add_row(
                row["model"],
                f"{row['image_bytes'] / 1024:.0f}",
                f"{row['build_seconds']:.1f}",
                f"{row['launch_ms']:.1f}",
            )
    return table


def page(facts: dict[str, Any], rows: list[dict[str, Any]], asked: argparse.Namespace) -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks --page` from one run"
        f" (`--models {asked.models} --rounds {asked.rounds} --seconds {asked.seconds:g}`).",
        "",
        f"{facts['cpu']}, two threads on every side; "
        + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        + f"; load average {os.getloadavg()[0]:.1f} at the end. Medians of rounds in turn; "
        "machines like this one are noisy, so believe ratios of one run only.",
        "",
        "A private step in the cell does everything: it gathers the batch from the records in the "
        "enclave, computes forward, backward, norms, clipped sums, draws the noise and updates. "
        "`outside` is the same kernels through TVM's own runtime, without gather and noise.",
        "",
        "| model (batch) | system | mode | precision | private | ms | examples/s | peak MiB |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: |",
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
        "## Private training in the cell against",
        "",
    ]
    found = quotients(rows)
    if found:
        lines += [
            "| model | " + " | ".join(found[0][1]) + " |",
            "| --- |" + " ---: |" * len(found[0][1]),
            *(
                f"| {model} | " + " | ".join(f"{value:.2f}" for value in values.values()) + " |"
                for model, values in found
            ),
            "",
        ]
    lines += [
        "## Images",
        "",
        "| model | KiB | build s | launch to first evidence, ms |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {row['model']} | {row['image_bytes'] / 1024:.0f} | {row['build_seconds']:.1f} | "
            f"{row['launch_ms']:.1f} |"
            for row in rows
            if "launch_ms" in row
        ),
        "",
    ]
    return "\n".join(lines)


def cpu() -> str:
    """The processor's name, family, model, and what matters of its features."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
    has = [name for name in wanted if name in fields.get("flags", "").split()]
    name = fields.get("model name", platform.processor())
    return f"{name} family {fields.get('cpu family')} model {fields.get('model')} ({' '.join(has)})"


if __name__ == "__main__":
    main()
