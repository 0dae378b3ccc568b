"""The benchmarks' machinery; no test looks at a speed."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from myelin import nn
from myelin.cost import Work
from myelin.cpu import Cpu
from myelin.importers import load
from myelin.optimizer import SGD
from myelin.plan import Outside, compile_training

torch = pytest.importorskip("torch")

pytest.importorskip("matplotlib")

from benchmarks import __main__ as bench  # noqa: E402
from benchmarks import (  # noqa: E402
    accuracy,
    burst,
    inference,
    kernels,
    pictures,
    records,
    report,
    scaling,
    threads,
)
from benchmarks.models import CASES, WIDENED, Case, case_named  # noqa: E402
from benchmarks.report import Section, Table  # noqa: E402
from benchmarks.step import smallest  # noqa: E402

ROOT = Path(__file__).parent.parent


def row(system: str, mode: str, precision: str, private: bool, ms: float, **more: float) -> dict:
    return {
        **{"model": "m", "batch": 10, "system": system, "mode": mode, "precision": precision},
        **{"private": private, "median_ms": ms, "examples_per_second": 1e4 / ms, "peak_mib": 30.0},
        "before_mib": 0.0,
        **more,
    }


ROWS = [
    row("pytorch", "eager", "float32", False, 8.0),
    row("pytorch", "compile", "float32", False, 6.0),
    row("pytorch", "eager, memory kept", "float32", False, 5.0),
    row("pytorch", "channels_last, memory kept", "float32", False, 7.0),
    row("pytorch", "eager", "bf16", False, 3.0),
    row("pytorch", "channels_last, memory kept", "bf16", False, 3.5),
    row("opacus", "hooks", "float32", True, 40.0),
    row("opacus", "ghost", "float32", True, 20.0, peak_mib=300.0, before_mib=240.0),
    row("opacus", "hooks, memory kept", "float32", True, 16.0),
    row("myelin", "outside", "float32", False, 1.6),
    row("myelin", "outside", "float32", True, 1.5),
    row("myelin", "cell", "float32", False, 1.25, kernels_ms=1.0),
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
    program = compile_training(
        ours, loss="cross-entropy", optimizer=SGD(lr=0.1), batch=2, cpu=Cpu.native()
    )
    x = np.random.default_rng(0).standard_normal((2, *case.shape)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    found = Outside(program, Cpu.native()).predict(x, ours.parameters)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "mnist_cnn"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar_cnn", "vgg9", "resnet32")),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch's exporter without onnxscript is the old one
def test_inference_of_one_and_of_many_is_that_of_onnx_runtime(name, batch, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    case = case_named(name)
    ours, theirs = load(case.layers(nn), case.shape), case.layers(torch.nn).eval()
    theirs.load_state_dict({n: torch.tensor(v) for n, v in ours.parameters.items()})
    x = np.random.default_rng(0).standard_normal((batch, *case.shape)).astype(np.float32)
    path = tmp_path / "net.onnx"
    torch.onnx.export(theirs, (torch.tensor(x),), path, opset_version=20, dynamo=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: x})
    cpu = Cpu.native()
    program = compile_training(
        ours, loss="cross-entropy", optimizer=SGD(lr=0.1), batch=batch, cpu=cpu
    )
    found = Outside(program, cpu).predict(x, ours.parameters)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_every_system_of_the_inference_benchmark_runs() -> None:
    pytest.importorskip("onnxruntime")
    (table,) = inference.section([case_named("mlp")], 0.0, rounds=1).tables
    assert [row[:2] for row in table.rows] == [("mlp 784-256-128-10", n) for n in ("1", "256")]
    assert all(float(ms) > 0 for row in table.rows for ms in row[2:])
    assert len(table.rows[0]) == len(table.columns) == 6


def test_a_prediction_that_failed_is_named_and_the_page_has_the_section(monkeypatch) -> None:
    found = burst.Turns(
        facts={"PyTorch": {}},
        medians={"PyTorch": [{"step": 3.0}, {"step": 1.0}, {"step": 2.0}]},
        failed={"ONNX Runtime": "no module"},
    )
    asked: list[tuple] = []
    monkeypatch.setattr(inference, "in_turn", lambda *a, **_: asked.append(a[1:]) or found)
    arguments = argparse.Namespace(models="mlp", rounds=3, seconds=0.5, steps=1, rest=0.0)
    section = bench.measures(arguments, Path("unused"))["inference"]()
    assert asked == [(3, 0.5)] * 2
    times, failed = section.tables
    assert times.rows[0] == ("mlp 784-256-128-10", "1", "2.000", "–", "–", "–")
    assert failed.rows[0] == ("mlp 784-256-128-10", "1", "ONNX Runtime", "no module")


def test_rows_in_turn_are_measured_when_the_machine_is_undisturbed(monkeypatch) -> None:
    asked: list[float] = []

    def undisturbed(measure, seconds: float):
        asked.append(seconds)
        return measure()

    class Fake:
        def __init__(self, *arguments: str) -> None:
            self.number = float(arguments[-1])

        def burst(self, seconds: float) -> dict[str, list[float]]:
            return {"step": [self.number * seconds] * 3}

        def end(self) -> dict:
            return {"number": self.number}

    monkeypatch.setattr(burst, "Row", Fake)
    monkeypatch.setattr(burst.machine, "undisturbed", undisturbed)
    turns = burst.in_turn({"a": ("m", "c", "1"), "b": ("m", "c", "2")}, 2, 0.5, what="w")
    assert asked == [0.5] * 4
    assert turns.medians == {"a": [{"step": 500.0}] * 2, "b": [{"step": 1000.0}] * 2}
    assert turns.facts == {"a": {"number": 1.0}, "b": {"number": 2.0}}


class FakeProbe:
    """What a probe finds, one time after the other: (multiply, exchange), a copy taking 1."""

    def __init__(self, *found: tuple[float, float]) -> None:
        self.left = list(found)

    def burst(self, _: float) -> dict[str, list[float]]:
        multiply, exchange = self.left.pop(0)
        return {"multiply": [multiply], "copy": [1.0], "exchange": [exchange]}


QUIET, SHARED, APART = (1.0, 1.5), (2.0, 1.0), (1.0, 3.0)


@pytest.mark.parametrize("bad", [SHARED, APART])
def test_a_measurement_is_made_when_the_cores_are_side_by_side(bad, monkeypatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    machine, made = burst.Machine(), iter(range(9))
    machine._probe = FakeProbe(QUIET, QUIET, bad, bad, QUIET, bad, QUIET, QUIET)
    assert machine.undisturbed(lambda: next(made), 1.0) == 0
    # Waits, measures, finds itself disturbed, and measures again.
    assert machine.undisturbed(lambda: next(made), 1.0) == 2
    assert (machine.measured, machine.disturbed, machine._probe.left) == (2, 0, [])


def test_patience_with_a_disturbed_machine_ends(monkeypatch) -> None:
    monkeypatch.setattr(burst, "PATIENCE", (0.0, 0.0))
    machine = burst.Machine()
    machine._probe = FakeProbe(QUIET, APART, APART, QUIET)
    assert machine.undisturbed(lambda: "slow", 1.0) == "slow"
    assert machine.undisturbed(lambda: "slow", 1.0) == "slow"
    assert (machine.measured, machine.disturbed) == (2, 2)
    assert machine.undisturbed(lambda: "unprobed", 0) == "unprobed"


def test_quotients_take_the_peers_at_their_best() -> None:
    assert bench.quotients(ROWS)["m"] == pytest.approx(
        {
            "speed ÷ PyTorch float32, not private": 3.0,
            "the same, PyTorch's memory kept": 2.5,
            "speed ÷ PyTorch bf16, not private": 1.5,
            "the same, its memory kept": 1.5,
            "speed ÷ better Opacus": 10.0,
            "the same, Opacus' memory kept": 8.0,
            "time ÷ own not private": 1.6,
            "time of kernels ÷ outside": 0.8,
            "memory ÷ Opacus ghost": 0.1,
            "the same, ghost without its libraries": 0.5,
        }
    )


def test_memory_is_kept_in_every_mode_but_compile() -> None:
    modes = {(mode.removesuffix(burst.KEPT), p) for _, mode, p in bench.PLAN if burst.KEPT in mode}
    torch_ = {(mode, p) for mode in ("eager", "channels_last") for p in ("float32", "bf16")}
    assert torch_ | {("hooks", "float32"), ("ghost", "float32")} <= modes


def test_a_peer_that_did_not_run_leaves_no_number() -> None:
    found = bench.quotients([r for r in ROWS if r["system"] != "pytorch"])["m"]
    assert np.isnan(found["speed ÷ PyTorch float32, not private"])
    assert found["speed ÷ better Opacus"] == 10.0


def test_the_file_has_the_promised_form() -> None:
    failed = [bench.failure("m", "peers", "ghost", "float32", "Out of memory")]
    facts = json.loads(json.dumps(bench.facts(ROWS, failed)))
    assert list(facts) == ["cpu", "threads", "versions", "rows", "failed"]
    assert facts["failed"] == [
        {"model": "m", "system": "opacus", "mode": "ghost", "precision": "float32"}
        | {"why": "Out of memory"}
    ]
    assert len(facts["rows"]) == len(ROWS)
    for found in facts["rows"]:
        assert list(found) == [
            *("model", "batch", "system", "mode", "precision", "private"),
            *("median_ms", "examples_per_second", "peak_mib"),
        ]


def test_a_row_is_the_median_of_its_rounds() -> None:
    rounds = [{"step": 4.0, "rest": 0.5}, {"step": 2.0, "rest": 1.5}, {"step": 3.0, "rest": 0.25}]
    found = bench.finished({"batch": 10, "mode": "cell"}, rounds)
    assert found["median_ms"] == 3.0
    assert found["examples_per_second"] == pytest.approx(10 / 3e-3)
    assert found["kernels_ms"] == 2.75
    assert "kernels_ms" not in bench.finished({"batch": 10}, [{"step": 4.0}])


def test_a_row_without_privacy_is_its_step_without_noise() -> None:
    rounds = [
        {"step": 4.0, "rest": 1.0, "gather": 0.25},
        {"step": 2.0, "rest": 1.5, "gather": 0.5},
        {"step": 9.0, "rest": 0.5, "gather": 0.25},
    ]
    found = bench.finished({"batch": 10}, rounds)
    assert found["median_ms"] == 3.25
    assert found["examples_per_second"] == pytest.approx(10 / 3.25e-3)
    assert found["kernels_ms"] == 3.0


@pytest.mark.parametrize(
    ("mode", "private", "parts"),
    [("cell", True, ["step", "rest"]), ("cell-plain", False, ["step", "rest", "gather"])],
)
def test_a_row_of_the_cell_has_what_its_noise_is_told_by(mode, private, parts) -> None:
    row = burst.Row("ours", "mlp", mode, "float32")
    times = row.burst(0.0)
    assert list(times) == parts
    assert all(second > 0 for part in parts for second in times[part])
    facts = row.end()
    assert [facts[name] for name in ("system", "mode", "private")] == ["myelin", "cell", private]
    assert ("launch_ms" in facts) == private


@pytest.mark.parametrize("features", records.KINDS, ids=lambda kind: kind.type)
def test_parts_of_a_step_are_of_the_whole_step(features, monkeypatch) -> None:
    """Each image's own number: gradients 100, updates 20, noise 5, gathering 2, draws 1."""
    measured = []

    def medians(runs, seconds):
        measured.append(records_medians(runs, seconds))
        known = {"whole": 128.0, "no gradient": 28.0, "no kernels": 8.0, "no noise": 3.0}
        return [{**known, "one drawn": 1.0}[name] for name in runs]

    records_medians = records.medians
    monkeypatch.setattr(records, "medians", medians)
    found = records.parts(TINY, 300, features, 0.0, "process")
    assert found == {
        **{"step": 128.0, "draws": 1.0, "gather": 2.0},
        **{"noise": 5.0, "gradient": 100.0, "update": 20.0},
    }
    assert len(measured[0]) == 5
    assert min(measured[0]) > 0


