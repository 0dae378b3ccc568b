"""A simulated SGX world: quotes in the genuine format under a root named TEST.

It shows function and protects nothing: its keys lie in a file. Each installation makes its own
world, and a policy must name that world's root before it accepts anything from it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import secrets
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from myelin.errors import UsageError

Key: TypeAlias = ec.EllipticCurvePrivateKey

ROLES = ("root", "ca", "pck", "tcb", "attestation")
"""Whose keys the world holds: root CA, PCK CA, PCK, TCB signing, attestation key."""
VALIDITY = dt.timedelta(days=365 * 20)
FRESH = dt.timedelta(days=30)
"""How long endorsements are valid, as Intel's."""
BACKDATED = dt.timedelta(days=1)
"""Clocks of two machines differ."""

CPUSVN = bytes([5, 5, 2, 2, 3, 1, 0, 3] + [0] * 8)
PCESVN = 11
FMSPC = bytes.fromhex("00a067110000")
QE_SVN = 8
QE_SIGNER = hashlib.sha256(b"Myelin TEST quoting enclave").digest()
INTEL_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
EVALUATION = 20
_OID = "1.2.840.113741.1.13.1"
"""Intel's SGX extension of PCK certificates."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The keys and certificates of one simulated world."""

    keys: dict[str, Key]
    certificates: dict[str, x509.Certificate]

    @classmethod
    def create(cls, folder: str | os.PathLike[str], *, now: int) -> World:
        """Make a world in a folder that does not exist yet; now: Unix seconds.

        `root.pem` is public, `keys.pem` (0600) holds everything else.
        """
        folder = Path(folder)
        if folder.exists():
            raise UsageError(f"{folder} exists; a simulator's world is never overwritten")
        world = cls._make(now)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Complete or not there at all, also when two processes try at once.
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            content = b"".join(
                [
                    *(_key_pem(world.keys[role]) for role in ROLES),
                    *(_pem(world.certificates[role]) for role in ROLES[:4]),
                ]
            )
            descriptor = os.open(Path(made, "keys.pem"), os.O_WRONLY | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            Path(made, "root.pem").write_bytes(_pem(world.certificates["root"]))
            try:
                Path(made).rename(folder)
            except OSError:
                raise UsageError(f"{folder} was made by another process just now") from None
            Path(made).mkdir()  # for the context manager to remove
        return world

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> World:
        """Load a world from its folder."""
        path = Path(folder, "keys.pem")
        try:
            content = path.read_bytes()
            parts = content.split(b"-----BEGIN PRIVATE KEY-----")[1:]
            loaded = [
                load_pem_private_key(b"-----BEGIN PRIVATE KEY-----" + part, None) for part in parts
            ]
            certificates = x509.load_pem_x509_certificates(content)
            keys = [key for key in loaded if isinstance(key, ec.EllipticCurvePrivateKey)]
            return cls(
                keys=dict(zip(ROLES, keys, strict=True)),
                certificates=dict(zip(ROLES[:4], certificates, strict=True)),
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is no simulator's world: {error}") from None

    @property
    def root(self) -> str:
        """SHA-256 of the root certificate in hex, for `Policy.dangerous_simulation`."""
        der = self.certificates["root"].public_bytes(Encoding.DER)
        return hashlib.sha256(der).hexdigest()

    def quote(self, measurement: bytes, report_data: bytes, *, debug: bool = False) -> bytes:
        """Mint an SGX quote version 3 for an MRENCLAVE (32 bytes) and report data (64)."""
        header = struct.pack("<HHIHH16s20s", 3, 2, 0, QE_SVN, PCESVN, INTEL_QE_VENDOR, bytes(20))
        attributes = bytes([0x07 if debug else 0x05]) + bytes(15)  # INIT, MODE64BIT, DEBUG
        body = _report(measurement, bytes(32), report_data, attributes, product=0, svn=1)
        attestation = self.keys["attestation"]
        numbers = attestation.public_key().public_numbers()
        public = numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")
        auth = bytes(32)
        bound = hashlib.sha256(public + auth).digest() + bytes(32)
        qe = _report(QE_SIGNER, QE_SIGNER, bound, bytes([0x11]) + bytes(15), product=1, svn=QE_SVN)
        chain = b"".join(_pem(self.certificates[role]) for role in ("pck", "ca", "root"))
        signature = b"".join(
            [
                _sign(attestation, header + body),
                public,
                qe,
                _sign(self.keys["pck"], qe),
                struct.pack("<H", len(auth)) + auth,
                struct.pack("<HI", 5, len(chain)) + chain,
            ]
        )
        return header + body + struct.pack("<I", len(signature)) + signature

    def endorsements(
        self,
        *,
        now: int,
        status: str = "UpToDate",
        advisories: tuple[str, ...] = (),
        revoked: tuple[str, ...] = (),
    ) -> str:
        """Collateral for this world's quotes, valid for 30 days, as JSON.

        status, advisories: what it says of the platform; revoked: roles whose certificate it
        revokes. Tests of refusals need these.
        """
        start = _time(now) - BACKDATED
        level = {"tcbDate": _iso(start), "tcbStatus": status, "advisoryIDs": list(advisories)}
        dates = {"issueDate": _iso(start), "nextUpdate": _iso(start + BACKDATED + FRESH)}
        tcb = {
            "id": "SGX",
            "version": 3,
            **dates,
            "fmspc": FMSPC.hex().upper(),
            "pceId": "0000",
            "tcbType": 0,
            "tcbEvaluationDataNumber": EVALUATION,
            "tcbLevels": [
                {
                    "tcb": {
                        "sgxtcbcomponents": [{"svn": svn} for svn in CPUSVN],
                        "pcesvn": PCESVN,
                    },
                    **level,
                }
            ],
        }
        identity = {
            "id": "QE",
            "version": 2,
            **dates,
            "tcbEvaluationDataNumber": EVALUATION,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11" + "00" * 15,
            "attributesMask": "FB" + "FF" * 7 + "00" * 8,
            "mrsigner": QE_SIGNER.hex().upper(),
            "isvprodid": 1,
            "tcbLevels": [
                {"tcb": {"isvsvn": QE_SVN}, "tcbDate": _iso(start), "tcbStatus": "UpToDate"}
            ],
        }
        signed = [json.dumps(part, separators=(",", ":")) for part in (tcb, identity)]
        signatures = [_sign(self.keys["tcb"], part.encode()) for part in signed]
        chain = self._chain("tcb", "root")
        collateral = dcap_qvl.QuoteCollateralV3(
            pck_crl_issuer_chain=self._chain("ca", "root"),
            root_ca_crl=self._revocations("root", start, revoked),
            pck_crl=self._revocations("ca", start, revoked),
            tcb_info_issuer_chain=chain,
            tcb_info=signed[0],
            tcb_info_signature=signatures[0],
            qe_identity_issuer_chain=chain,
            qe_identity=signed[1],
            qe_identity_signature=signatures[1],
        )
        return str(collateral.to_json())

    @classmethod
    def _make(cls, now: int) -> World:
        keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in ROLES}
        start = _time(now) - BACKDATED
        root = _certificate("Root CA", keys["root"], start)
        ca = _certificate("PCK Processor CA", keys["ca"], start, root, keys["root"], path=0)
        pck = _certificate(
            "PCK Certificate", keys["pck"], start, ca, keys["ca"], path=None, sgx=_sgx_extension()
        )
        tcb = _certificate("TCB Signing", keys["tcb"], start, root, keys["root"], path=None)
        return cls(keys=keys, certificates={"root": root, "ca": ca, "pck": pck, "tcb": tcb})

    def _chain(self, *roles: str) -> str:
        return b"".join(_pem(self.certificates[role]) for role in roles).decode()

    def _revocations(self, issuer: str, start: dt.datetime, revoked: tuple[str, ...]) -> bytes:
        public = self.keys[issuer].public_key()
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificates[issuer].subject)
            .last_update(start)
            .next_update(start + BACKDATED + FRESH)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False)
        )
        for role in revoked:
            certificate = self.certificates[role]
            if certificate.issuer == self.certificates[issuer].subject:
                entry = x509.RevokedCertificateBuilder().revocation_date(start)
                entry = entry.serial_number(certificate.serial_number)
                builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(self.keys[issuer], hashes.SHA256()).public_bytes(Encoding.DER)


