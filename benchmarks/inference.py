"""`make bench-inference`: predictions of one and of a batch beside PyTorch and ONNX Runtime.

`python -m benchmarks.inference [--models NAME,…|all] [--rounds N] [--seconds S]`. The kernels are
those of training (`Program.predict`), run outside any enclave.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks import report
from benchmarks.burst import in_turn
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
    rows, failed = [], []
    for case in cases:
        for batch in (1, case.batch):
            commands = {system: ("predict", case.name, system, str(batch)) for system in SYSTEMS}
            turns = in_turn(commands, rounds, seconds, what=f"{case.name}, inference of {batch}")
            ms = {
                system: statistics.median(each["step"] for each in turns.medians[system])
                for system in turns.facts
            }
            found = (f"{ms[system]:.3f}" if system in ms else "–" for system in SYSTEMS)
            rows.append((case.name, str(batch), *found))
            failed += [(case.name, str(batch), *words) for words in turns.failed.items()]
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
            ),
            *report.failures(failed, "model", "examples", "system"),
        ],
    )


if __name__ == "__main__":
    main()
