"""`myelin demo`: three hospitals train one private model, told step by step.

Every party is played here, each with its own keys and its own checks, and nothing is shortened:
what a hospital does below is what it would do alone on its own machine.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from myelin import evidence, grant, hospitals, nn, receipt, recipe, seal
from myelin.cell import Backend
from myelin.cpu import Cpu
from myelin.evidence.simulator import World
from myelin.grant import Ledger
from myelin.hospitals import Records
from myelin.importers import load
from myelin.job import Job
from myelin.optimizer import SGD
from myelin.party import Party
from myelin.plan import Outside, compile_training
from myelin.policy import Policy
from myelin.privacy import NEIGHBORING_RELATION, Privacy
from myelin.service import Service
from myelin.weights import unpack

# Public capacities: a round number above what anyone holds, so that the true counts stay inside.
CAPACITY = 160
BATCH = 64
EPSILON, DELTA = 2.0, 1e-5
SIMULATED = "The TEE is simulated: this shows what Myelin does, and protects nothing."

MODEL = nn.Sequential(nn.Linear(30, 1))
EXAMPLE = np.zeros((1, 30), np.float32)
LOSS = "binary-cross-entropy"
OPTIMIZER = SGD(lr=1.0, momentum=0.9)


def privacy() -> Privacy:
    """Epsilon at most 2 at delta 1e-5, 200 steps with half of the records each."""
    return Privacy.for_epsilon(
        EPSILON,
        delta=DELTA,
        max_grad_norm=0.1,
        sample_rate=0.5,
        steps=200,
        records=len(hospitals.NAMES) * CAPACITY,
    )


@dataclass(frozen=True, kw_only=True)
class Teller:
    """How the demo speaks: `say` for a line, `rows` for a table, `track` for long work."""

    say: Callable[[str], None]
    rows: Callable[[list[tuple[str, ...]]], None]
    track: Callable[[int], Any]
    """A context manager for so many steps that yields a function told the steps done."""


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The parties, and what each of the senders holds."""

    hospitals: dict[str, Party]
    registry: Party
    university: Party
    records: dict[str, Records]

    @classmethod
    def assemble(cls) -> Cast:
        """Makes fresh keys for everyone and hands out the data."""
        data, test = hospitals.load()
        return cls(
            hospitals={name: Party.generate(name) for name in data},
            registry=Party.generate(hospitals.TEST_NAME),
            university=Party.generate("University"),
            records={**data, hospitals.TEST_NAME: test},
        )

    @property
    def everyone(self) -> dict[str, Party]:
        """All parties by name."""
        parties = (*self.hospitals.values(), self.registry, self.university)
        return {party.name: party for party in parties}


def run(folder: Path, tell: Teller, *, backend: Backend = "process") -> dict[str, Any]:
    """Runs the demo in `folder`; returns the facts that `--json` prints."""
    tell.say(SIMULATED)
    folder.mkdir(parents=True, exist_ok=True)
    cast = Cast.assemble()
    tell.say(
        "\n1. Three hospitals with records, a registry with test records, a university that wants"
    )
    tell.say(f"   a model. Each sender states a capacity of {CAPACITY}; true counts stay inside.")
    seconds = {}

    start = time.perf_counter()
    built = _make_image(folder / "build", tell)
    seconds["build"] = time.perf_counter() - start
    job = _write_job(built, cast, tell)

    world = World.create(folder / "simulator", now=int(time.time()))
    policy = Policy.dangerous_simulation(world.root)
    start = time.perf_counter()
    with Service(
        job=job,
        image=built.image_path,
        weights=built.weights_path,
        attester=world,
        backend=backend,
    ) as service:
        for party in cast.everyone.values():
            service.approve(job.approve(party))
        service.evidence(secrets.token_bytes(32))
        seconds["launch"] = time.perf_counter() - start
        _grant_all(service, job, cast, policy, folder=folder, tell=tell)
        tell.say(f"\n5. Training inside: {job.privacy.steps} private steps")
        start = time.perf_counter()
        with tell.track(job.privacy.steps) as progress:
            service.train(progress)
        seconds["train"] = time.perf_counter() - start
        finished = service.finish()
        (output,) = service.outputs()
        sealed = BytesIO(b"".join(output.sealed))
        endorsements = service.endorsements(now=int(time.time()))

    receipt_path, weights_path = folder / "receipt.cbor", folder / "weights.safetensors"
    receipt_path.write_bytes(finished)
    (folder / "endorsements.json").write_text(endorsements)
    (folder / "job.cbor").write_bytes(job.to_bytes())
    verified = receipt.verify(finished, policy.for_job(job), endorsements, int(time.time()))
    plaintext = seal.open_output(
        cast.university,
        output.envelope,
        sealed,
        job=job,
        slot="weights",
        digest=verified.output("weights", cast.university.name).digest,
    )
    trained = unpack(built.image.description["parameters"], np.frombuffer(plaintext, np.float32))
    safetensors.numpy.save_file(trained, weights_path)
    assert verified.score is not None  # the job asks for one
    accuracy, baseline = verified.score.accuracy, baseline_accuracy(built)
    _conclude(verified.privacy, accuracy, baseline, (receipt_path, weights_path), tell)
    tell.say(f"\n{SIMULATED}")
    return {
        "test_accuracy": accuracy,
        "baseline_accuracy": baseline,
        "epsilon": verified.privacy.epsilon,
        "delta": verified.privacy.delta,
        "neighboring_relation": NEIGHBORING_RELATION,
        "steps": verified.privacy.steps,
        "tee": f"simulated ({backend})",
        "measurement": built.image.measurement.hex(),
        "image": str(built.image_path),
        "image_bytes": len(built.image.content),
        "seconds": seconds,
        "receipt": str(receipt_path),
    }


