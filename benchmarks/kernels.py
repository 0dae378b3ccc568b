"""`make bench-kernels`: every kernel against what this machine can do, the worst one first.

`python -m benchmarks.kernels [--models NAME,…|all] [--precision P] [--seconds S]`. The machine's
limits are found in the same run, by kernels compiled in the same way: a loop of fused multiply-adds
on registers only, the same of bf16 dot products where the CPU has them, products of tiles where it
has those (with what leaves a tile stored), copies in cache and in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TVM_NUM_THREADS", "2")

import numpy as np
import tvm
from tvm.script.ir_builder import tirx as T

from benchmarks import pictures, report
from benchmarks.burst import machine
from benchmarks.models import Case, cases_named
from benchmarks.report import THREADS, Section, Table
from myelin import nn, plan
from myelin.cost import Work
from myelin.cpu import Cpu, Precision
from myelin.importers import load as load_model
from myelin.kernels import amx, bf16
from myelin.kernels import object as kernel_object
from myelin.kernels.bf16 import LANES, TILE
from myelin.kernels.tir import Kernel, load, local, serial, store
from myelin.lowering import Kernels
from myelin.model import Model
from myelin.optimizer import SGD
from myelin.outside import Outside
from myelin.program import Program

FAR = 0.3
"""Of the time measured: a prediction that is further off is marked."""
CHAINS = 12
"""Accumulators at once: more than the latency of a multiply-add times its units."""
RUN = 32
"""Products of tiles in a row for each of four sums."""
TILE_OPERATIONS = 2 * TILE * 2 * LANES
"""Of one product of tiles: a multiply-add for each number of the result and each pair's part."""
IN_CACHE, IN_MEMORY = 1 << 20, 256 << 20
"""Bytes of the arrays that are copied."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """10⁹ operations a second, 10⁹ bytes a second read and written, of this machine now."""

    lanes: int
    gflops: float
    bf16_gflops: float | None
    tile_gflops: float | None
    cache_gbytes: float
    exchange_gbytes: float
    memory_gbytes: float
    cache: int

    def gbytes(self, size: int) -> float:
        """The copy that `size` bytes compare with."""
        return self.cache_gbytes if size <= self.cache else self.memory_gbytes

    def computing(self, work: Work) -> float:
        """Milliseconds of the multiply-adds that the algorithm really makes, each by the rate of
        its kind; those of all operations where it makes none.
        """
        vectors = work.products + work.points + work.pairs
        ms = 2e-6 * self.lanes * vectors / self.gflops
        if work.dots and self.bf16_gflops:
            ms += 4e-6 * self.lanes * work.dots / self.bf16_gflops
        if work.tiles and self.tile_gflops:
            ms += TILE_OPERATIONS * 1e-6 * work.tiles / self.tile_gflops
        return ms or 1e3 * work.gflop / self.gflops

    def ms(self, call: Timed) -> float:
        """The roofline: what computing or moving takes at least."""
        return max(self.computing(call.work), call.bytes / self.gbytes(call.bytes) / 1e6)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A call of a step's kernel: what the planner says of it, and its median milliseconds."""

    layer: str
    kernel: str
    work: Work
    predicted_ms: float
    bytes: int
    ms: float


