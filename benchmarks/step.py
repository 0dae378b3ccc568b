"""Images and their instances, as benchmarks need them: a model of the tables, built with programs
left out and run on records drawn at random. No image has a clock inside, so what a part of a step
takes is the difference of two images.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import myelin
from benchmarks.models import Case
from myelin import nn, recipe, seal
from myelin.cell import Cell
from myelin.cpu import Cpu, Precision
from myelin.enclave import Enclave
from myelin.evidence import Evidence
from myelin.features import Features
from myelin.grant import grant

REPEATS = 5
MOST_STEPS = 500_000
"""Of a run: the privacy of more takes long to account for."""
MOST_AT_ONCE = 2_000
"""Of one measurement: short steps would else use up those of the run."""
NONCE = bytes(32)


def build(
    case: Case,
    records: int,
    folder: Path,
    *left_out: str,
    precision: Precision = "float32",
    threads: int = 2,
    private: bool = True,
    features: Features = recipe.FLOAT32,
) -> recipe.Build:
    """An image whose programs of these names are empty; it holds the kernels of the others."""

    def compiled(*args: Any, **options: Any) -> Any:
        program = recipe_compile(*args, **options, private=private)
        program = dataclasses.replace(program, **dict.fromkeys(left_out, ()))
        calls = (*program.gradient, *program.predict, *program.update)
        used = {call.kernel for call in calls}
        kernels = {name: kernel for name, kernel in program.kernels.items() if name in used}
        return dataclasses.replace(program, kernels=kernels)

    recipe_compile = recipe.compile_training
    with mock.patch.object(recipe, "compile_training", compiled):
        return myelin.build(
            case.layers(nn),
            np.zeros((1, *case.shape), np.float32),
            loss="cross-entropy",
            optimizer=myelin.SGD(lr=0.01, momentum=0.9),
            batch=case.batch,
            records=records,
            features=features,
            cpu=Cpu.native(precision).level,
            precision=precision,
            threads=threads,
            directory=folder,
        )


def smallest(case: Case) -> Case:
    """A model of the same records with next to no weights, so with next to no noise."""

    def layers(lib: Any) -> Any:
        if len(case.shape) == 1:
            return lib.Sequential(lib.Linear(*case.shape, 2))
        return lib.Sequential(lib.GlobalAvgPool2d(), lib.Flatten(), lib.Linear(case.shape[0], 2))

    name = f"smallest of {case.name}"
    return Case(name=name, shape=case.shape, batch=case.batch, layers=layers, classes=2)


class Run:
    """An instance of an image, launched as far as its first evidence; `load` gives it records.

    A step draws `drawn` of them on average, a physical batch unless given.
    """

    def __init__(
        self,
        built: recipe.Build,
        case: Case,
        records: int,
        backend: str,
        *,
        drawn: int | None = None,
    ) -> None:
        self.case, self.records = case, records
        self.built, self.owner = built, myelin.Party.generate("owner")
        privacy = myelin.Privacy.for_records(
            records,
            noise_multiplier=1000.0,
            max_grad_norm=1.0,
            sample_rate=(drawn or case.batch) / records,
            steps=MOST_STEPS,
            delta=1e-5,
        )
        self.job = myelin.Job.draft(
            image=built.image,
            weights=built.weights_digest,
            privacy=privacy,
            sends={"records": {self.owner.public: records}},
            receives={"weights": [self.owner.public]},
        )
        approval = self.job.approve(self.owner)
        description = built.image.description
        features, threads = description["cpu"]["features"], description["threads"]
        start = time.perf_counter()
        self.cell = Cell(built.image_path, backend=backend, threads=threads, features=features)
        self.enclave = Enclave(self.cell)
        self.enclave.job(self.job.to_bytes())
        self.enclave.approve(approval)
        self.keys = self.enclave.attest(NONCE)
        self.launch_ms = 1e3 * (time.perf_counter() - start)
        self.rate = privacy.to_fields()["sample_rate"]
        self.noise = privacy.to_fields()["noise_multiplier"]

    def load(self) -> Run:
        """Grants and loads records and weights, and warms up."""
        case, records, job, keys = self.case, self.records, self.job, self.keys
        now = int(time.time())
        world = myelin.World.create(Path(tempfile.mkdtemp(), "world"), now=now)
        policy = myelin.Policy.dangerous_simulation(world.root).for_job(job)
        claim = Evidence(
            job=job.digest,
            hpke=keys.hpke,
            sign=keys.sign,
            nonce=NONCE,
            quote=world.quote(job.image.measurement, keys.report_data),
        )
        fresh = myelin.appraise(claim.to_bytes(), world.endorsements(now=now), policy, NONCE, now)
        draws = np.random.default_rng(0)
        x: Any = draws.random((records, *case.shape), np.float32)
        if self.built.image.description["record"]["type"] == "uint8":
            x = (256 * x).astype(np.uint8)
        y = draws.integers(0, case.classes, records).astype(np.int32)
        sealed = BytesIO()
        key = seal.seal_records(x, y, sealed, capacity=records)
        ledger = myelin.Ledger.create(
            Path(tempfile.mkdtemp(), "l"), commitment=key.commitment, epsilon=1e9, delta=1e-5
        )
        self.enclave.grant(grant(self.owner, job, fresh, key, slot="records", ledger=ledger))
        sealed.seek(0)
        start = time.perf_counter()
        self.enclave.load(0, sealed)
        self.load_gb_s = sealed.tell() / 1e9 / (time.perf_counter() - start)
        self.enclave.weights(self.built.weights.tobytes())
        self.left = MOST_STEPS
        self.times(0.0)
        return self

    def times(self, seconds: float) -> list[float]:
        """Seconds of a step, from requests of about a tenth of a second."""
        size = max(1, min(200, int(0.1 / min(self._train(2) for _ in range(3)))))
        times = [self._train(size) for _ in range(REPEATS)]
        until = time.perf_counter() + seconds
        while time.perf_counter() < until and len(times) * size < MOST_AT_ONCE:
            times.append(self._train(size))
        return times

    def _train(self, steps: int) -> float:
        start = time.perf_counter()
        self.enclave.train(steps=steps, sample_rate=self.rate, noise_multiplier=self.noise)
        self.left -= steps
        return (time.perf_counter() - start) / steps
