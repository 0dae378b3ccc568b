"""A job over an exchange folder: what the host says when somebody is missing, what it clears."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parties import NOW, RESEARCHER, A, party, policy, world

from myelin import nn, receipt, recipe, seal
from myelin.errors import ExchangeError
from myelin.evidence import appraise
from myelin.exchange import Exchange, place, wait
from myelin.grant import Ledger, grant
from myelin.job import Job
from myelin.optimizer import SGD
from myelin.privacy import Privacy
from myelin.service import serve

OLD = b"evidence of an earlier instance"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> recipe.Build:
    return recipe.build(
        nn.Sequential(nn.Linear(3, 1)),
        np.zeros((1, 3), np.float32),
        loss="binary-cross-entropy",
        optimizer=SGD(lr=0.1),
        records=20,
        batch=8,
        directory=tmp_path_factory.mktemp("built"),
    )


@pytest.fixture
def job(built: recipe.Build) -> Job:
    return Job.draft(
        image=built.image,
        weights=built.weights_digest,
        privacy=Privacy.for_records(
            20, noise_multiplier=2.0, max_grad_norm=1.0, sample_rate=0.5, steps=3, delta=1e-5
        ),
        sends={"records": {A.public: 20}},
        receives={"weights": [RESEARCHER.public]},
    )


@pytest.fixture
def exchange(built: recipe.Build, job: Job, tmp_path: Path) -> Exchange:
    made = Exchange(folder=tmp_path / "exchange")
    for path in (made.image, made.model, made.weights):
        place(path, (built.directory / path.name).read_bytes())
    place(made.job, job.to_bytes())
    return made


def host(exchange: Exchange, **changes: Any) -> None:
    serve(exchange, attester=world(), now=lambda: NOW, **{"wait_seconds": 0.3} | changes)


def approve(exchange: Exchange, job: Job) -> None:
    for index, member in enumerate((A, RESEARCHER)):
        place(exchange.approval(index), job.approve(member))


def test_missing_approvals_are_named(exchange: Exchange, job: Job) -> None:
    place(exchange.approval(0), job.approve(A))
    with pytest.raises(ExchangeError, match=r"no approval within 0.3 s from: researcher; nothing"):
        host(exchange)


def test_junk_in_place_of_an_approval_is_named_and_waited_out(exchange: Exchange, job: Job) -> None:
    said: list[str] = []
    place(exchange.approval(0), b"junk")
    place(exchange.approval(1), job.approve(A))
    with pytest.raises(ExchangeError, match=r"no approval within 0.3 s from: a, researcher"):
        host(exchange, say=said.append)
    assert sum("is no approval by" in line for line in said) == 2


def test_the_host_says_when_threads_share_a_core(exchange: Exchange) -> None:
    allowed = os.sched_getaffinity(0)
    for cores, told in (({min(allowed)}, True), (allowed, len(allowed) < 2)):
        said: list[str] = []
        try:
            os.sched_setaffinity(0, cores)
            with pytest.raises(ExchangeError):
                host(exchange, say=said.append)
        finally:
            os.sched_setaffinity(0, allowed)
        assert any("not pinned to cores of their own: 2 threads" in line for line in said) == told


def test_a_sealed_file_that_is_still_coming_is_waited_for(exchange: Exchange, job: Job) -> None:
    approve(exchange, job)
    place(exchange.sealed("records", 0), b"the first bytes of it")
    place(exchange.grant("records", 0), b"never read before the file is whole")
    said: list[str] = []
    with pytest.raises(ExchangeError, match="no grant"):
        host(exchange, say=said.append)
    assert not any("no grant by" in line for line in said)


def test_missing_grants_are_named(exchange: Exchange, job: Job) -> None:
    approve(exchange, job)
    with pytest.raises(ExchangeError, match=r"no grant within 0.3 s from: a \(records\); nothing"):
        host(exchange)


def test_grants_of_an_earlier_run_are_cleared_and_a_new_run_succeeds(
    exchange: Exchange, job: Job, tmp_path: Path
) -> None:
    approve(exchange, job)
    place(exchange.grant("records", 0), b"a grant to an instance that is gone")
    said: list[str] = []
    place(exchange.evidence(0), OLD)
    features = np.ones((5, 3), np.float32)
    sealed = exchange.sealed("records", 0)
    sealed.parent.mkdir()
    key = seal.seal_records(features, np.ones((5, 1), np.float32), sealed, capacity=20)
    running = threading.Thread(
        target=host, args=(exchange,), kwargs={"wait_seconds": 20, "say": said.append}
    )
    running.start()
    try:
        nonce = bytes(range(32))
        place(exchange.nonce(0), nonce)
        until = time.monotonic() + 20
        while (evidence := wait(exchange.evidence(0), seconds=20, what="host")) == OLD:
            assert time.monotonic() < until
            time.sleep(0.01)
        endorsements = exchange.endorsements.read_text()
        fresh = appraise(evidence, endorsements, policy(job), nonce, NOW)
        # Junk that anyone may leave costs nobody anything.
        place(exchange.grant("records", 0), b"junk")
        time.sleep(0.2)
        stranger = party("stranger").sign("myelin/grant/1", {"job": job.digest})
        place(exchange.grant("records", 0), stranger)
        time.sleep(0.2)
        ledger = Ledger.create(
            tmp_path / "ledger", commitment=key.commitment, epsilon=100, delta=1e-5
        )
        place(exchange.grant("records", 0), grant(A, job, fresh, key, ledger=ledger))
    finally:
        running.join(timeout=30)
    assert sum("is no grant by a" in line for line in said) == 2
    verified = receipt.verify(
        exchange.receipt.read_bytes(), policy(job), exchange.endorsements.read_text(), NOW
    )
    assert verified.privacy.steps == 3
    assert exchange.output("weights", 1).exists()
    assert exchange.envelope("weights", 1).exists()


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken() -> Any:
        yield b"half"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        place(tmp_path / "file", broken())
    assert list(tmp_path.iterdir()) == []