def main() -> None:
    """Measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="all")
    parser.add_argument("--precision", default="float32", choices=Cpu.native().precisions)
    parser.add_argument("--seconds", type=float, default=2.0)
    asked = parser.parse_args()
    with report.alone():
        roofline(cases_named(asked.models), asked.seconds, asked.precision).print()


def timed(
    case: Case, seconds: float, *, private: bool = True, precision: Precision = "float32"
) -> list[Timed]:
    """Each call of a model's step, timed where it stands between the others."""
    cpu = Cpu.native(precision).of(precision)
    model = load_model(case.layers(nn), case.shape)
    program, work = planned(case, model, cpu, precision, private=private)
    outside = Outside(program, cpu)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(case.batch, *case.shape)).astype(np.float32)
    y = generator.integers(0, case.classes, case.batch).astype(np.int32)
    outside.gradient(x, y, np.ones(case.batch, np.float32), model.parameters, 1.0)

    def several() -> list[list[float]]:
        until = time.perf_counter() + seconds
        found = [outside.time_step() for _ in range(5)]
        while time.perf_counter() < until:
            found.append(outside.time_step())
        return found

    rounds = machine.undisturbed(several, seconds)
    return [
        Timed(
            layer=decision.layer,
            kernel=decision.kernel,
            work=work[decision.kernel],
            predicted_ms=decision.ms,
            bytes=decision.bytes,
            ms=1e3 * statistics.median(times),
        )
        for decision, times in zip(program.decisions, zip(*rounds, strict=True), strict=True)
    ]


def planned(
    case: Case, model: Model, cpu: Cpu, precision: Precision, *, private: bool
) -> tuple[Program, dict[str, Work]]:
    """A step's plan, and the planner's own account of each kernel's work, which no plan keeps."""
    libraries: list[Kernels] = []

    def kept(**options: Any) -> Kernels:
        libraries.append(Kernels(**options))
        return libraries[-1]

    with mock.patch.object(plan, "Kernels", kept):
        program = plan.compile_training(
            model,
            loss="cross-entropy",
            optimizer=SGD(lr=0.01),
            batch=case.batch,
            cpu=cpu,
            precision=precision,
            private=private,
        )
    (library,) = libraries
    return program, {name: cost.work for name, cost in library.costs.items()}


def roofline(
    cases: Sequence[Case],
    seconds: float,
    precision: Precision = "float32",
    worst: int | None = None,
    predicted: Sequence[Precision] = (),
) -> Section:
    """Kernels of each model by the time that they lose against the machine's limits.

    All of them, or the `worst` of each model. Of the other precisions `predicted` only the
    planner's predictions are compared.
    """
    limits = measure_limits(Cpu.native(), seconds)
    calls = {}
    for case in cases:
        for each in (precision, *predicted):
            report.say(f"{case.name}: kernels, {each}")
            calls[case, each] = timed(case, seconds, precision=each)
    report.say("")
    return Section(
        title="Kernels against the machine",
        text=(
            f"Calls of a private step outside the cell, without gather and noise, {precision}, "
            "each timed where it stands in the step. Kernels are "
            "sorted by the time they lose: their own less that of the limit which binds them, "
            "arithmetic or copying. *Of peak* and *lost* go by the multiply-adds that a kernel's "
            "algorithm really makes, as the planner counts them (those of empty lanes with them), "
            "at this machine's rate for float32, bf16 or tiles; what else it does, such as "
            "Winograd's transforms, counts as lost. Kernels without multiply-adds go by their "
            "other operations. *GF/s of the direct algorithm* are what the same result takes "
            "directly, in the time measured: so fast do Winograd convolutions seem, which may "
            "pass the limit. Bytes are those of a call's arguments, so data from the cache may "
            "pass 100 % of a copy. *Written by the other core*: each copies what the other wrote "
            f"last. Predictions more than {FAR:.0%} off are marked with !."
        ),
        tables=[
            limit_table(limits),
            prediction_table(calls),
            *(kernel_table(case, calls[case, precision], limits, worst) for case in cases),
        ],
    )


def prediction_table(calls: Mapping[tuple[Case, Precision], Sequence[Timed]]) -> Table:
    """What the planner's cost model says of each step, and what it took."""
    rows = []
    for (case, precision), found in calls.items():
        ours, ms = (sum(getattr(c, n) for c in found) for n in ("predicted_ms", "ms"))
        rows.append((case.name, precision, f"{ours:.2f}", f"{ms:.2f}", quotient(ours, ms)))
    return Table(
        title="The planner's predictions",
        columns=("model", "precision", "predicted, ms", "measured, ms", "predicted ÷ measured"),
        rows=rows,
        words=2,
    )


