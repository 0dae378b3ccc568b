"""Deterministic CBOR documents and the signed envelope (docs/protocol.md).

Only what the protocol needs exists here: unsigned integers, bytes, text, lists, maps with text
keys and null. Whatever is not the one canonical encoding of such a value is refused, so that a
document and its digest stand for each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from myelin.errors import DocumentInvalid

Value: TypeAlias = "int | bytes | str | list[Value] | dict[str, Value] | None"

Kind: TypeAlias = Callable[[Any, str], None]
"""Checks that a decoded value is of one kind; raises `DocumentInvalid`, naming the place."""

DOCUMENT_LIMIT = 65_536
"""The most bytes that a job may have, and with it every document that is not a bundle."""

P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def digest(data: bytes) -> bytes:
    """SHA-256 of `data`."""
    return hashlib.sha256(data).digest()


def encode(value: Value) -> bytes:
    """Encode a value by the rules of RFC 8949 §4.2.1."""
    _check_profile(value)
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes, kind: Kind, *, limit: int = DOCUMENT_LIMIT) -> Any:
    """Decode one document and check it against its schema.

    Raises `DocumentInvalid` with the reason `message-too-long`, `cbor-malformed` (not CBOR, or
    followed by more bytes), `cbor-not-canonical`, `type-wrong`, `field-wrong` (keys out of order
    included) or `limit-exceeded`.
    """
    if len(data) > limit:
        raise DocumentInvalid("message-too-long", f"{len(data)} bytes where {limit} are allowed")
    try:
        value = cbor2.loads(data)
    except Exception as error:  # decoders of tags raise whatever their types raise
        raise DocumentInvalid("cbor-malformed", str(error) or type(error).__name__) from None
    _check_profile(value)
    canonical = cbor2.dumps(value, canonical=True)
    if data != canonical:
        if data.startswith(canonical):
            raise DocumentInvalid("cbor-malformed", "bytes follow the document")
        if data == cbor2.dumps(value):
            raise DocumentInvalid("field-wrong", "the keys of a map are out of order")
        raise DocumentInvalid("cbor-not-canonical", "the bytes are not the shortest encoding")
    kind(value, "document")
    return value


def _check_profile(value: object, depth: int = 8) -> None:
    if depth == 0:
        raise DocumentInvalid("field-wrong", "nested too deeply")
    match value:
        case bool():
            raise DocumentInvalid("field-wrong", "a boolean")
        case None | bytes() | str():
            return
        case int() if 0 <= value < 2**64:
            return
        case list():
            for item in value:
                _check_profile(item, depth - 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise DocumentInvalid("field-wrong", f"a map key {key!r}")
                _check_profile(item, depth - 1)
        case _:
            raise DocumentInvalid("field-wrong", f"a value of type {type(value).__name__}")


# Kinds: the words of a schema.


def octets(length: int | None = None) -> Kind:
    """Bytes, of exactly `length` where given."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, bytes):
            raise DocumentInvalid("field-wrong", f"{where} is not bytes")
        if length is not None and len(value) != length:
            raise DocumentInvalid("field-wrong", f"{where} has {len(value)} bytes, not {length}")

    return check


def unsigned(most: int = 2**64 - 1, *, least: int = 0) -> Kind:
    """An unsigned integer in `least … most`."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, int) or not least <= value <= most:
            raise DocumentInvalid("field-wrong", f"{where} is {value!r}, not in {least} … {most}")

    return check


def text(*words: str) -> Kind:
    """Text, one of `words` where given."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, str):
            raise DocumentInvalid("field-wrong", f"{where} is not text")
        if words and value not in words:
            raise DocumentInvalid("field-wrong", f"{where} is {value!r}, not {' or '.join(words)}")

    return check


def label(word: str) -> Kind:
    """The `type` of a document."""

    def check(value: Any, where: str) -> None:
        if value != word:
            raise DocumentInvalid("type-wrong", f"{where} is {value!r}, not {word!r}")

    return check


