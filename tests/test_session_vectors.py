"""What a session of the Rust runtime produced (vectors/enclave) reads as the client expects."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from myelin import document, receipt
from myelin.document import Envelope
from myelin.evidence import report_data
from myelin.job import Job
from myelin.party import Party
from myelin.seal import open_output

PATH = Path(__file__).parents[1] / "vectors" / "enclave" / "session.json"


@pytest.fixture(scope="module")
def session():
    vectors = json.loads(PATH.read_text())
    receiver = vectors.pop("receiver")
    lists = {name: vectors.pop(name) for name in ("approvals", "commitments")}
    found = {name: bytes.fromhex(value) for name, value in vectors.items()}
    found |= {name: [bytes.fromhex(one) for one in values] for name, values in lists.items()}
    found["receiver"] = Party.from_seeds(
        receiver["name"],
        sign=bytes.fromhex(receiver["sign_secret"]),
        hpke=bytes.fromhex(receiver["hpke_seed"]),
    )
    return found


@pytest.fixture(scope="module")
def job(session):
    return Job.from_bytes(session["job"])


def test_approvals(session, job):
    job.check_approvals(session["approvals"])


def test_report_data_binds_the_receipt(session, job):
    assert session["nonce"] == sha256(session["receipt"]).digest()
    fields = {name: session[name] for name in ("nonce", "hpke", "sign")}
    assert report_data(**fields, job=job.digest) == session["report_data"]


def test_receipt(session, job):
    envelope = Envelope.from_bytes(session["receipt"], "myelin/receipt/1")
    body = document.decode(envelope.verified(session["sign"]), receipt.BODY)
    assert body["job"] == job.digest
    assert [entry["commitment"] for entry in body["inputs"]] == session["commitments"]
    assert body["outputs"] == [
        {"slot": "weights", "party": 3, "digest": sha256(session["weights"]).digest()}
    ]
    assert body["privacy"]["steps"] == 3
    assert body["score"]["total"] == 7


def test_output(session, job, tmp_path):
    sealed = tmp_path / "weights.sealed"
    sealed.write_bytes(session["sealed"])
    found = open_output(
        session["receiver"],
        session["envelope"],
        sealed,
        job=job,
        slot="weights",
        digest=sha256(session["weights"]).digest(),
    )
    assert found == session["weights"]
