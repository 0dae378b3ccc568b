from __future__ import annotations

import copy
import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parties import (
    INSTANCE,
    NONCE,
    NOW,
    PRIVACY,
    TESTER,
    A,
    B,
    appraised,
    assert_all_refused,
    cases,
    evidence,
    job,
    party,
    policy,
    vector_job,
    vectors,
    world,
)

from myelin import document
from myelin.document import Envelope
from myelin.errors import (
    BudgetExceeded,
    DocumentInvalid,
    EvidenceRejected,
    GrantRefused,
    LedgerInvalid,
)
from myelin.evidence import Appraised, Evidence, appraise, report_data
from myelin.grant import GRANT, INNER, Ledger, check_grant, grant
from myelin.party import Party
from myelin.privacy import compose
from myelin.seal import SealedKey

KEY = SealedKey(key=bytes([5] * 32), commitment=bytes([6] * 32))


def ledger(folder: Path, epsilon: float = 10.0) -> Ledger:
    return Ledger.create(folder / "ledger", commitment=KEY.commitment, epsilon=epsilon, delta=1e-5)


def opened(data: bytes, by: Party, digest: bytes) -> dict[str, Any]:
    body = document.decode(Envelope.from_bytes(data, "myelin/grant/1").claimed, GRANT)
    inner = by.open(body["enc"], body["ct"], b"myelin/grant/1\0" + digest)
    return document.decode(inner, INNER)


def test_grant_opens_only_in_the_instance_appraised(tmp_path: Path) -> None:
    made = job()
    data = grant(A, made, appraised(made), KEY, ledger=ledger(tmp_path))
    assert check_grant(data, made) == made.sends[0]
    expected = {"key": KEY.key, "uses": 1, "commitment": KEY.commitment}
    assert opened(data, INSTANCE, made.digest) == expected
    for who, digest in ((B, made.digest), (INSTANCE, bytes(32))):
        with pytest.raises(DocumentInvalid, match="hpke-failed"):
            opened(data, who, digest)


def test_grant_needs_an_appraisal_of_this_job_and_image(tmp_path: Path) -> None:
    made = job()
    book = ledger(tmp_path)
    other = appraised(job(weights=bytes(32)))
    with pytest.raises(GrantRefused) as refused:
        grant(A, made, other, KEY, ledger=book)
    assert refused.value.check == "job"
    public = INSTANCE.public
    bound = {"nonce": NONCE, "hpke": public.hpke, "sign": public.sign, "job": made.digest}
    quote = world().quote(bytes(32), report_data(**bound))
    elsewhere = policy(job=made.digest, measurements=(bytes(32),))
    other = appraise(
        Evidence(quote=quote, **bound).to_bytes(),
        world().endorsements(now=NOW),
        elsewhere,
        NONCE,
        NOW,
    )
    with pytest.raises(GrantRefused) as refused:
        grant(A, made, other, KEY, ledger=book)
    assert refused.value.check == "measurement"
    assert book.spent == 0


def test_nothing_but_appraise_makes_an_appraisal() -> None:
    made = appraised(job())
    fields = {name: getattr(made, name) for name in Appraised.__slots__}
    with pytest.raises(TypeError, match="only"):
        Appraised(object(), **fields)
    with pytest.raises(TypeError, match="cannot be changed"):
        made.hpke = B.public.hpke
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            duplicate(made)
    with pytest.raises(TypeError, match="dataclass"):
        replace(made, hpke=B.public.hpke)


def test_rejected_evidence_gives_no_appraisal() -> None:
    made = job()
    with pytest.raises(EvidenceRejected):
        appraise(
            evidence(made, debug=True), world().endorsements(now=NOW), policy(made), bytes(32), NOW
        )


def test_who_may_grant_what(tmp_path: Path) -> None:
    made = job()
    book = ledger(tmp_path)
    for who, slot, given, check in (
        (party("stranger"), "records", book, "party"),
        (TESTER, "records", book, "party"),
        (A, "test", None, "party"),
        (A, "records", None, "ledger"),
        (TESTER, "test", book, "ledger"),
    ):
        with pytest.raises(GrantRefused) as refused:
            grant(who, made, appraised(made), KEY, slot=slot, ledger=given)
        assert refused.value.check == check
    assert book.spent == 0
    data = grant(TESTER, made, appraised(made), KEY, slot="test")
    assert check_grant(data, made) == made.sends[2]


