from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import A, B, vectors

from myelin.errors import DocumentInvalid, PartyFileInvalid
from myelin.party import Party, PublicParty, seal_to


def test_files_round_trip(tmp_path: Path) -> None:
    made = Party.generate('Hôpital "A" \\ 1')
    made.save(tmp_path / "a.key")
    made.public.save(tmp_path / "a.pub")
    assert Party.load(tmp_path / "a.key") == made
    assert PublicParty.load(tmp_path / "a.pub") == made.public
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600


def test_never_overwrites(tmp_path: Path) -> None:
    A.save(tmp_path / "key")
    with pytest.raises(PartyFileInvalid, match="never overwritten"):
        B.save(tmp_path / "key")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PartyFileInvalid, match="never overwritten"):
        B.save(tmp_path / "link")
    assert Party.load(tmp_path / "key") == A


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_refuses_a_key_that_others_can_read(tmp_path: Path, mode: int) -> None:
    A.save(tmp_path / "key")
    os.chmod(tmp_path / "key", mode)
    with pytest.raises(PartyFileInvalid, match="chmod 600"):
        Party.load(tmp_path / "key")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("party-secret/1", "party-secret/2"), "type is"),
        (("name = ", "nome = "), "unknown|missing"),
        (('name = "', 'extra = "x"\nname = "'), "unknown"),
        (('sign = "', 'sign = "zz'), "not hex"),
        (('sign = "', 'sign = "00'), "32 bytes"),
        (('sign = "', "sign = "), "."),
    ],
)
def test_refuses_a_changed_key_file(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "key"
    A.save(path)
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(PartyFileInvalid, match=message):
        Party.load(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PartyFileInvalid, match="nothing does not exist"):
        PublicParty.load(tmp_path / "nothing")


def test_secrets_stay_out_of_repr() -> None:
    assert A._sign.hex() not in repr(A)
    assert str(A._sign) not in repr(A)


@pytest.mark.parametrize("name", ["", "x" * 65, "ü" * 33, "a\nb", "a\x1b[31m"])
def test_refuses_names(name: str) -> None:
    with pytest.raises(DocumentInvalid, match="printable"):
        Party.generate(name)


@given(st.binary(max_size=200), st.binary(max_size=60))
@settings(max_examples=20)
def test_sealed_to_a_party_opens_only_there_and_so(plaintext: bytes, info: bytes) -> None:
    enc, ct = seal_to(A.public.hpke, info, plaintext)
    assert len(enc) == 1120
    assert len(ct) == len(plaintext) + 16
    assert A.open(enc, ct, info) == plaintext
    altered = bytes([enc[0] ^ 1]) + enc[1:]
    for who, args in ((B, (enc, ct, info)), (A, (enc, ct, info + b"x")), (A, (altered, ct, info))):
        with pytest.raises(DocumentInvalid, match="hpke-failed"):
            who.open(*args)


def test_sealing_key_is_xwing_of_the_seed() -> None:
    """First and last bytes of the first test vector of draft-connolly-cfrg-xwing-kem."""
    seed = "7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26"
    made = Party.from_seeds("x", sign=bytes([1] * 32), hpke=bytes.fromhex(seed))
    assert made.public.hpke.hex().startswith("e2236b35a8c24b39b10aa1323a96a919")
    assert made.public.hpke.hex().endswith("cd049040ef6534")


def test_vector_secrets_give_their_public_keys() -> None:
    for secret in vectors("job")["parties"]:
        made = Party.from_seeds(
            secret["name"],
            sign=bytes.fromhex(secret["sign_secret"]),
            hpke=bytes.fromhex(secret["hpke_seed"]),
        )
        assert made.public.hpke.hex() == secret["hpke"]
        assert made.public.sign.hex() == secret["sign"]


@pytest.mark.parametrize("length", [0, 1215, 1217])
def test_refuses_sealing_keys_of_other_lengths(length: int) -> None:
    with pytest.raises(DocumentInvalid, match="1216 bytes"):
        PublicParty(name="x", sign=A.public.sign, hpke=bytes(length))


def test_refuses_keys_that_are_none() -> None:
    with pytest.raises(DocumentInvalid, match="X-Wing"):
        PublicParty(name="x", sign=A.public.sign, hpke=b"\xff" * 1216)
    with pytest.raises(DocumentInvalid, match="not a point"):
        PublicParty(name="x", sign=b"\4" + bytes(64), hpke=A.public.hpke)


def test_library_agrees_on_the_parts() -> None:
    """The public key is ML-KEM-768's, then X25519's, as the library composes them."""
    parts = hpke.MLKEM768X25519PublicKey(
        mlkem.MLKEM768PublicKey.from_public_bytes(A.public.hpke[:1184]),
        x25519.X25519PublicKey.from_public_bytes(A.public.hpke[1184:]),
    )
    suite = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)
    sealed = suite.encrypt(b"hello", parts, b"info")
    assert A.open(sealed[:1120], sealed[1120:], b"info") == b"hello"