def test_rows_of_records_are_of_one_batch_and_of_many(monkeypatch) -> None:
    monkeypatch.setattr(records, "parts", lambda *_: dict.fromkeys("abcdef", 1.0))
    (table,) = records.section([TINY], 0.0, 1000).tables
    assert [row[1:4] for row in table.rows] == [
        ("float32", "8", "0.0"),
        ("float32", "1,000", "3.0"),
        ("uint8", "1,000", "0.8"),
    ]
    assert {len(row) for row in table.rows} == {len(table.columns)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_smallest_model_takes_the_same_records(case) -> None:
    small = smallest(case)
    model = load(small.layers(nn), small.shape)
    assert (model.input, small.batch) == (case.shape, case.batch)
    weights = sum(np.prod(shape) for shape in model.shapes.values())
    assert 50 * weights < sum(np.prod(s) for s in load(case.layers(nn), case.shape).shapes.values())


def test_a_row_works_when_asked_and_then_says_what_it_is() -> None:
    row = burst.Row("peers", "mlp", "eager" + burst.KEPT, "float32")
    first = row.burst(0.0)
    assert list(first) == ["step"]
    assert len(first["step"]) == burst.LEAST
    facts = row.end()
    assert facts.pop("peak_mib") >= facts.pop("before_mib") > 10
    assert facts == {
        **{"model": "mlp 784-256-128-10", "batch": 256, "system": "pytorch"},
        **{"mode": "eager, memory kept"},
        **{"precision": "float32", "private": False},
    }


def test_a_burst_lasts_as_long_as_it_is_told_and_warms_up_before() -> None:
    calls: list[float] = []

    def step() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.01)

    times = burst.timed(step, 0.5)
    assert len(times) > burst.LEAST
    assert 0.49 < sum(times) < 5
    assert len(calls) > len(times)
    assert len(burst.timed(step, 0.0)) == burst.LEAST