def _make_image(folder: Path, tell: Teller) -> recipe.Build:
    tell.say("\n2. The model becomes an enclave image")
    built = recipe.build(
        MODEL,
        EXAMPLE,
        loss=LOSS,
        optimizer=OPTIMIZER,
        records=len(hospitals.NAMES) * CAPACITY,
        test=CAPACITY,
        batch=BATCH,
        directory=folder,
    )
    image = built.image
    tell.say(f"   image {len(image.content):,} bytes, measurement {image.measurement.hex()}")
    again = recipe.rebuild(built.model_path.read_bytes())
    recipe.compare(again, image, original=image)
    tell.say("   the registry rebuilt it from the model file: the same measurement")
    return built


def _write_job(built: recipe.Build, cast: Cast, tell: Teller) -> Job:
    image = built.image
    job = Job.draft(
        image=image,
        weights=built.weights_digest,
        privacy=privacy(),
        sends={
            "records": {party.public: CAPACITY for party in cast.hospitals.values()},
            "test": {cast.registry.public: CAPACITY},
        },
        receives={"weights": [cast.university.public], "score": [None]},
    )
    tell.say(f"\n3. The job {job.digest.hex()[:16]}…: who can see what")
    tell.rows(
        [("what", "from", "seen by"), *((r.what, r.source, r.visible_to) for r in job.describe())]
    )
    return job


def _grant_all(
    service: Service, job: Job, cast: Cast, policy: Policy, *, folder: Path, tell: Teller
) -> None:
    tell.say("\n4. Each sender appraises the running enclave, then releases its key to it alone")
    endorsements = service.endorsements(now=int(time.time()))
    for index, send in enumerate(job.sends):
        party = cast.everyone[job.parties[send.party].name]
        records, file = cast.records[party.name], BytesIO()
        key = seal.seal_records(records.features, records.labels, file, capacity=send.capacity)
        nonce = secrets.token_bytes(32)
        appraised = evidence.appraise(
            service.evidence(nonce), endorsements, policy.for_job(job), nonce, int(time.time())
        )
        ledger = None
        if send.slot == "records":
            path = folder / f"{party.name}.ledger"
            ledger = Ledger.create(path, commitment=key.commitment, epsilon=EPSILON, delta=DELTA)
        granted = grant.grant(party, job, appraised, key, slot=send.slot, ledger=ledger)
        file.seek(0)
        service.accept(index, granted, file)
        budget = "" if ledger is None else f"; epsilon spent: {ledger.spent:.3f} of {EPSILON:g}"
        tell.say(
            f"   {party.name}: genuine quote of the TEST root, measurement and job as approved, "
            f"TCB {appraised.platform.tcb_status}{budget}"
        )


def _conclude(
    spent: Privacy, accuracy: float, baseline: float, paths: tuple[Path, Path], tell: Teller
) -> None:
    tell.say(
        f"   {spent.steps} steps: epsilon {spent.epsilon:.3f}, delta {spent.delta:g} "
        f"({NEIGHBORING_RELATION}), noise_multiplier {spent.noise_multiplier:.3f}, "
        f"Poisson sample_rate {spent.sample_rate:g}"
    )
    tell.say("\n6. The receipt verifies offline: evidence, approvals, inputs, privacy and results")
    tell.rows(
        [
            ("test accuracy, private", f"{accuracy:.1%} (scored inside, in the receipt)"),
            ("test accuracy, same model without privacy", f"{baseline:.1%}"),
            ("receipt", str(paths[0])),
            ("weights, opened by the university", str(paths[1])),
        ]
    )


def baseline_accuracy(built: recipe.Build) -> float:
    """Test accuracy of the same model, start, steps and optimiser without privacy, outside."""
    data, test = hospitals.load()
    features = np.concatenate([records.features for records in data.values()])
    labels = np.concatenate([records.labels for records in data.values()])
    cpu = Cpu.named("x86-64-v3")
    program = compile_training(
        load(MODEL, EXAMPLE),
        loss=LOSS,
        optimizer=OPTIMIZER,
        batch=len(features),
        cpu=cpu,
        private=False,
    )
    outside = Outside(program, cpu)
    weights = built.weights
    everyone = np.ones(len(features), np.float32)
    for step in range(1, privacy().steps + 1):
        total = outside.gradient(features, labels, everyone, weights, 1.0)
        weights = outside.update(total / len(features), step)
    padded = np.zeros((len(features), 30), np.float32)
    padded[: len(test.features)] = test.features
    outputs = outside.predict(padded, weights)[: len(test.features)]
    return float(np.mean((outputs > 0) == (test.labels > 0.5)))
