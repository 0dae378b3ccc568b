from __future__ import annotations

import hashlib
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import (
    PRIVACY,
    RESEARCHER,
    TESTER,
    A,
    B,
    assert_all_refused,
    cases,
    job,
    party,
    vector_job,
    vectors,
)

from myelin import document
from myelin.errors import DocumentInvalid
from myelin.job import SCHEMA, Job
from myelin.privacy import Privacy

ALL = (A, B, TESTER, RESEARCHER)


def test_vector() -> None:
    case = vectors("job")["valid"][0]
    data = bytes.fromhex(case["job"])
    made = Job.from_bytes(data)
    assert made.to_bytes() == data
    assert made.digest.hex() == case["digest"] == hashlib.sha256(data).hexdigest()
    fields = cbor2.loads(data)
    assert list(fields) == ["type", "image", "sends", "parties", "privacy", "weights", "receives"]
    assert list(fields["sends"][0]) == ["slot", "party", "capacity"]
    assert fields["privacy"]["noise_multiplier"] == 2_500_000
    assert fields["privacy"]["sample_rate"] == 2**29


@pytest.mark.parametrize("case", cases("job"))
def test_invalid_vectors(case: dict[str, str]) -> None:
    with pytest.raises(DocumentInvalid) as refused:
        Job.from_bytes(bytes.fromhex(case["job"]))
    assert refused.value.reason == case["reason"]


@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=3),
    st.booleans(),
    st.binary(min_size=32, max_size=32),
)
@settings(max_examples=25, deadline=None)
def test_round_trip(capacities: list[int], score: bool, weights: bytes) -> None:
    owners = dict(zip((A.public, B.public, TESTER.public), capacities, strict=False))
    limits = Privacy.for_records(
        sum(owners.values()),
        noise_multiplier=2.0,
        max_grad_norm=0.5,
        sample_rate=0.01,
        steps=10,
        delta=1e-6,
    )
    sends: dict[str, Any] = {"records": owners}
    receives: dict[str, Any] = {"weights": [RESEARCHER.public, A.public]}
    if score:
        sends["test"] = {TESTER.public: 7}
        receives["score"] = [None]
    made = job(sends=sends, receives=receives, privacy=limits, weights=weights)
    assert Job.from_bytes(made.to_bytes()) == made


def test_approver_only() -> None:
    made = job(approvers=[party("auditor").public])
    assert [each.name for each in made.parties] == ["a", "b", "tester", "researcher", "auditor"]
    assert Job.from_bytes(made.to_bytes()) == made


def test_every_damage_is_refused_or_is_another_job() -> None:
    """A job is not signed: a change that still is a job must lose the approvals."""
    made = job()
    approvals = [made.approve(each) for each in ALL]

    def use(changed: bytes) -> None:
        Job.from_bytes(changed).check_approvals(approvals)

    use(made.to_bytes())
    assert_all_refused(made.to_bytes(), use, DocumentInvalid, every=3)


def test_stated_epsilon_must_be_true() -> None:
    fields = cbor2.loads(job().to_bytes())
    stated = fields["privacy"]["epsilon"]
    assert stated == round(PRIVACY.epsilon * 1e6)
    for wrong in (stated - 101, stated // 2, 0, stated * 2):
        fields["privacy"]["epsilon"] = wrong
        with pytest.raises(DocumentInvalid, match=r"privacy\.epsilon states") as refused:
            Job.from_bytes(cbor2.dumps(fields, canonical=True))
        assert refused.value.reason == "job-wrong"
    fields["privacy"]["epsilon"] = stated + 3  # another machine's last digits
    data = cbor2.dumps(fields, canonical=True)
    assert Job.from_bytes(data).to_bytes() == data


def test_max_batch_must_fit_the_capacities() -> None:
    with pytest.raises(DocumentInvalid, match="need at least"):
        job(sends={"records": {A.public: 400, B.public: 400}, "test": {TESTER.public: 1}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sends": {"test": {TESTER.public: 5}}}, "nobody sends records"),
        ({"receives": {"score": [None]}}, "nobody receives weights"),
        ({"receives": {"weights": [None]}}, "not to everyone"),
        ({"receives": {"weights": [A.public], "score": [A.public]}}, "its party is null"),
        ({"receives": {"weights": [A.public, A.public]}}, "same slot and party"),
        ({"weights": bytes(31)}, "31 bytes"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DocumentInvalid, match=message):
        job(**changes)


def test_refuses_two_parties_of_one_name() -> None:
    other = type(B).from_seeds("a", sign=bytes([1] * 32), hpke=bytes([2] * 32)).public
    with pytest.raises(DocumentInvalid, match="same party name"):
        job(sends={"records": {A.public: 100, other: 200}, "test": {TESTER.public: 5}})


def test_describe_says_who_sees_what() -> None:
    rows = {row.what: row for row in job().describe()}
    assert rows["records, at most 100"].source == "a"
    assert rows["weights"].visible_to == "researcher"
    assert "add-or-remove-one" in rows["weights"].source
    assert rows["score"].visible_to == "everyone"


# Approvals


def test_approval_vectors() -> None:
    made = vector_job()
    data = [bytes.fromhex(case["approval"]) for case in vectors("approval")["valid"]]
    names = [made.check_approval(each).name for each in data]
    assert names == [case["name"] for case in vectors("approval")["valid"]]
    made.check_approvals(data)


@pytest.mark.parametrize("case", cases("approval"))
def test_invalid_approval_vectors(case: dict[str, str]) -> None:
    with pytest.raises(DocumentInvalid) as refused:
        vector_job().check_approval(bytes.fromhex(case["approval"]))
    assert refused.value.reason == case["reason"]


def test_every_party_approves_once() -> None:
    made = job()
    approvals = [made.approve(each) for each in ALL]
    made.check_approvals(approvals)
    for wrong, reason in (
        (approvals[1:], "approval-missing"),
        ([*approvals, approvals[0]], "approval-duplicate"),
        ([*approvals[:3], job(weights=bytes(32)).approve(RESEARCHER)], "job-wrong"),
    ):
        with pytest.raises(DocumentInvalid) as refused:
            made.check_approvals(wrong)
        assert refused.value.reason == reason
    with pytest.raises(DocumentInvalid, match="party-unknown"):
        made.approve(party("stranger"))


def test_every_damage_to_an_approval_is_refused() -> None:
    made = job()
    assert_all_refused(made.approve(A), made.check_approval, DocumentInvalid)


def test_a_job_keeps_the_epsilon_it_states_to_the_last_digit() -> None:
    """Sums may differ between machines; the bytes that were approved may not."""
    fields = document.decode(job().to_bytes(), SCHEMA)
    fields["privacy"]["epsilon"] += 3
    data = document.encode(fields)
    assert Job.from_bytes(data).to_bytes() == data