def quotient(predicted: float, measured: float) -> str:
    """Predicted ÷ measured, with a mark where it is far from 1."""
    found = predicted / measured
    return f"! {found:.2f}" if abs(found - 1) > FAR else f"{found:.2f}"


def limit_table(limits: Limits) -> Table:
    """The measured limits."""
    rows = [("float32 multiply-add", f"{limits.gflops:.0f} GF/s")]
    if limits.bf16_gflops is not None:
        rows.append(("bf16 dot product", f"{limits.bf16_gflops:.0f} GF/s"))
    if limits.tile_gflops is not None:
        rows.append(("bf16 product of tiles", f"{limits.tile_gflops:.0f} GF/s"))
    rows.append((f"copy of {IN_CACHE >> 20} MiB", f"{limits.cache_gbytes:.0f} GB/s"))
    rows.append(
        (
            f"copy of {IN_CACHE >> 20} MiB, written by the other core",
            f"{limits.exchange_gbytes:.0f} GB/s",
        )
    )
    rows.append((f"copy of {IN_MEMORY >> 20} MiB", f"{limits.memory_gbytes:.0f} GB/s"))
    return Table(title="Limits of this machine, now", columns=("what", "limit"), rows=rows)


def kernel_table(
    case: Case, calls: Sequence[Timed], limits: Limits, worst: int | None = None
) -> Table:
    """A row for each kernel of a model, the one that loses most time first."""
    same: dict[str, list[Timed]] = defaultdict(list)
    for call in calls:
        same[call.kernel].append(call)
    lost = {name: sum(call.ms - limits.ms(call) for call in group) for name, group in same.items()}
    rows = []
    for name in sorted(same, key=lambda name: -lost[name])[:worst]:
        group = same[name]
        ms = sum(call.ms for call in group)
        gflops = 1e3 * sum(call.work.gflop for call in group) / ms
        computing = sum(limits.computing(call.work) for call in group)
        gbytes = sum(call.bytes for call in group) / ms / 1e6
        copy = limits.gbytes(group[0].bytes)
        layers = list(dict.fromkeys(call.layer or "–" for call in group))
        rows.append(
            (
                name,
                layers[0] + (f" and {len(layers) - 1} more" if len(layers) > 1 else ""),
                str(len(group)),
                f"{ms:.3f}",
                f"{lost[name]:.3f}",
                f"{100 * computing / ms:.0f} %",
                f"{gflops:.1f}",
                f"{gbytes:.1f}",
                f"{100 * gbytes / copy:.0f} %",
                quotient(sum(call.predicted_ms for call in group), ms),
            )
        )
    total = sum(call.ms for call in calls)
    return Table(
        title=f"{case.name} (batch {case.batch}): {total:.2f} ms, "
        f"{sum(lost.values()) / total:.0%} of them lost",
        columns=(
            *("kernel", "layer", "calls", "ms", "lost ms"),
            *("of peak", "GF/s of the direct algorithm", "GB/s", "of copy"),
            "predicted ÷ measured",
        ),
        rows=rows,
        words=2,
    )