def test_a_row_that_cannot_start_says_why() -> None:
    with pytest.raises(burst.RowFailed, match="no model 'lenet'"):
        burst.Row("peers", "lenet", "eager", "float32")


def test_rows_that_fail_are_named_beside_those_that_work(tmp_path, monkeypatch) -> None:
    plan = [("peers", "eager", "float32"), ("ours", "cell", "int8")]
    monkeypatch.setattr(bench, "PLAN", plan)
    rows, failed = bench.measure("mlp", 1, 0.0, 0.0)
    assert [row["mode"] for row in rows] == ["eager"]
    ((name, *words),) = [tuple(row.values()) for row in failed]
    assert (name, *words[:-1]) == ("mlp", "myelin", "cell", "int8")
    assert "int8" in words[-1]
    (table,) = [
        table
        for table in bench.speed(
            [row | {"before_mib": 0.0} for row in ROWS], failed, tmp_path
        ).tables
        if table.title == "Rows that failed"
    ]
    assert table.columns == ("model", "system", "mode", "precision", "last words")
    assert table.rows == [(name, *words)]
    titles = [table.title for table in bench.speed(ROWS, [], tmp_path).tables]
    assert "Rows that failed" not in titles


def test_a_row_that_dies_between_two_bursts_says_how_and_the_others_go_on(monkeypatch) -> None:
    class Mortal(burst.Row):
        def burst(self, seconds: float) -> dict[str, list[float]]:
            if self._process.args[-2] == "channels_last":
                os.kill(self._process.pid, signal.SIGKILL)
            return super().burst(seconds)

    monkeypatch.setattr(burst, "Row", Mortal)
    rows = {mode: ("peers", "mlp", mode, "float32") for mode in ("eager", "channels_last")}
    turns = burst.in_turn(rows, 2, 0.0, what="two")
    assert list(turns.facts) == ["eager"]
    assert len(turns.medians["eager"]) == 2
    assert turns.failed == {"channels_last": "no words, status -9"}


