"""SGX DCAP quotes: structure, authenticity by `dcap-qvl`, and the fields that it does not check.

A quote is Intel's ECDSA quote version 3 (Intel SGX DCAP, "Quote format"), with the PCK
certificate chain inside it. `dcap-qvl` accepts trailing bytes and loosely written PEM, so the exact
form is checked here first.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from myelin.errors import EvidenceRejected
from myelin.policy import INTEL_ROOT, Policy

HEADER = 48
REPORT = 384
SIGNED = HEADER + REPORT
PCK_CHAIN = 5
"""Certification data of type 5: the PCK certificate chain as PEM."""
DEBUG = 0x02
"""The DEBUG bit of the enclave's attributes: its memory can be read from outside."""


@dataclass(frozen=True, kw_only=True)
class Quote:
    """A quote taken apart; nothing in it is authentic yet."""

    raw: bytes
    attributes: bytes
    measurement: bytes
    report_data: bytes
    root: bytes
    """The last certificate of the chain inside the quote, DER."""
    root_name: str
    """Its common name, for people."""

    @classmethod
    def parse(cls, raw: bytes) -> Quote:
        """Check the exact structure; raises `EvidenceRejected` tee, structure, trailing-bytes."""
        if len(raw) < SIGNED + 4:
            raise EvidenceRejected("structure", found=f"{len(raw)} bytes", expected="a quote")
        version, key_type, tee = struct.unpack_from("<HHI", raw)
        if tee != 0 or version != 3 or key_type != 2:
            raise EvidenceRejected(
                "tee",
                found=f"version {version}, key type {key_type}, TEE type {tee:#x}",
                expected="an SGX ECDSA-P256 quote of version 3",
            )
        (signature_length,) = struct.unpack_from("<I", raw, SIGNED)
        _exact(len(raw), SIGNED + 4 + signature_length, "quote")
        body = raw[HEADER:SIGNED]
        root = _root(raw[SIGNED + 4 :])
        return cls(
            raw=raw,
            attributes=body[48:64],
            measurement=body[64:96],
            report_data=body[320:384],
            root=root.public_bytes(Encoding.DER),
            root_name=_common_name(root),
        )


@dataclass(frozen=True, kw_only=True)
class Platform:
    """What the verified quote says about the machine."""

    tcb_status: str
    advisories: tuple[str, ...]
    authority: str
    """`intel`, or `simulator` for a root that only this policy names."""
    root: str
    """Common name of the root certificate."""


def authenticate(quote: Quote, endorsements: str, policy: Policy, now: int) -> Platform:
    """Verify signatures, chains, revocation, dates; then TCB status and advisories.

    endorsements: collateral as JSON (dcap-qvl's `QuoteCollateralV3`); now: Unix seconds.
    Raises `EvidenceRejected`: root, endorsements, expired, debug, authenticity, tcb-status,
    advisories, platform.
    """
    root = hashlib.sha256(quote.root).hexdigest()
    if root != policy.root:
        raise EvidenceRejected(
            "root",
            found=f"{quote.root_name} ({root[:16]}…)",
            expected=f"{policy.root[:16]}…",
            hint="a simulator's root counts only where the policy names it as "
            "danger_simulator_root",
        )
    try:
        collateral = dcap_qvl.QuoteCollateralV3.from_json(endorsements)
    except ValueError as error:
        raise EvidenceRejected("endorsements", found=str(error)) from None
    verifier = dcap_qvl.QuoteVerifier(quote.root)
    claims = _claims(verifier, quote, collateral, now)
    status, advisories = claims["tcb"]["status"], tuple(claims["tcb"]["advisory_ids"])
    if status not in policy.tcb_statuses:
        raise EvidenceRejected(
            "tcb-status",
            found=status,
            expected=" or ".join(policy.tcb_statuses),
            hint="update the platform, or accept the status under tcb_statuses",
        )
    if unknown := sorted(set(advisories) - set(policy.advisories)):
        raise EvidenceRejected(
            "advisories",
            found=", ".join(unknown),
            expected=", ".join(policy.advisories) or "none open",
            hint="read them at Intel's and accept them by name under advisories",
        )
    _strict(verifier, quote, collateral, policy, now)
    return Platform(
        tcb_status=status,
        advisories=advisories,
        authority="intel" if root == INTEL_ROOT else "simulator",
        root=quote.root_name,
    )