def cost_by_layer(cases: Sequence[Case], seconds: float, folder: Path) -> Section:
    """What privacy adds to each layer, measured call by call, with a picture."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for case in cases:
        report.say(f"{case.name}: cost of privacy by layer")
        sums: dict[str, list[float]] = {}
        for private in (False, True):
            for call in timed(case, seconds, private=private):
                sums.setdefault(call.layer, [0.0, 0.0])[private] += call.ms
        found[case.name] = {layer: (plain, own) for layer, (plain, own) in sums.items()}
    report.say("")
    picture = pictures.layers(found, folder)
    return Section(
        title="Cost of privacy by layer",
        text=(
            "Milliseconds of each layer's kernels in a gradient without and with norms, clipping "
            "and the weighted sums; – is what belongs to no layer: the loss and the factors."
        ),
        tables=[
            Table(
                title=f"{model}, the dearest first",
                columns=("layer", "not private, ms", "private, ms", "difference, ms"),
                rows=[
                    (layer or "–", f"{plain:.3f}", f"{own:.3f}", f"{own - plain:+.3f}")
                    for layer, (plain, own) in dearest(layers)
                ],
            )
            for model, layers in found.items()
        ],
        pictures=[("Cost of privacy by layer", picture)],
    )


def dearest(layers: dict[str, tuple[float, float]]) -> list[tuple[str, tuple[float, float]]]:
    """Layers by what privacy adds; all but the first twelve as one."""
    by_cost = sorted(layers.items(), key=lambda item: item[1][0] - item[1][1])
    first, rest = by_cost[:12], by_cost[12:]
    if rest:
        plain, private = (sum(values[i] for _, values in rest) for i in (0, 1))
        first.append((f"{len(rest)} others", (plain, private)))
    return first


# Limits.


def measure_limits(cpu: Cpu, seconds: float) -> Limits:
    """What this machine can do at most, on both threads."""
    report.say("limits of this machine")
    repeats = 200_000

    def gflops(kernel: Any, dtype: str) -> float:
        operations = 2 * CHAINS * cpu.lanes * THREADS * repeats
        x = np.full((CHAINS + 2, cpu.lanes), 0.5, np.float32)
        if dtype == "int32":
            x = np.full(x.shape, 0x3F003F00, np.int32)  # two of 0.5 in bf16
        y = np.zeros((THREADS, CHAINS, cpu.lanes), np.float32)
        return operations / 1e9 / fastest(kernel, (x, y), cpu, seconds)

    bf16 = tiles = None
    if amx.FEATURE in cpu.features:
        blocks = repeats // 100
        a = np.full((2, 4, TILE), 0x3F003F00, np.int32)
        y = np.zeros((THREADS, 4, TILE), np.float32)
        operations = 4 * TILE_OPERATIONS * RUN * THREADS * blocks
        tiles = operations / 1e9 / fastest(tile_loop(blocks), (a, y), cpu, seconds)
    if "avx512_bf16" in cpu.features:
        bf16 = 2 * gflops(dot_loop(cpu, repeats), "int32")
    return Limits(
        lanes=cpu.lanes,
        gflops=gflops(fma_loop(cpu, repeats), "float32"),
        bf16_gflops=bf16,
        tile_gflops=tiles,
        cache_gbytes=copy_rate(cpu, IN_CACHE, seconds),
        exchange_gbytes=copy_rate(cpu, IN_CACHE, seconds, exchanged=True),
        memory_gbytes=copy_rate(cpu, IN_MEMORY, seconds),
        cache=24 << 20,
    )


def copy_rate(cpu: Cpu, size: int, seconds: float, *, exchanged: bool = False) -> float:
    """10⁹ bytes a second, read and written, of copies of `size` bytes; `exchanged`: each thread's
    are what the other wrote by the copy before.
    """
    x = np.ones((THREADS, size // 4 // THREADS), np.float32)
    loop = exchange_loop if exchanged else copy_loop
    return 2 * size / 1e9 / fastest(loop(cpu, x.shape[1]), (x, np.zeros_like(x)), cpu, seconds)


def fastest(kernel: Any, arrays: Sequence[Any], cpu: Cpu, seconds: float) -> float:
    """Seconds of the fastest call: a limit is what was reached, not what is usual. Calls copy there
    and back where arrays are alike.
    """
    function = kernel_object.library({"kernel": kernel}, cpu)["kernel"]
    tensors = [tvm.runtime.from_dlpack(array) for array in map(aligned, arrays)]
    alike = len({(array.shape, array.dtype) for array in arrays}) == 1
    times = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        start = time.perf_counter()
        function(*tensors)
        times.append(time.perf_counter() - start)
        if alike:
            tensors.reverse()
    return min(times)


def aligned(array: Any) -> Any:
    """A copy on a cache line's border, as TVM wants it."""
    memory = np.zeros(array.nbytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    copy = memory[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def fma_loop(cpu: Cpu, repeats: int) -> Any:
    """Multiply-adds on registers only; the last two rows of x are the factor and the term."""
    return register_loop(cpu, repeats, "float32", lambda total, a, b: total * a + b)


def dot_loop(cpu: Cpu, repeats: int) -> Any:
    """The same with dot products of two bf16 a lane, which x holds as int32."""
    return register_loop(cpu, repeats, "int32", bf16.dot, bf16.words)


def tile_loop(blocks: int) -> Any:
    """a[2, 4, TILE] of pairs → y[THREADS, 4, TILE]: products of two by two tiles, again and again;
    even and odd times of others, so that none is known before.
    """
    with Kernel(a=((2, 4, TILE), "int32"), y=(THREADS, 4, TILE)) as kernel, bf16.tile_words():
        a, y = kernel.buffers
        with T.parallel(THREADS) as thread, serial(blocks) as time_:

            def read(tile: int) -> Any:
                return load(a, time_ % 2, tile, 0, lanes=TILE)

            found = amx.block_sums(
                (2, 2),
                RUN,
                RUN,
                1,
                lambda r, _first, _step, _term: read(r),
                lambda c, _first, _step, _term: read(2 + c),
            )
            for (r, c), value in found:
                store(y, value, thread, 2 * r + c, 0)
    return kernel.function


def register_loop(
    cpu: Cpu,
    repeats: int,
    dtype: str,
    operation: Callable[[Any, Any, Any], Any],
    scope: Callable[[], Any] = contextlib.nullcontext,
) -> Any:
    """x[CHAINS + 2, lanes] → y[THREADS, CHAINS, lanes] by `repeats` operations on each chain."""
    lanes = cpu.lanes
    shapes = {"x": ((CHAINS + 2, lanes), dtype), "y": (THREADS, CHAINS, lanes)}
    with Kernel(**shapes) as kernel, scope():
        x, y = kernel.buffers
        with T.parallel(THREADS) as thread:
            sums = [local(lanes) for _ in range(CHAINS)]
            a, b = (T.bind(load(x, CHAINS + i, 0, lanes=lanes)) for i in (0, 1))
            for i, chain in enumerate(sums):
                start = load(x, i, 0, lanes=lanes)
                store(chain, start.astype(f"float32x{lanes}"), 0)
            with serial(repeats):
                for chain in sums:
                    store(chain, operation(load(chain, 0, lanes=lanes), a, b), 0)
            for i, chain in enumerate(sums):
                store(y, load(chain, 0, lanes=lanes), thread, i, 0)
    return kernel.function


def copy_loop(cpu: Cpu, extent: int) -> Any:
    """x[THREADS, extent] → y."""
    with Kernel(x=(THREADS, extent), y=(THREADS, extent)) as kernel:
        x, y = kernel.buffers
        with T.parallel(THREADS) as thread, serial(extent // cpu.lanes) as i:
            store(y, load(x, thread, i * cpu.lanes, lanes=cpu.lanes), thread, i * cpu.lanes)
    return kernel.function


def exchange_loop(cpu: Cpu, extent: int) -> Any:
    """x[THREADS, extent] → y, each thread what is in the place of the other."""
    with Kernel(x=(THREADS, extent), y=(THREADS, extent)) as kernel:
        x, y = kernel.buffers
        with T.parallel(THREADS) as thread, serial(extent // cpu.lanes) as i:
            value = load(x, THREADS - 1 - thread, i * cpu.lanes, lanes=cpu.lanes)
            store(y, value, thread, i * cpu.lanes)
    return kernel.function


if __name__ == "__main__":
    main()