def test_last_words_with_bars_stay_one_cell() -> None:
    (table,) = report.failures([("m", "a | b [red]")], "model")
    assert table.markdown().splitlines()[-1] == r"| m | a \| b [red] |"
    assert report.failures([], "model") == []


def test_a_page_keeps_the_sections_that_are_not_measured_again(monkeypatch) -> None:
    monkeypatch.setattr(bench.report, "cpu", lambda: "a processor")
    first, second = (Section(title=t, text=f"of {t}", tables=[]) for t in ("One", "Two"))
    text = bench.page(bench.page("", first, "*a*"), second, "*b*")
    _, one, two = text.split("\n\n## ")
    assert one == "One\n\n*a*\n\nof One"
    assert two == "Two\n\n*b*\n\nof Two\n"
    assert bench.page(text, first, "*c*") == text.replace("*a*", "*c*")
    monkeypatch.setattr(bench.report, "cpu", lambda: "another")
    assert "of One" not in bench.page(text, second, "*d*")


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


TINY = Case(
    name="tiny",
    shape=(1, 28, 28),
    batch=8,
    layers=lambda lib: lib.Sequential(
        *(lib.Conv2d(1, 4, 5, 3), lib.Tanh(), lib.Flatten(), lib.Linear(256, 10))
    ),
)
LIMITS = kernels.Limits(
    lanes=10,
    gflops=100.0,
    bf16_gflops=None,
    tile_gflops=None,
    cache_gbytes=50.0,
    exchange_gbytes=20.0,
    memory_gbytes=10.0,
    cache=1000,
)


