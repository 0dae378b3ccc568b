"""The benchmarks' machinery; no test looks at a speed."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from myelin import nn
from myelin.model import load

torch = pytest.importorskip("torch")

from benchmarks import __main__ as bench  # noqa: E402
from benchmarks.models import CASES, case_named  # noqa: E402
from benchmarks.report import Section, Table  # noqa: E402

ROOT = Path(__file__).parent.parent


def row(system: str, mode: str, precision: str, private: bool, ms: float, **more: float) -> dict:
    return {
        **{"model": "m", "batch": 10, "system": system, "mode": mode, "precision": precision},
        **{"private": private, "median_ms": ms, "examples_per_second": 1e4 / ms, "peak_mib": 30.0},
        **more,
    }


ROWS = [
    row("pytorch", "eager", "float32", False, 8.0),
    row("pytorch", "compile", "float32", False, 6.0),
    row("pytorch", "eager", "bf16", False, 3.0),
    row("opacus", "hooks", "float32", True, 40.0),
    row("opacus", "ghost", "float32", True, 20.0, peak_mib=300.0),
    row("myelin", "outside", "float32", False, 1.6),
    row("myelin", "outside", "float32", True, 1.5),
    row("myelin", "cell", "float32", True, 2.0, kernels_ms=1.2, launch_ms=3.0, image_bytes=1024)
    | {"build_seconds": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_both_sides_of_a_case_are_the_same_model(case) -> None:
    ours = load(case.layers(nn), case.shape)
    theirs = dict(case.layers(torch.nn).named_parameters())
    assert {n: tuple(p.shape) for n, p in theirs.items()} == dict(ours.shapes)
    assert ours.input == case.shape
    assert ours.outputs == case.classes


def test_a_peer_computes_what_ours_does() -> None:
    case = case_named("resnet32")
    ours, theirs = load(case.layers(nn), case.shape), case.layers(torch.nn)
    theirs.load_state_dict({n: torch.tensor(v) for n, v in ours.parameters.items()})
    from myelin.cpu import Cpu
    from myelin.optimizer import SGD
    from myelin.plan import Outside, compile_training

    program = compile_training(
        ours, loss="cross-entropy", optimizer=SGD(lr=0.1), batch=2, cpu=Cpu.native()
    )
    x = np.random.default_rng(0).standard_normal((2, *case.shape)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    found = Outside(program, Cpu.native()).predict(x, ours.parameters)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_quotients_take_the_peers_at_their_best() -> None:
    assert bench.quotients(ROWS)["m"] == pytest.approx(
        {
            "speed ÷ PyTorch float32, not private": 3.0,
            "speed ÷ PyTorch bf16, not private": 1.5,
            "speed ÷ better Opacus": 10.0,
            "time ÷ own not private": 1.25,
            "time of kernels ÷ outside": 0.8,
            "memory ÷ Opacus ghost": 0.1,
        }
    )


def test_a_peer_that_did_not_run_leaves_no_number() -> None:
    found = bench.quotients(ROWS[2:])["m"]
    assert np.isnan(found["speed ÷ PyTorch float32, not private"])
    assert found["speed ÷ better Opacus"] == 10.0


def test_the_file_has_the_promised_form() -> None:
    facts = json.loads(json.dumps(bench.facts(ROWS)))
    assert list(facts) == ["cpu", "threads", "versions", "rows"]
    assert len(facts["rows"]) == len(ROWS)
    for found in facts["rows"]:
        assert list(found) == [
            *("model", "batch", "system", "mode", "precision", "private"),
            *("median_ms", "examples_per_second", "peak_mib"),
        ]


def test_the_rows_of_all_rounds_become_their_median() -> None:
    found = bench.median([row("myelin", "cell", "float32", True, ms) for ms in (4.0, 2.0, 3.0)])
    assert found["median_ms"] == 3.0
    assert found["examples_per_second"] == pytest.approx(10 / 3e-3)


def test_a_section_is_a_part_of_the_page(tmp_path) -> None:
    table = Table(title="T", columns=("a", "b"), rows=[("x", "1")])
    picture = tmp_path / "docs" / "pictures" / "p.svg"
    section = Section(title="S", text="Words.", tables=[table], pictures=[("P", picture)])
    assert section.markdown(tmp_path / "docs").splitlines() == [
        *("## S", "", "Words.", "", "![P](pictures/p.svg)", ""),
        *("**T**", "", "| a | b |", "| --- | ---: |", "| x | 1 |"),
    ]


def test_two_runs_at_once_are_refused(tmp_path) -> None:
    with (tmp_path / "myelin-benchmarks.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "--models", "mlp"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(tmp_path)},
            check=False,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "another benchmark is running on this machine" in done.stderr


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(SystemExit, match="no model 'lenet': choose from mlp, mnist_cnn"):
        case_named("lenet")
