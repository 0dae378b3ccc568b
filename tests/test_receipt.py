from __future__ import annotations

from typing import Any

import cbor2
import pytest
from parties import NOW, RESEARCHER, TESTER, A, B, assert_all_refused, cases, job, vectors

from myelin import receipt
from myelin.errors import ReceiptInvalid
from myelin.job import Job
from myelin.policy import Policy


def verify(file: bytes, *, now: int = NOW, under: Policy | None = None) -> receipt.Receipt:
    case = vectors("receipt")
    known = Job.from_bytes(cbor2.loads(good())["job"])
    trusting = Policy.dangerous_simulation(case["root"]).for_job(known)
    return receipt.verify(file, under or trusting, case["endorsements"], now)


def good() -> bytes:
    return bytes.fromhex(vectors("receipt")["file"])


def changed(**parts: Any) -> bytes:
    return cbor2.dumps(cbor2.loads(good()) | parts, canonical=True)


def refused(file: bytes, **how: Any) -> str:
    with pytest.raises(ReceiptInvalid) as error:
        verify(file, **how)
    assert error.value.exit_code == 4
    return error.value.check


def test_vector() -> None:
    case = vectors("receipt")
    made = verify(good())
    assert made.privacy.steps == case["steps"] == 80
    assert made.job.privacy.steps == 100
    assert made.privacy.epsilon < made.job.privacy.epsilon
    assert made.score is not None
    assert made.score.accuracy == 0.94
    assert [each.commitment.hex() for each in made.inputs] == case["commitments"]
    assert [(each.slot, each.party) for each in made.inputs] == [
        ("records", "hospital-a"),
        ("records", "hospital-b"),
        ("test", "tester"),
    ]
    assert made.output("weights", "researcher").digest.hex() == case["output"]
    assert made.appraised.platform.authority == "simulator"
    with pytest.raises(ReceiptInvalid, match="states no 'weights' for 'tester'"):
        made.output("weights", "tester")


@pytest.mark.parametrize("case", cases("receipt"))
def test_invalid_vectors(case: dict[str, str]) -> None:
    assert refused(bytes.fromhex(case["file"])) == case["check"]


def test_production_policy_refuses_a_simulated_receipt() -> None:
    with pytest.raises(ReceiptInvalid, match="danger_simulator_root") as error:
        verify(good(), under=Policy(job=Job.from_bytes(cbor2.loads(good())["job"]).digest))
    assert error.value.check == "evidence"


def test_policy_for_another_image_or_job() -> None:
    root = vectors("receipt")["root"]
    for limits in ({"measurements": (bytes(32),)}, {"job": bytes(32)}):
        under = Policy.dangerous_simulation(root, **limits)
        assert refused(good(), under=under) == "policy"


def test_a_policy_without_a_reference_value_judges_nothing() -> None:
    root = vectors("receipt")["root"]
    assert refused(good(), under=Policy.dangerous_simulation(root)) == "policy"


def test_expired_endorsements() -> None:
    assert refused(good(), now=NOW + 40 * 86_400) == "evidence"


def test_parts_of_another_receipt() -> None:
    other = cbor2.loads(bytes.fromhex(vectors("receipt")["invalid"][0]["file"]))
    assert refused(changed(receipt=other["receipt"])) == "evidence"
    assert refused(changed(evidence=other["evidence"])) == "evidence"
    assert refused(changed(type="myelin/receipt-file/2")) == "file"
    assert refused(changed(extra=1)) == "file"
    assert refused(changed(job=b"")) == "job"


def test_other_job_with_its_own_approvals_fails_at_the_evidence() -> None:
    other = job()
    approvals = [other.approve(member) for member in (A, B, TESTER, RESEARCHER)]
    file = changed(job=other.to_bytes(), approvals=approvals)
    under = Policy.dangerous_simulation(vectors("receipt")["root"]).for_job(other)
    assert refused(file, under=under) == "evidence"


def test_changed_job_fails_at_the_approvals() -> None:
    parts = cbor2.loads(good())
    fields = cbor2.loads(parts["job"])
    fields["weights"] = bytes(32)
    file = changed(job=cbor2.dumps(fields, canonical=True))
    assert refused(file) == "approvals"


def test_damage_is_refused() -> None:
    assert_all_refused(good(), verify, ReceiptInvalid, every=23)


@pytest.mark.slow
def test_every_damage_is_refused() -> None:
    assert_all_refused(good(), verify, ReceiptInvalid)