def call(kernel: str, ms: float, *, size: int = 0, **work: float) -> kernels.Timed:
    counted = Work(**{"gflop": 0.0} | work)
    return kernels.Timed(
        layer="0", kernel=kernel, work=counted, predicted_ms=ms / 2, bytes=size, ms=ms
    )


def test_our_kernels_and_pytorch_train_alike_from_the_same_start() -> None:
    found = accuracy.curves(TINY, 12)
    exact = ["Myelin", "PyTorch", *accuracy.VARIANTS]
    rounded = ["Myelin, bf16", "PyTorch, bf16"] if accuracy.has_bf16() else []
    assert list(found) == [*exact, *rounded]
    reference = found[accuracy.REFERENCE]
    assert np.log(10) < reference[0] < 4
    assert reference[-1] < reference[0]
    for name in exact:
        np.testing.assert_allclose(found[name], reference, rtol=1e-4)
    assert any(found[name] != reference for name in accuracy.VARIANTS)
    for name in rounded:
        np.testing.assert_allclose(found[name], reference, rtol=0.02)
        assert found[name] != found["Myelin"]


def test_without_bf16_its_curves_are_missing_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accuracy, "has_bf16", lambda: False)
    monkeypatch.setattr(accuracy, "case_named", lambda _: TINY)
    section = accuracy.section(["tiny"], 2, tmp_path)
    assert section.tables[1].columns == ("step", "PyTorch", "Myelin", *accuracy.VARIANTS)
    assert section.text.endswith("has no bf16: those curves are missing.")


def test_our_loss_is_held_against_what_pytorch_differs_from_itself() -> None:
    first, second, third = accuracy.VARIANTS
    curves = {
        "Myelin": [2.0, 1.5],
        "PyTorch": [2.0, 1.0],
        **{first: [2.0, 0.75], second: [2.125, 1.0], third: [2.0, 1.0]},
        **{"Myelin, bf16": [2.0, 4.5], "PyTorch, bf16": [3.0, 1.0]},
    }
    table = accuracy.criterion({"m": curves})
    assert [row[1:] for row in table.rows] == [
        ("Myelin", "5.0e-01", "2.00", "yes"),
        (first, "2.5e-01", "1.00", "–"),
        (second, "1.2e-01", "0.50", "–"),
        (third, "0.0e+00", "0.00", "–"),
        ("Myelin, bf16", "3.5e+00", "3.50", "no"),
        ("PyTorch, bf16", "1.0e+00", "1.00", "–"),
    ]
    curves |= dict.fromkeys(accuracy.VARIANTS, curves["PyTorch"])
    assert accuracy.criterion({"m": curves}).rows[0][3:] == ("inf", "no")


def test_the_loss_of_logits_is_that_of_pytorch() -> None:
    generator = np.random.default_rng(0)
    logits = 30 * generator.standard_normal((9, 4)).astype(np.float32)
    labels = generator.integers(0, 4, 9).astype(np.int32)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double(), torch.tensor(labels).long()
    )
    assert accuracy.cross_entropy(logits, labels) == pytest.approx(float(expected), rel=1e-12)


def test_every_call_of_a_gradient_is_timed_under_its_layer() -> None:
    calls = kernels.timed(TINY, 0.0)
    assert {call.layer for call in calls} >= {"0", "3"}
    assert all(call.ms > 0 and call.bytes > 0 for call in calls)
    assert len(kernels.timed(TINY, 0.0, private=False)) < len(calls)
    products = {call.work.gflop for call in calls if call.work.products or call.work.points}
    assert 2e-9 * 8 * 256 * 10 in products


