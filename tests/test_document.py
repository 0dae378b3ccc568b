from __future__ import annotations

import hashlib

import cbor2
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from hypothesis import given
from hypothesis import strategies as st
from parties import A, assert_all_refused

from myelin import document
from myelin.document import P256_ORDER, Envelope
from myelin.errors import DocumentInvalid

LEAVES = st.none() | st.integers(0, 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=20)
LISTS = st.lists(LEAVES, max_size=4)
VALUES = LEAVES | LISTS | st.dictionaries(st.text(max_size=8), LEAVES | LISTS)


def anything(value: object, where: str) -> None:
    pass


@given(VALUES)
def test_what_is_encoded_comes_back(value: document.Value) -> None:
    data = document.encode(value)
    assert document.decode(data, anything) == value
    assert cbor2.loads(data) == value


@given(st.binary(max_size=64))
def test_whatever_is_accepted_has_one_encoding(data: bytes) -> None:
    try:
        value = document.decode(data, anything)
    except DocumentInvalid:
        return
    assert document.encode(value) == data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("", "cbor-malformed"),
        ("18", "cbor-malformed"),
        ("62c328", "cbor-malformed"),
        ("5b7fffffffffffffff", "cbor-malformed"),
        ("0000", "cbor-malformed"),
        ("81" * 500, "cbor-malformed"),
        ("1800", "cbor-not-canonical"),
        ("9f01ff", "cbor-not-canonical"),
        ("5f41aaff", "cbor-not-canonical"),
        ("a2616101616101", "cbor-not-canonical"),
        ("a2616201616101", "field-wrong"),
        ("a10101", "field-wrong"),
        ("20", "field-wrong"),
        ("f4", "field-wrong"),
        ("f7", "field-wrong"),
        ("fb3ff8000000000000", "field-wrong"),
        ("c249ffffffffffffffffff", "field-wrong"),
        ("c600", "field-wrong"),
        ("81" * 9 + "00", "field-wrong"),
    ],
)
def test_outside_the_profile(data: str, reason: str) -> None:
    with pytest.raises(DocumentInvalid) as refused:
        document.decode(bytes.fromhex(data), anything)
    assert refused.value.reason == reason


def test_too_long() -> None:
    with pytest.raises(DocumentInvalid) as refused:
        document.decode(bytes(65_537), anything)
    assert refused.value.reason == "message-too-long"


@pytest.mark.parametrize("value", [1.5, -1, True, 2**64, {1: 2}, (1,)])
def test_encode_refuses_what_decode_would(value: object) -> None:
    with pytest.raises(DocumentInvalid):
        document.encode(value)  # type: ignore[arg-type]


def test_signature_is_plain_ecdsa_with_low_s() -> None:
    for number in range(20):
        message = bytes([number])
        signature = document.sign(A.signing_key, message)
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        assert s <= P256_ORDER // 2
        A.signing_key.public_key().verify(
            utils.encode_dss_signature(r, s), message, ec.ECDSA(hashes.SHA256())
        )
        document.verify(A.public.sign, message, signature)
        upper = signature[:32] + (P256_ORDER - s).to_bytes(32, "big")
        for wrong in (upper, bytes(64), signature[:63], signature + b"\0"):
            with pytest.raises(DocumentInvalid, match="signature-wrong"):
                document.verify(A.public.sign, message, wrong)


def test_envelope_signs_type_zero_body() -> None:
    made = Envelope.signed("myelin/test/1", {"n": 1}, A.signing_key)
    message = b"myelin/test/1\0" + bytes.fromhex("a1616e01")
    document.verify(A.public.sign, message, made.signature)
    again = Envelope.from_bytes(made.to_bytes(), "myelin/test/1")
    assert again.verified(A.public.sign) == bytes.fromhex("a1616e01")
    with pytest.raises(DocumentInvalid, match="type-wrong"):
        Envelope.from_bytes(made.to_bytes(), "myelin/grant/1")


def test_every_damage_to_an_envelope_is_refused() -> None:
    data = Envelope.signed("myelin/test/1", {"n": b"12345"}, A.signing_key).to_bytes()

    def use(changed: bytes) -> None:
        Envelope.from_bytes(changed, "myelin/test/1").verified(A.public.sign)

    use(data)
    assert_all_refused(data, use, DocumentInvalid)


def test_digest_is_sha256() -> None:
    assert document.digest(b"x") == hashlib.sha256(b"x").digest()
