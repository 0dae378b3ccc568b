"""Where the time of a private step goes, and how long an image takes to its first evidence.

`python -m benchmarks.step MODEL [RECORDS] [BACKEND]` builds a model of the tables (or `vgg9`)
several times, each time with programs left out, and takes the differences: no image has a clock
inside. Prints one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import myelin
from benchmarks.models import CASES, Case
from myelin import nn, recipe, seal
from myelin.cell import Cell
from myelin.cpu import Cpu
from myelin.enclave import Enclave
from myelin.evidence import Evidence
from myelin.grant import grant

STEPS, REPEATS = 20, 5
ALL = 1 << 32


def vgg9() -> nn.Layer:
    """2.3 million parameters on 32 by 32 pixels of three colours."""
    layers: list[nn.Layer] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 256)):
        for first in (inputs, outputs):
            layers += [nn.Conv2d(first, outputs, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    dense = [nn.Linear(4096, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


VGG9 = Case(
    name="vgg9 2.3M", shape=(3, 32, 32), batch=64, classes=10, torch=lambda: None, layers=vgg9
)  # type: ignore[arg-type, return-value]


def build(case: Case, records: int, folder: Path, *left_out: str) -> recipe.Build:
    """An image whose programs of these names are empty."""

    def compiled(*args: Any, **options: Any) -> Any:
        program = recipe_compile(*args, **options)
        return dataclasses.replace(program, **dict.fromkeys(left_out, ()))

    recipe_compile = recipe.compile_training
    with mock.patch.object(recipe, "compile_training", compiled):
        return myelin.build(
            case.layers(),
            np.zeros((1, *case.shape), np.float32),
            loss="cross-entropy",
            optimizer=myelin.SGD(lr=0.01, momentum=0.9),
            batch=case.batch,
            records=records,
            cpu=Cpu.native().level,
            directory=folder,
        )


class Run:
    """A loaded instance of an image."""

    def __init__(self, built: recipe.Build, case: Case, records: int, backend: str) -> None:
        self.case, self.records = case, records
        owner, now = myelin.Party.generate("owner"), int(time.time())
        privacy = myelin.Privacy.for_records(
            records,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            sample_rate=case.batch / records,
            steps=1_000,
            delta=1e-5,
        )
        job = myelin.Job.draft(
            image=built.image,
            weights=built.weights_digest,
            privacy=privacy,
            sends={"records": {owner.public: records}},
            receives={"weights": [owner.public]},
        )
        approval = job.approve(owner)
        world = myelin.World.create(Path(tempfile.mkdtemp(), "world"), now=now)
        policy = myelin.Policy.dangerous_simulation(world.root).for_job(job)
        features = built.image.description["cpu"]["features"]
        start = time.perf_counter()
        self.cell = Cell(built.image_path, backend=backend, threads=2, features=features)
        self.enclave = Enclave(self.cell)
        self.enclave.job(job.to_bytes())
        self.enclave.approve(approval)
        nonce = bytes(32)
        keys = self.enclave.attest(nonce)
        self.launch_ms = 1e3 * (time.perf_counter() - start)
        self.rate = privacy.to_fields()["sample_rate"]
        self.noise = privacy.to_fields()["noise_multiplier"]
        claim = Evidence(
            job=job.digest,
            hpke=keys.hpke,
            sign=keys.sign,
            nonce=nonce,
            quote=world.quote(job.image.measurement, keys.report_data),
        )
        fresh = myelin.appraise(claim.to_bytes(), world.endorsements(now=now), policy, nonce, now)
        draws = np.random.default_rng(0)
        x = draws.random((records, *case.shape), np.float32)
        y = draws.integers(0, case.classes, records).astype(np.int32)
        sealed = BytesIO()
        key = seal.seal_records(x, y, sealed, capacity=records)
        ledger = myelin.Ledger.create(Path(tempfile.mkdtemp(), "l"), epsilon=1e9, delta=1e-5)
        self.enclave.grant(grant(owner, job, fresh, key, slot="records", ledger=ledger))
        sealed.seek(0)
        start = time.perf_counter()
        self.enclave.load(0, sealed)
        self.load_gb_s = sealed.tell() / 1e9 / (time.perf_counter() - start)
        self.enclave.weights(built.weights.tobytes())
        self.step(self.rate)

    def step(self, rate: int) -> float:
        """Milliseconds of a step, median."""
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            self.enclave.train(steps=STEPS, sample_rate=rate, noise_multiplier=self.noise)
            times.append((time.perf_counter() - start) / STEPS)
        return 1e3 * statistics.median(times)


def main() -> None:
    """Build, measure, print."""
    name = sys.argv[1]
    records = int(sys.argv[2]) if len(sys.argv) > 2 else 60_000
    backend = sys.argv[3] if len(sys.argv) > 3 else "process"
    (case,) = [case for case in (*CASES, VGG9) if case.name.startswith(name)]
    folder = Path(tempfile.mkdtemp())
    left_out: dict[str, tuple[str, ...]] = {
        "whole": (),
        "no_gradient": ("gradient",),
        "no_kernels": ("gradient", "update"),
    }
    row: dict[str, Any] = {"model": case.name, "records": records, "backend": backend}
    found: dict[str, float] = {}
    for variant, names in left_out.items():
        run = Run(build(case, records, folder / variant, *names), case, records, backend)
        found[variant] = run.step(run.rate)
        if variant == "whole":
            row |= {"launch_ms": run.launch_ms, "load_gb_s": run.load_gb_s}
        if variant == "no_kernels":
            found["no_records"] = run.step(0)
        run.cell.close()
    row |= {
        "step_ms": found["whole"],
        "gradient_ms": found["whole"] - found["no_gradient"],
        "update_ms": found["no_gradient"] - found["no_kernels"],
        "gather_ms": found["no_kernels"] - found["no_records"],
        "sample_and_noise_ms": found["no_records"],
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
