"""`make bench-inference`: predictions of one and of a batch beside PyTorch and ONNX Runtime.

`python -m benchmarks.inference [--models NAME,…|all] [--rounds N] [--seconds S]`. The kernels are
those of training (`Program.predict`), run outside any enclave.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks import report
from benchmarks.burst import Row
from benchmarks.models import Case, cases_named
from benchmarks.predict import SYSTEMS
from benchmarks.report import Section, Table

ROUNDS = 4


def main() -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=0.5)
    asked = parser.parse_args()
    with report.alone():
        section(cases_named(asked.models), asked.seconds, rounds=asked.rounds).print()


def section(cases: list[Case], seconds: float, *, rounds: int = ROUNDS) -> Section:
    """Milliseconds of one call of each system, in turn."""
    rows = []
    for case in cases:
        for batch in (1, case.batch):
            ms = measure(case, batch, seconds, rounds)
            rows.append((case.name, str(batch), *(f"{value:.3f}" for value in ms.values())))
    report.say("")
    return Section(
        title="Inference",
        text=(
            "Milliseconds of one prediction in float32, without any privacy: peers with the same "
            "weights and examples; ours are the kernels of a training image's `predict`, outside "
            "the cell."
        ),
        tables=[
            Table(
                title="Milliseconds of a prediction",
                columns=("model", "examples", *SYSTEMS),
                rows=rows,
            )
        ],
    )


def measure(case: Case, batch: int, seconds: float, rounds: int) -> dict[str, float]:
    """Each system's median over rounds of its rounds' medians."""
    rows = {}
    for system in SYSTEMS:
        report.say(f"{case.name}, {batch}: {system}, getting ready")
        rows[system] = Row("predict", case.name, system, str(batch))
    found: dict[str, list[float]] = {system: [] for system in rows}
    for round_ in range(rounds):
        report.say(f"{case.name}, {batch}: round {round_ + 1} of {rounds}")
        for system, row in rows.items():
            found[system].append(1e3 * statistics.median(row.burst(seconds)["step"]))
    for row in rows.values():
        row.end()
    return {system: statistics.median(same) for system, same in found.items()}


if __name__ == "__main__":
    main()
