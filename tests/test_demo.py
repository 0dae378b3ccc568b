"""What the README promises of the demo: accuracy at its epsilon, in every run."""

from __future__ import annotations

import contextlib
import secrets
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from myelin import demo, evidence, grant, receipt, seal
from myelin.evidence.simulator import World
from myelin.grant import Ledger
from myelin.policy import Policy
from myelin.service import Service

SILENT = demo.Teller(
    say=lambda line: None,
    rows=lambda rows: None,
    track=lambda steps: contextlib.nullcontext(lambda done: None),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return demo._make_image(tmp_path_factory.mktemp("demo"), SILENT)


def test_ten_runs_keep_their_accuracy(built: Any, tmp_path: Path) -> None:
    cast = demo.Cast.assemble()
    job = demo._write_job(built, cast, SILENT)
    world = World.create(tmp_path / "world", now=int(time.time()))
    policy = Policy.dangerous_simulation(world.root)
    scores = []
    for run in range(10):
        folder = tmp_path / str(run)
        folder.mkdir()
        with Service(
            job=job, image=built.image_path, weights=built.weights_path, attester=world
        ) as service:
            for party in cast.everyone.values():
                service.approve(job.approve(party))
            demo._grant_all(service, job, cast, policy, folder=folder, tell=SILENT)
            service.train()
            finished = service.finish()
            endorsements = service.endorsements(now=int(time.time()))
        verified = receipt.verify(finished, policy.for_job(job), endorsements, int(time.time()))
        assert verified.privacy.epsilon <= 2
        assert verified.privacy.delta == 1e-5
        assert verified.score is not None
        scores.append(verified.score.accuracy)
    assert min(scores) >= 0.92
    assert sum(scores) / len(scores) >= 0.95


def test_the_demo_tells_first_and_last_that_the_tee_is_simulated(tmp_path: Path) -> None:
    said: list[str] = []
    teller = demo.Teller(
        say=said.append,
        rows=lambda rows: said.extend("  ".join(row) for row in rows),
        track=SILENT.track,
    )
    facts = demo.run(tmp_path / "demo", teller)
    assert "simulated" in said[0]
    assert "simulated" in said[-1]
    assert set(facts) == {
        *("test_accuracy", "baseline_accuracy", "epsilon", "delta", "neighboring_relation"),
        *("steps", "tee", "measurement", "image", "image_bytes", "seconds", "receipt"),
    }
    assert set(facts["seconds"]) == {"build", "launch", "train"}
    assert "simulated" in facts["tee"]
    assert facts["baseline_accuracy"] > 0.95


def test_an_owner_whose_budget_is_spent_grants_no_more(built: Any, tmp_path: Path) -> None:
    cast = demo.Cast.assemble()
    job = demo._write_job(built, cast, SILENT)
    world = World.create(tmp_path / "world", now=int(time.time()))
    policy = Policy.dangerous_simulation(world.root).for_job(job)
    owner = cast.everyone[job.parties[0].name]
    records = cast.records[owner.name]
    key = seal.seal_records(records.features, records.labels, BytesIO(), capacity=demo.CAPACITY)
    ledger = Ledger.create(tmp_path / "ledger", commitment=key.commitment, epsilon=2.0, delta=1e-5)
    for expected in (None, grant.BudgetExceeded):
        with Service(
            job=job, image=built.image_path, weights=built.weights_path, attester=world
        ) as service:
            for party in cast.everyone.values():
                service.approve(job.approve(party))
            nonce = secrets.token_bytes(32)
            now = int(time.time())
            appraised = evidence.appraise(
                service.evidence(nonce), service.endorsements(now=now), policy, nonce, now
            )
            if expected is None:
                grant.grant(owner, job, appraised, key, ledger=ledger)
            else:
                with pytest.raises(expected):
                    grant.grant(owner, job, appraised, key, ledger=ledger)