@pytest.mark.parametrize("case", vectors("grant")["valid"], ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    made = vector_job()
    data = bytes.fromhex(case["grant"])
    assert check_grant(data, made) == made.sends[case["send"]]
    inner = opened(data, vector_instance(), made.digest)
    assert inner["key"].hex() == case["key"]
    assert inner["commitment"].hex() == case["commitment"]


@pytest.mark.parametrize("case", cases("grant"))
def test_invalid_vectors(case: dict[str, str]) -> None:
    made = vector_job()
    data = bytes.fromhex(case["grant"])

    def use() -> None:
        check_grant(data, made)
        opened(data, vector_instance(), made.digest)

    with pytest.raises(DocumentInvalid) as refused:
        use()
    # Only the form of the inner map is checked here, so "uses" has the reason of a wrong field.
    expected = "field-wrong" if case["name"] == "many uses" else case["reason"]
    assert refused.value.reason == expected


def test_every_damage_is_refused() -> None:
    data = bytes.fromhex(vectors("grant")["valid"][0]["grant"])
    made = vector_job()
    assert_all_refused(data, lambda changed: check_grant(changed, made), DocumentInvalid)


def vector_instance() -> Party:
    secret = vectors("grant")["instance"]
    return Party.from_seeds(
        "instance",
        sign=bytes.fromhex(secret["sign_secret"]),
        hpke=bytes.fromhex(secret["hpke_seed"]),
    )


# The ledger


def test_grants_compose_until_the_budget_is_spent(tmp_path: Path) -> None:
    made = job()
    one, two = compose([PRIVACY], 1e-5), compose([PRIVACY, PRIVACY], 1e-5)
    assert one < two < 2 * one
    book = ledger(tmp_path, epsilon=(two + compose([PRIVACY] * 3, 1e-5)) / 2)
    for expected in (one, two):
        grant(A, made, appraised(made), KEY, ledger=book)
        assert book.spent == pytest.approx(expected)
    before = book.path.read_bytes()
    with pytest.raises(BudgetExceeded) as refused:
        grant(A, made, appraised(made), KEY, ledger=book)
    assert refused.value.exit_code == 5
    assert refused.value.spent == pytest.approx(two)
    assert refused.value.asked > book.epsilon
    assert book.path.read_bytes() == before
    assert Ledger.open(book.path) == book


def test_the_grant_exists_only_after_the_debit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while granting costs budget and releases nothing."""
    made = job()
    book = ledger(tmp_path)

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("myelin.grant.seal_to", crash)
    with pytest.raises(KeyboardInterrupt):
        grant(A, made, appraised(made), KEY, ledger=book)
    assert book.spent > 0


def test_a_torn_last_line_never_counted(tmp_path: Path) -> None:
    made = job()
    book = ledger(tmp_path)
    book.debit(made, appraised(made))
    whole = book.path.read_bytes()
    book.debit(made, appraised(made))
    both = book.path.read_bytes()
    for cut in range(len(whole), len(both)):
        book.path.write_bytes(both[:cut])
        assert book.spent == pytest.approx(compose([PRIVACY], 1e-5))
    book.debit(made, appraised(made))
    assert book.path.read_bytes() == both


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"{}\n",
        b'{"type":"myelin/ledger/1","epsilon":0,"delta":1e-5}\n',
        b'{"type":"myelin/ledger/1","epsilon":1,"delta":1e-5}\nnonsense\n',
        b'{"type":"myelin/ledger/1","epsilon":1,"delta":1e-5}\n{"privacy":{}}\n',
        b"[]\n",
        b"\xff\xfe\n",
    ],
)
def test_a_damaged_ledger_grants_nothing(tmp_path: Path, content: bytes) -> None:
    made = job()
    book = ledger(tmp_path)
    book.path.write_bytes(content)
    with pytest.raises(LedgerInvalid, match="damaged"):
        grant(A, made, appraised(made), KEY, ledger=book)
    assert book.path.read_bytes() == content


def test_out_of_range_numbers_are_damage(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    line = {"privacy": PRIVACY.to_fields() | {"steps": 0}}
    with book.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    with pytest.raises(LedgerInvalid, match="steps"):
        _ = book.spent


def test_ledger_is_not_overwritten_and_must_exist(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    with pytest.raises(LedgerInvalid, match="never overwritten"):
        Ledger.create(book.path, commitment=KEY.commitment, epsilon=100.0, delta=1e-5)
    with pytest.raises(LedgerInvalid, match="No such file"):
        Ledger.open(tmp_path / "other")
    for epsilon, delta in ((0.0, 1e-5), (float("inf"), 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(LedgerInvalid, match="is none"):
            Ledger.create(tmp_path / "new", commitment=KEY.commitment, epsilon=epsilon, delta=delta)


def debit_some(path: Path, times: int) -> None:
    made = job()
    instance = appraised(made)
    for _ in range(times):
        Ledger.open(path).debit(made, instance)


def test_two_processes_share_one_ledger(tmp_path: Path) -> None:
    book = ledger(tmp_path, epsilon=1000.0)
    workers = [
        multiprocessing.get_context("fork").Process(target=debit_some, args=(book.path, 5))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(book.path.read_bytes().splitlines()) == 11
    assert book.spent == pytest.approx(compose([PRIVACY] * 10, 1e-5))


def test_a_ledger_of_another_sealed_file_is_refused(tmp_path: Path) -> None:
    made = job()
    book = ledger(tmp_path)
    other = SealedKey(key=KEY.key, commitment=bytes([7] * 32))
    with pytest.raises(GrantRefused) as refused:
        grant(A, made, appraised(made), other, ledger=book)
    assert refused.value.check == "ledger"
    assert book.spent == 0
    assert Ledger.open(book.path) == book