def _certificate(
    role: str,
    key: Key,
    start: dt.datetime,
    issuer: x509.Certificate | None = None,
    issuer_key: Key | None = None,
    *,
    path: int | None = 1,
    sgx: bytes | None = None,
) -> x509.Certificate:
    """One certificate; `path` None makes it an end entity, no issuer makes it self-signed."""
    authority = path is not None
    subject = _name(f"Myelin TEST SGX {role}")
    signer = issuer_key or key
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usage |= {"digital_signature": not authority}
    usage |= {"key_cert_sign": authority, "crl_sign": authority}
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + VALIDITY)
        .add_extension(x509.BasicConstraints(authority, path), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(identifier, critical=False)
    )
    if sgx is not None:
        extension = x509.UnrecognizedExtension(x509.ObjectIdentifier(_OID), sgx)
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Myelin simulator, protects nothing"),
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
        ]
    )


def _report(
    measurement: bytes, signer: bytes, data: bytes, attributes: bytes, *, product: int, svn: int
) -> bytes:
    """The 384 bytes of an SGX report body (SDM vol. 3D, REPORT)."""
    return struct.pack(
        "<16sI28x16s32s32x32s96xHH60x64s",
        CPUSVN,
        0,
        attributes,
        measurement,
        signer,
        product,
        svn,
        data,
    )