def test_the_kernel_that_loses_most_comes_first() -> None:
    calls = [
        call("at-its-limit", 10.0, gflop=1.0),
        call("twice", 2.0, gflop=0.05),
        call("twice", 2.0, gflop=0.05),
        call("copies", 1.0, size=8_000_000),
    ]
    table = kernels.kernel_table(TINY, calls, LIMITS)
    assert [row[0] for row in table.rows] == ["twice", "copies", "at-its-limit"]
    found = dict(zip(table.columns, table.rows[0], strict=True))
    assert found["calls"] == "2"
    assert found["ms"] == "4.000"
    assert found["lost ms"] == "3.000"
    assert found["GF/s of the direct algorithm"] == "25.0"
    assert found["of peak"] == "25 %"
    assert found["predicted ÷ measured"] == "! 0.50"
    copies = dict(zip(table.columns, table.rows[1], strict=True))
    assert copies["of copy"] == "80 %"


def test_the_loops_that_find_the_limits_compute_what_they_claim() -> None:
    import tvm

    from myelin.kernels import object as kernel_object

    cpu = Cpu.native()
    loops = {"fma": kernels.fma_loop(cpu, 3), "copy": kernels.copy_loop(cpu, 4 * cpu.lanes)}
    compiled = kernel_object.library(loops, cpu)
    x = np.zeros((kernels.CHAINS + 2, cpu.lanes), np.float32)
    x[:-2], x[-2], x[-1] = np.arange(kernels.CHAINS)[:, None], 2.0, 1.0
    y = np.zeros((kernels.THREADS, kernels.CHAINS, cpu.lanes), np.float32)
    x, y = kernels.aligned(x), kernels.aligned(y)
    compiled["fma"](tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(y))
    expected = 8 * np.arange(kernels.CHAINS) + 7
    assert (y == expected[:, None]).all()
    a = np.arange(2 * 4 * cpu.lanes, dtype=np.float32).reshape(2, -1)
    a, b = kernels.aligned(a), kernels.aligned(np.zeros_like(a))
    compiled["copy"](tvm.runtime.from_dlpack(a), tvm.runtime.from_dlpack(b))
    assert np.array_equal(a, b)


def test_predictions_that_are_far_off_are_marked_in_each_precision() -> None:
    float32 = [call("a", 4.0), call("b", 2.0)]
    bf16 = [replace(float32[0], predicted_ms=5.2), replace(float32[1], predicted_ms=2.5)]
    table = kernels.prediction_table({(TINY, "float32"): float32, (TINY, "bf16"): bf16})
    assert table.rows == [
        ("tiny", "float32", "3.00", "6.00", "! 0.50"),
        ("tiny", "bf16", "7.70", "6.00", "1.28"),
    ]
    assert kernels.quotient(1.4, 1.0) == "! 1.40"


def test_the_page_has_the_predictions_of_more_than_one_precision() -> None:
    others = [p for p in Cpu.native().precisions if p == "bf16"]
    section = kernels.roofline([TINY], 0.0, worst=2, predicted=others)
    _, predictions, own = section.tables
    assert [row[:2] for row in predictions.rows] == [("tiny", p) for p in ("float32", *others)]
    assert len(own.rows) == 2


def test_winograd_loses_what_is_not_its_own_multiply_adds() -> None:
    # 4 GF directly, a quarter of them in Winograd's domain: 5e7 vectors of 10 multiply-adds.
    found = call("winograd", 20.0, gflop=4.0, points=5e7, steps=9e9)
    table = kernels.kernel_table(TINY, [found, call("direct", 12.0, products=5e7)], LIMITS)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["kernel"] for row in rows] == ["winograd", "direct"]
    assert [row["lost ms"] for row in rows] == ["10.000", "2.000"]
    assert [row["of peak"] for row in rows] == ["50 %", "83 %"]
    assert rows[0]["GF/s of the direct algorithm"] == "200.0"
    assert "38% of them lost" in table.title


