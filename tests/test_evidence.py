from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from parties import (
    INSTANCE,
    NONCE,
    NOW,
    A,
    B,
    assert_all_refused,
    evidence,
    job,
    policy,
    vectors,
    world,
)

from myelin.errors import EvidenceRejected, UsageError
from myelin.evidence import Evidence, appraise, report_data, sgx
from myelin.evidence.simulator import World
from myelin.job import ImageReference
from myelin.policy import Policy

JOB = job()
DAY = 86_400
GENUINE = Path(os.environ.get("MYELIN_VECTORS", "../shared/vectors"), "evidence")


def check(
    data: bytes | None = None,
    *,
    endorsements: str | None = None,
    under: Policy | None = None,
    nonce: bytes = NONCE,
    now: int = NOW,
) -> str:
    """Appraise and give the name of the check that failed."""
    fresh = world().endorsements(now=NOW) if endorsements is None else endorsements
    with pytest.raises(EvidenceRejected) as rejected:
        appraise(evidence(JOB) if data is None else data, fresh, under or policy(JOB), nonce, now)
    assert rejected.value.exit_code == 3
    assert str(rejected.value.found)
    return rejected.value.check


def requoted(change: Callable[[bytearray], object]) -> bytes:
    """Evidence whose quote was changed."""
    quote = bytearray(Evidence.from_bytes(evidence(JOB)).quote)
    change(quote)
    return evidence(JOB, quote=bytes(quote))


def test_good_evidence_says_that_it_is_simulated() -> None:
    made = appraise(evidence(JOB), world().endorsements(now=NOW), policy(JOB), NONCE, NOW)
    assert made.job == JOB.digest
    assert made.hpke == INSTANCE.public.hpke
    assert made.sign == INSTANCE.public.sign
    assert made.measurement == JOB.image.measurement
    assert made.platform.authority == "simulator"
    assert "TEST" in made.platform.root


# One refusal for each check


def test_simulator_under_a_production_policy() -> None:
    assert check(under=Policy().for_job(JOB)) == "root"


def test_foreign_root(tmp_path: Path) -> None:
    foreign = World.create(tmp_path / "world", now=NOW)
    public = INSTANCE.public
    bound = {"nonce": NONCE, "hpke": public.hpke, "sign": public.sign, "job": JOB.digest}
    quote = foreign.quote(JOB.image.measurement, report_data(**bound))
    assert check(evidence(JOB, quote=quote)) == "root"
    assert check(endorsements=foreign.endorsements(now=NOW)) == "authenticity"


def test_foreign_quote_with_our_root_pasted_in(tmp_path: Path) -> None:
    foreign = World.create(tmp_path / "world", now=NOW)
    pasted = World(
        keys=foreign.keys,
        certificates=foreign.certificates | {"root": world().certificates["root"]},
    )
    quote = pasted.quote(JOB.image.measurement, bytes(64))
    assert check(evidence(JOB, quote=quote)) == "authenticity"


def test_wrong_measurement() -> None:
    other = job(image=ImageReference(digest=bytes(32), measurement=bytes(32)))
    assert check(under=policy(measurements=(bytes(32),), job=JOB.digest)) == "measurement"
    assert check(evidence(other)) == "measurement"
    assert check(under=policy(job=JOB.digest)) == "measurement"


def test_debug() -> None:
    assert check(evidence(JOB, debug=True)) == "debug"


def test_wrong_nonce() -> None:
    assert check(nonce=bytes(32)) == "nonce"
    assert check(evidence(JOB, nonce=bytes(32)), nonce=bytes(32)) == "report-data"


def test_other_hpke_key() -> None:
    assert check(evidence(JOB, hpke=A.public.hpke)) == "report-data"
    assert check(evidence(JOB, hpke=b"\xff" * 1216)) == "hpke"


def test_other_signing_key() -> None:
    assert check(evidence(JOB, sign=B.public.sign)) == "report-data"
    assert check(evidence(JOB, sign=bytes(65))) == "sign"


def test_other_job() -> None:
    other = job(weights=bytes(32))
    assert check(evidence(other)) == "job"
    assert check(evidence(other, job=JOB.digest)) == "report-data"
    assert check(under=policy(measurements=(JOB.image.measurement,))) == "job"


def test_tampered_body() -> None:
    for at in (0, 64, 320):  # CPU SVN, measurement, report data

        def flip(quote: bytearray, at: int = at) -> None:
            quote[48 + at] ^= 1

        assert check(requoted(flip)) == "authenticity"