def _claims(
    verifier: dcap_qvl.QuoteVerifier, quote: Quote, collateral: Any, now: int
) -> dict[str, Any]:
    """Everything but the platform's state, which the policy then judges by name."""
    try:
        made = verifier.verify_with_policy(
            quote.raw, collateral, now, dcap_qvl.QuotePolicy.claims_only(now)
        )
    except ValueError as error:
        check, hint = _named(str(error))
        raise EvidenceRejected(check, found=str(error), hint=hint) from None
    claims: dict[str, Any] = json.loads(made.to_json())
    return claims


def _named(failure: str) -> tuple[str, str]:
    """The check and a hint for a failure that the library tells only in words."""
    if "Debug mode" in failure:
        return "debug", "a debug enclave can be read from outside"
    if any(word in failure for word in ("xpired", "in the future", "NotValidYet")):
        return "expired", "fetch fresh endorsements"
    return "authenticity", ""


def _strict(
    verifier: dcap_qvl.QuoteVerifier, quote: Quote, collateral: Any, policy: Policy, now: int
) -> None:
    """The library's strict policy, loosened only by what ours names."""
    strict = dcap_qvl.QuotePolicy.strict(now)
    strict = strict.allow_dynamic_platform(policy.dynamic_platforms == "allow")
    strict = strict.allow_smt(policy.smt == "allow")
    strict = strict.platform_grace_period(policy.grace_days * 86_400)
    for status in policy.tcb_statuses:
        strict = strict.allow_status(status)
    try:
        verifier.verify_with_policy(quote.raw, collateral, now, strict)
    except ValueError as error:
        raise EvidenceRejected(
            "platform",
            found=str(error),
            hint="grace_days, dynamic_platforms and smt are keys of the policy",
        ) from None


def _root(signature: bytes) -> x509.Certificate:
    """Walk the signature data to the certificate chain; returns its last certificate."""
    at = 64 + 64 + REPORT + 64  # quote signature, attestation key, QE report, its signature
    (auth_length,) = _unpack("<H", signature, at)
    at += 2 + auth_length
    kind, chain_length = _unpack("<HI", signature, at)
    at += 6
    _exact(len(signature), at + chain_length, "certification data")
    if kind != PCK_CHAIN:
        raise EvidenceRejected("structure", found=f"certification data {kind}", expected=PCK_CHAIN)
    chain = signature[at:].removesuffix(b"\0")  # Intel's quotes end in a C string's zero
    try:
        certificates = x509.load_pem_x509_certificates(chain)
        canonical = b"".join(one.public_bytes(Encoding.PEM) for one in certificates)
        _common_name(certificates[-1])
    except Exception as error:  # the parser has many kinds, and each means the same here
        raise EvidenceRejected("structure", found=f"certificates: {error}") from None
    if canonical != chain:
        raise EvidenceRejected("structure", found="certificates in another form than plain PEM")
    return certificates[-1]


def _unpack(form: str, data: bytes, at: int) -> tuple[int, ...]:
    if len(data) < at + struct.calcsize(form):
        raise EvidenceRejected("structure", found="a quote cut short")
    return struct.unpack_from(form, data, at)


def _exact(found: int, expected: int, what: str) -> None:
    if found < expected:
        raise EvidenceRejected("structure", found=f"a {what} cut short", expected=expected)
    if found > expected:
        raise EvidenceRejected(
            "trailing-bytes", found=f"{found - expected} bytes after the {what}", expected="none"
        )


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else "a root without a name"