def test_multiply_adds_are_held_against_the_limit_of_their_operands() -> None:
    limits = replace(LIMITS, bf16_gflops=400.0, tile_gflops=1638.4)
    for kind, ms in (("products", 2e-4), ("points", 2e-4), ("pairs", 2e-4), ("dots", 1e-4)):
        assert limits.computing(Work(**{"gflop": 9.0, kind: 1000.0})) == pytest.approx(ms)
    assert limits.computing(Work(gflop=9.0, tiles=1000.0)) == pytest.approx(1e-2)
    assert limits.computing(Work(gflop=9.0, steps=1000.0)) == 90.0


def test_the_loop_of_tiles_multiplies_as_often_as_it_is_said() -> None:
    import tvm

    from myelin.kernels import object as kernel_object

    cpu = Cpu.native()
    if "amx_bf16" not in cpu.features:
        pytest.skip("this CPU has no tiles")
    function = kernel_object.library({"tiles": kernels.tile_loop(3)}, cpu)["tiles"]
    a = kernels.aligned(np.full((2, 4, 256), 0x3F003F00, np.int32))  # 0.5 twice
    y = kernels.aligned(np.ones((kernels.THREADS, 4, 256), np.float32))
    function(tvm.runtime.from_dlpack(a), tvm.runtime.from_dlpack(y))
    assert (y == kernels.RUN * 32 * 0.25).all()


def test_the_bf16_loop_adds_two_products_a_lane() -> None:
    import tvm

    from myelin.kernels import object as kernel_object

    cpu = Cpu.native()
    if "avx512_bf16" not in cpu.features:
        pytest.skip("this CPU has no bf16 dot product")
    function = kernel_object.library({"dot": kernels.dot_loop(cpu, 4)}, cpu)["dot"]
    x = np.zeros((kernels.CHAINS + 2, cpu.lanes), np.int32)
    x[-2:] = 0x3F003F00  # 0.5 twice
    x, y = (
        kernels.aligned(x),
        kernels.aligned(np.ones((kernels.THREADS, kernels.CHAINS, cpu.lanes), np.float32)),
    )
    function(tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(y))
    assert (y == 4 * 2 * 0.25).all()


def test_layers_beyond_the_twelve_dearest_are_one_row() -> None:
    layers = {str(i): (1.0, 1.0 + i) for i in range(15)}
    found = kernels.dearest(layers)
    assert [name for name, _ in found[:2]] == ["14", "13"]
    assert found[-1] == ("3 others", (3.0, 6.0))


@pytest.mark.parametrize("name", WIDENED)
def test_width_one_is_the_model_of_the_tables(name) -> None:
    case = case_named(name)
    shapes = load(case.layers(nn), case.shape).shapes
    assert load(WIDENED[name](nn, width=1), case.shape).shapes == shapes
    wide = load(WIDENED[name](nn, width=2), case.shape).shapes
    assert wide["0.weight"][0] == 2 * shapes["0.weight"][0]


def test_a_scaling_table_counts_time_by_example() -> None:
    point = scaling.Point(x=0.5, physical=8, weights=1000, ms=4.0, per_second=2000.0, mib=3.0)
    table = scaling.table("width", [point])
    assert table.rows == [("0.5", "8", "1,000", "4.00", "2,000", "500.0", "3.0")]


def test_pictures_are_readable_text_on_their_own_ground(tmp_path) -> None:
    drawn = [
        pictures.throughput(bench.bars(ROWS), tmp_path),
        pictures.layers({"m": {"0": (1.0, 2.0), "": (0.1, 0.1)}}, tmp_path),
        pictures.scaling({"a": ([16, 32], [1.0, 2.0]), "b": ([0.5, 1], [1.0, 2.0])}, tmp_path),
        pictures.losses({"m": {"Myelin": [2.0, 1.0], "PyTorch": [2.0, 1.1]}}, tmp_path),
    ]
    texts = [path.read_text() for path in drawn]
    for text in texts:
        assert "<text" in text
        assert "fill: #ffffff" in text
    assert "2.50× · 5,000/s" in texts[0]
    assert "loss, factors" in texts[1]
    assert pictures.throughput(bench.bars(ROWS), tmp_path).read_text() == texts[0]


def test_the_limit_of_spinning_is_one_constant_of_the_runtime() -> None:
    code = (ROOT / "enclave" / "gate" / "src" / "threads.rs").read_text()
    (limit,) = threads.PATIENCE.findall(code)
    assert int(limit) in threads.LIMITS