def test_trailing_bytes() -> None:
    assert check(requoted(lambda quote: quote.append(0))) == "trailing-bytes"

    def inside(quote: bytearray) -> None:
        quote += b"junk"
        quote[432:436] = (len(quote) - 436).to_bytes(4, "little")

    assert check(requoted(inside)) == "trailing-bytes"
    assert check(evidence(JOB) + b"\0") == "document"


def test_certificates_in_another_form() -> None:
    def spaces(quote: bytearray) -> None:
        at = quote.index(b"\n", quote.index(b"-----BEGIN"))
        quote[at + 1 : at + 1] = b"\n"
        for where in (432, quote.index(b"-----BEGIN") - 4):
            length = int.from_bytes(quote[where : where + 4], "little") + 1
            quote[where : where + 4] = length.to_bytes(4, "little")

    assert check(requoted(spaces)) == "structure"


def test_other_tee() -> None:
    assert check(evidence(JOB, tee="tdx")) == "tee"

    def tdx(quote: bytearray) -> None:
        quote[4] = 0x81

    assert check(requoted(tdx)) == "tee"


def test_truncated_quote() -> None:
    for length in (0, 3, 100, 435, 436, 500, 1000, 2000, 4000):

        def cut(quote: bytearray, length: int = length) -> None:
            del quote[length:]

        assert check(requoted(cut)) == "structure"


@pytest.mark.parametrize("days", [-3, 31, 365 * 30])
def test_expired_or_not_yet_valid_endorsements(days: int) -> None:
    assert check(now=NOW + days * DAY) == "expired"


def test_outdated_tcb() -> None:
    outdated = world().endorsements(now=NOW, status="OutOfDate")
    assert check(endorsements=outdated) == "tcb-status"
    statuses = ("UpToDate", "OutOfDate")
    assert check(endorsements=outdated, under=policy(JOB, tcb_statuses=statuses)) == "platform"
    loose = policy(JOB, tcb_statuses=statuses, grace_days=30)
    made = appraise(evidence(JOB), outdated, loose, NONCE, NOW)
    assert made.platform.tcb_status == "OutOfDate"


def test_open_advisories() -> None:
    hardening = world().endorsements(
        now=NOW, status="SWHardeningNeeded", advisories=("INTEL-SA-00615", "INTEL-SA-00289")
    )
    statuses = ("UpToDate", "SWHardeningNeeded")
    partly = policy(JOB, tcb_statuses=statuses, advisories=("INTEL-SA-00615",))
    assert check(endorsements=hardening, under=partly) == "advisories"
    fully = policy(JOB, tcb_statuses=statuses, advisories=("INTEL-SA-00615", "INTEL-SA-00289"))
    appraise(evidence(JOB), hardening, fully, NONCE, NOW)


@pytest.mark.parametrize("role", ["pck", "ca"])
def test_revoked(role: str) -> None:
    revoked = world().endorsements(now=NOW, revoked=(role,))
    assert check(endorsements=revoked) == "authenticity"
    assert check(endorsements=world().endorsements(now=NOW, status="Revoked")) == "authenticity"


@pytest.mark.parametrize("text", ["", "{}", "[]", "nonsense", "null"])
def test_no_endorsements(text: str) -> None:
    assert check(endorsements=text) == "endorsements"


def test_unbound_attestation_key() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    stranger = World(keys=world().keys | {"attestation": other}, certificates=world().certificates)
    public = INSTANCE.public
    bound = {"nonce": NONCE, "hpke": public.hpke, "sign": public.sign, "job": JOB.digest}
    good = stranger.quote(JOB.image.measurement, report_data(**bound))
    theirs = world().quote(JOB.image.measurement, report_data(**bound))
    # Their signature and key (436 … 564) before the quoting enclave's report on our key.
    mixed = good[:564] + theirs[564:]
    assert check(evidence(JOB, quote=mixed)) == "authenticity"


def test_every_damage_is_refused() -> None:
    endorsements = world().endorsements(now=NOW)

    def use(changed: bytes) -> None:
        appraise(changed, endorsements, policy(JOB), NONCE, NOW)

    data = evidence(JOB)
    use(data)
    assert_all_refused(data, use, EvidenceRejected)


# Report data


def test_report_data_by_the_page() -> None:
    case = {
        name: bytes.fromhex(value) for name, value in vectors("report-data")["valid"][0].items()
    }
    message = b"myelin/report-data/1\0"
    for name in ("nonce", "hpke", "sign", "job"):
        message += len(case[name]).to_bytes(4, "little") + case[name]
    expected = case.pop("report_data")
    assert hashlib.sha512(message).digest() == expected
    assert report_data(**case) == expected