def name(value: Any, where: str) -> None:
    """The name of a party: 1–64 bytes of UTF-8, nothing that a terminal would obey."""
    text()(value, where)
    if not 1 <= len(value.encode()) <= 64 or not value.isprintable():
        raise DocumentInvalid("field-wrong", f"{where} is {value!r}: 1 to 64 printable bytes")


def optional(kind: Kind) -> Kind:
    """Null or `kind`."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            kind(value, where)

    return check


def listing(kind: Kind, most: int) -> Kind:
    """A list of at most `most` values of one kind."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list):
            raise DocumentInvalid("field-wrong", f"{where} is not a list")
        if len(value) > most:
            raise DocumentInvalid("limit-exceeded", f"{where} has {len(value)} entries, not {most}")
        for number, item in enumerate(value):
            kind(item, f"{where}[{number}]")

    return check


def record(fields: Mapping[str, Kind]) -> Kind:
    """A map with exactly these keys."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise DocumentInvalid("field-wrong", f"{where} is not a map")
        if "type" in fields and "type" in value:
            fields["type"](value["type"], f"{where}.type")
        for key in sorted(fields.keys() ^ value.keys()):
            how = "is missing" if key in fields else "is unknown"
            raise DocumentInvalid("field-wrong", f"{where}.{key} {how}")
        for key, kind in fields.items():
            kind(value[key], f"{where}.{key}")

    return check


# Signatures: ECDSA P-256 over SHA-256, r ‖ s, s in the lower half.


def sign(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Sign; 64 bytes r ‖ s. Deterministic (RFC 6979), so a weak generator leaks no key."""
    algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    r, s = utils.decode_dss_signature(key.sign(message, algorithm))
    return r.to_bytes(32, "big") + min(s, P256_ORDER - s).to_bytes(32, "big")


def verify(key: bytes, message: bytes, signature: bytes) -> None:
    """Check a signature by the uncompressed point `key`; `DocumentInvalid` signature-wrong."""
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if len(signature) != 64 or not 0 < r < P256_ORDER or not 0 < s <= P256_ORDER // 2:
        raise DocumentInvalid("signature-wrong", "not 64 bytes r ‖ s with s in the lower half")
    try:
        public_key(key).verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise DocumentInvalid(
            "signature-wrong", f"does not verify by the key {key[1:9].hex()}…"
        ) from None


def public_key(key: bytes) -> ec.EllipticCurvePublicKey:
    """Load a SEC 1 uncompressed point of P-256; raises `DocumentInvalid` field-wrong."""
    if len(key) != 65 or key[0] != 4:
        raise DocumentInvalid("field-wrong", "a signing key is an uncompressed point of 65 bytes")
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), key)
    except ValueError:
        raise DocumentInvalid("field-wrong", "a signing key is not a point of P-256") from None


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """A signed document whose signature has not been checked yet."""

    domain: str
    claimed: bytes
    """The body as it came. Read it only to find the key for `verified`."""
    signature: bytes

    @classmethod
    def from_bytes(cls, data: bytes, domain: str, *, limit: int = DOCUMENT_LIMIT) -> Envelope:
        """Parse an envelope of the given type, the domain label; raises `DocumentInvalid`."""
        fields = decode(data, _envelope(domain), limit=limit)
        return cls(domain=domain, claimed=fields["body"], signature=fields["signature"])

    @classmethod
    def signed(cls, domain: str, body: Value, key: ec.EllipticCurvePrivateKey) -> Envelope:
        """Encode and sign a body."""
        encoded = encode(body)
        signature = sign(key, _message(domain, encoded))
        return cls(domain=domain, claimed=encoded, signature=signature)

    def to_bytes(self) -> bytes:
        """Encode; the inverse of `from_bytes`."""
        return encode({"body": self.claimed, "type": self.domain, "signature": self.signature})

    def verified(self, key: bytes) -> bytes:
        """Return the body if `key` (65 bytes) signed it, else `DocumentInvalid`."""
        verify(key, _message(self.domain, self.claimed), self.signature)
        return self.claimed


def _envelope(domain: str) -> Kind:
    return record({"body": octets(), "type": label(domain), "signature": octets(64)})


def _message(domain: str, body: bytes) -> bytes:
    return domain.encode() + b"\0" + body
