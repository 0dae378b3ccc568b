"""What privacy costs in memory beyond the per-example gradients that are stored.

`python -m benchmarks.memory [--models NAME,…|all]`. Compiles only: an arena's size is planned.
"""

from __future__ import annotations

import argparse
import math

from benchmarks import report
from benchmarks.models import Case, cases_named
from benchmarks.report import Section, Table
from myelin import nn
from myelin.cpu import Cpu
from myelin.importers import load
from myelin.optimizer import SGD
from myelin.plan import compile_training
from myelin.planner import STORED_BYTES
from myelin.program import Program


def main() -> None:
    """Plans, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="all")
    section(cases_named(parser.parse_args().models)).print()


def section(cases: list[Case]) -> Section:
    """Bytes of a step's arena with privacy and without."""
    rows = []
    for case in cases:
        report.say(f"{case.name}: memory")
        private, plain = program(case, private=True), program(case, private=False)
        stored = stored_bytes(private)
        rows.append(
            (
                f"{case.name} ({case.batch})",
                *(f"{size / 2**20:.1f}" for size in (private.arena, stored, plain.arena)),
                f"{(private.arena - stored) / plain.arena:.2f}",
            )
        )
    report.say("")
    return Section(
        title="Memory of privacy",
        text=(
            "The arena of a step: weights, activations, gradients, everything but the records. "
            "Per-example gradients of convolutions are stored where that is faster, within a "
            f"budget of {STORED_BYTES >> 20} MiB (`stored_bytes`)."
        ),
        tables=[
            Table(
                title="MiB of an arena",
                columns=(
                    *("model (batch)", "private", "of which stored gradients"),
                    *("not private", "private without stored ÷ not private"),
                ),
                rows=rows,
            )
        ],
    )


def program(case: Case, *, private: bool) -> Program:
    """A step's plan; without privacy none of the budget is used."""
    return compile_training(
        load(case.layers(nn), case.shape),
        loss="cross-entropy",
        optimizer=SGD(lr=0.01, momentum=0.9),
        batch=case.batch,
        cpu=Cpu.native(),
        private=private,
        stored_bytes=STORED_BYTES if private else 0,
    )


def stored_bytes(program: Program) -> int:
    """Per-example gradients of the convolutions' weights, which are all kept until the norms are
    known.
    """
    stored = {layer for layer, method in program.clipping if method == "stored"}
    return sum(
        4 * program.batch * math.prod(parameter.stored)
        for parameter in program.parameters
        if len(parameter.stored) == 4 and parameter.name.rpartition(".")[0] in stored
    )


if __name__ == "__main__":
    main()