def test_evidence_vector() -> None:
    case = vectors("evidence")
    data, fields = bytes.fromhex(case["evidence"]), case["fields"]
    # Read a second time by hand: a map of seven, its keys in the order of the page.
    assert data[0] == 0xA7
    places = [data.index(bytes([0x60 + len(key)]) + key.encode()) for key in fields]
    assert list(fields) == ["job", "tee", "hpke", "sign", "type", "nonce", "quote"]
    assert places == sorted(places)
    assert bytes.fromhex(fields["quote"]) == data[-len(fields["quote"]) // 2 :]
    assert Evidence.from_bytes(data).to_bytes() == data
    job = bytes.fromhex(fields["job"])
    measurement = bytes.fromhex(fields["quote"])[48 + 64 : 48 + 96]
    under = Policy.dangerous_simulation(case["root"], job=job, measurements=(measurement,))
    nonce = bytes.fromhex(fields["nonce"])
    made = appraise(data, case["endorsements"], under, nonce, case["now"])
    assert made.sign.hex() == fields["sign"]
    assert made.hpke.hex() == fields["hpke"]


# The simulator's world


def test_world_is_kept_and_reopened(tmp_path: Path) -> None:
    made = World.create(tmp_path / "new" / "world", now=NOW)
    again = World.open(tmp_path / "new" / "world")
    assert again.root == made.root
    assert again.certificates == made.certificates
    assert stat.S_IMODE((tmp_path / "new/world/keys.pem").stat().st_mode) == 0o600
    root = x509.load_pem_x509_certificate((tmp_path / "new/world/root.pem").read_bytes())
    assert "TEST" in root.subject.rfc4514_string()
    quote = sgx.Quote.parse(again.quote(bytes(32), bytes(64)))
    under = Policy.dangerous_simulation(tmp_path / "new/world/root.pem")
    assert sgx.authenticate(quote, made.endorsements(now=NOW), under, NOW).authority == "simulator"
    with pytest.raises(UsageError, match="never overwritten"):
        World.create(tmp_path / "new" / "world", now=NOW)
    with pytest.raises(UsageError, match="no simulator's world"):
        World.open(tmp_path / "new")
    assert os.listdir(tmp_path / "new") == ["world"]


def test_worlds_differ(tmp_path: Path) -> None:
    assert World.create(tmp_path / "a", now=NOW).root != World.create(tmp_path / "b", now=NOW).root


# Genuine hardware


def genuine(name: str) -> bytes:
    path = GENUINE / name
    if not path.exists():
        pytest.skip(f"{path} is absent; MYELIN_VECTORS names the folder of genuine evidence")
    return path.read_bytes()


ACCEPTING: dict[str, Any] = {
    "tcb_statuses": ("UpToDate", "ConfigurationAndSWHardeningNeeded"),
    "advisories": ("INTEL-SA-00289", "INTEL-SA-00615"),
}


@pytest.mark.parametrize(
    ("limits", "failed"),
    [
        ({}, "tcb-status"),
        ({"tcb_statuses": ACCEPTING["tcb_statuses"]}, "advisories"),
        (ACCEPTING | {"advisories": ("INTEL-SA-00289",)}, "advisories"),
        ({"advisories": ACCEPTING["advisories"]}, "tcb-status"),
        (ACCEPTING, None),
    ],
)
def test_genuine_sgx_quote(limits: dict[str, Any], failed: str | None) -> None:
    quote = sgx.Quote.parse(genuine("sgx_quote"))
    endorsements = genuine("sgx_quote_collateral.json").decode()
    now = 1_751_000_000  # 2025-06-27
    if failed is None:
        platform = sgx.authenticate(quote, endorsements, Policy(**limits), now)
        assert platform.authority == "intel"
        assert platform.root == "Intel SGX Root CA"
        assert platform.tcb_status == "ConfigurationAndSWHardeningNeeded"
        for outside in (1_750_000_000, 1_753_100_000):  # 2025-06-15, 2025-07-21
            with pytest.raises(EvidenceRejected) as rejected:
                sgx.authenticate(quote, endorsements, Policy(**limits), outside)
            assert rejected.value.check == "expired"
        under = Policy.dangerous_simulation(world().root, **limits)
        with pytest.raises(EvidenceRejected) as rejected:
            sgx.authenticate(quote, endorsements, under, now)
        assert rejected.value.check == "root"
    else:
        with pytest.raises(EvidenceRejected) as rejected:
            sgx.authenticate(quote, endorsements, Policy(**limits), now)
        assert rejected.value.check == failed


def test_genuine_tdx_quote_is_not_sgx() -> None:
    with pytest.raises(EvidenceRejected) as rejected:
        sgx.Quote.parse(genuine("tdx_quote"))
    assert rejected.value.check == "tee"
