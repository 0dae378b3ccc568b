"""Evidence and its appraisal (RFC 9334): the step between an enclave's claim and a key for it."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from myelin import document
from myelin.document import Kind
from myelin.errors import DocumentInvalid, EvidenceRejected
from myelin.evidence import sgx
from myelin.party import sealing_key
from myelin.policy import Policy

__all__ = ["Appraised", "Evidence", "appraise", "report_data"]

SCHEMA: Kind = document.record(
    {
        "job": document.octets(32),
        "tee": document.text(),
        "hpke": document.octets(1216),
        "sign": document.octets(65),
        "type": document.label("myelin/evidence/1"),
        "nonce": document.octets(32),
        "quote": document.octets(),
    }
)

LIMIT = 65_536


def report_data(*, nonce: bytes, hpke: bytes, sign: bytes, job: bytes) -> bytes:
    """The 64 bytes that bind an instance's keys, its job and a nonce into a quote."""
    fields = b"".join(struct.pack("<I", len(field)) + field for field in (nonce, hpke, sign, job))
    return hashlib.sha512(b"myelin/report-data/1\0" + fields).digest()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What an enclave instance claims, with a quote that may prove it."""

    job: bytes
    hpke: bytes
    sign: bytes
    nonce: bytes
    quote: bytes
    tee: str = "sgx"

    def to_bytes(self) -> bytes:
        """Encode the document."""
        return document.encode({"type": "myelin/evidence/1", **vars(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Evidence:
        """Parse; raises `DocumentInvalid`."""
        fields: dict[str, Any] = document.decode(data, SCHEMA, limit=LIMIT)
        del fields["type"]
        return cls(**fields)


class Appraised:
    """An enclave instance that passed appraisal. Only `appraise` makes one.

    It cannot be changed, copied or unpickled, so that nothing is granted without appraisal.
    """

    __slots__ = ("hpke", "job", "measurement", "platform", "sign")

    job: bytes
    """The digest of the job that it runs."""
    hpke: bytes
    """The instance's sealing key, 1,216 bytes."""
    sign: bytes
    """The instance's signing key, 65 bytes."""
    measurement: bytes
    """MRENCLAVE, 32 bytes."""
    platform: sgx.Platform
    """What the quote says about the machine."""

    def __init__(self, proof: object, **fields: Any) -> None:
        """Refuse to be made anywhere else."""
        if proof is not _APPRAISAL:
            raise TypeError("only myelin.evidence.appraise makes an Appraised")
        for name in self.__slots__:
            object.__setattr__(self, name, fields[name])

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse every change."""
        raise TypeError("an Appraised cannot be changed; appraise again")

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise TypeError("an Appraised cannot be copied; appraise again")


_APPRAISAL = object()


def appraise(
    evidence: bytes, endorsements: str, policy: Policy, nonce: bytes, now: int
) -> Appraised:
    """Appraise evidence: a pure function of its arguments.

    evidence: the document's bytes; endorsements: collateral as JSON; policy: complete, see
    `Policy.for_job`; nonce: the 32 bytes that the caller sent; now: Unix seconds.
    Raises `EvidenceRejected` with the first check that failed: document, tee, structure,
    trailing-bytes, root, endorsements, expired, authenticity, tcb-status, advisories, platform,
    debug, measurement, nonce, hpke, sign, job, report-data.
    """
    try:
        claim = Evidence.from_bytes(evidence)
    except DocumentInvalid as error:
        raise EvidenceRejected("document", found=error) from None
    if claim.tee != "sgx":
        raise EvidenceRejected("tee", found=claim.tee, expected="sgx")
    quote = sgx.Quote.parse(claim.quote)
    platform = sgx.authenticate(quote, endorsements, policy, now)
    if quote.attributes[0] & sgx.DEBUG:  # the library refuses it too, today
        raise EvidenceRejected("debug", found="a debug enclave", expected="a production enclave")
    if quote.measurement not in policy.measurements:
        expected = " or ".join(value.hex() for value in policy.measurements)
        raise EvidenceRejected(
            "measurement",
            found=quote.measurement.hex(),
            expected=expected or "a policy that names one",
            hint="rebuild the image from its model and compare (myelin rebuild)",
        )
    if claim.nonce != nonce:
        raise EvidenceRejected(
            "nonce",
            found=claim.nonce.hex(),
            expected=nonce.hex(),
            hint="the evidence is old or was asked for by someone else",
        )
    for check, load in (("hpke", sealing_key), ("sign", document.public_key)):
        try:
            load(getattr(claim, check))
        except DocumentInvalid as error:
            raise EvidenceRejected(check, found=error.detail) from None
    if policy.job is None or claim.job != policy.job:
        raise EvidenceRejected(
            "job",
            found=claim.job.hex(),
            expected=policy.job.hex() if policy.job else "a policy that names one",
        )
    bound = report_data(nonce=claim.nonce, hpke=claim.hpke, sign=claim.sign, job=claim.job)
    if quote.report_data != bound:
        raise EvidenceRejected(
            "report-data",
            found=quote.report_data.hex()[:32] + "…",
            expected=bound.hex()[:32] + "…",
            hint="the keys, the nonce or the job are not those of the enclave that was quoted",
        )
    return Appraised(
        _APPRAISAL,
        job=claim.job,
        hpke=claim.hpke,
        sign=claim.sign,
        measurement=quote.measurement,
        platform=platform,
    )