def _sgx_extension() -> bytes:
    """The SGX extension of a PCK certificate: PPID, TCB, PCEID, FMSPC, type (Intel's PCK spec)."""
    components = [
        _sequence(_oid(f"{_OID}.2.{number + 1}"), _integer(svn))
        for number, svn in enumerate(CPUSVN)
    ]
    components.append(_sequence(_oid(f"{_OID}.2.17"), _integer(PCESVN)))
    components.append(_sequence(_oid(f"{_OID}.2.18"), _tlv(4, CPUSVN)))
    return _sequence(
        _sequence(_oid(f"{_OID}.1"), _tlv(4, secrets.token_bytes(16))),
        _sequence(_oid(f"{_OID}.2"), _sequence(*components)),
        _sequence(_oid(f"{_OID}.3"), _tlv(4, bytes(2))),
        _sequence(_oid(f"{_OID}.4"), _tlv(4, FMSPC)),
        _sequence(_oid(f"{_OID}.5"), _tlv(10, bytes(1))),
    )


def _tlv(tag: int, value: bytes) -> bytes:
    length = len(value)
    if length < 0x80:
        return bytes([tag, length]) + value
    size = (length.bit_length() + 7) // 8
    return bytes([tag, 0x80 | size]) + length.to_bytes(size, "big") + value


def _sequence(*parts: bytes) -> bytes:
    return _tlv(0x30, b"".join(parts))


def _integer(value: int) -> bytes:
    return _tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _oid(dotted: str) -> bytes:
    first, second, *rest = (int(part) for part in dotted.split("."))
    encoded = bytearray([first * 40 + second])
    for arc in rest:
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        encoded += bytes(reversed(groups))
    return _tlv(6, bytes(encoded))


def _sign(key: Key, message: bytes) -> bytes:
    r, s = utils.decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: Any) -> bytes:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem


def _time(now: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(now, dt.UTC).replace(microsecond=0, tzinfo=None)


def _iso(time: dt.datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
