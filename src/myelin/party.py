"""Parties: whoever sends, receives or approves, as two key pairs with a name.

A party signs with ECDSA P-256 and is sealed to with HPKE over X-Wing (ML-KEM-768 + X25519),
so that what is recorded today stays secret when P-256 and X25519 no longer do.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import ec, mlkem, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from myelin import document
from myelin.document import P256_ORDER, Envelope, Value
from myelin.errors import DocumentInvalid, PartyFileInvalid

HPKE_PUBLIC = 1216
HPKE_ENC = 1120

_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


@dataclass(frozen=True, kw_only=True)
class PublicParty:
    """What others know of a party: its name, signing key and sealing key."""

    name: str
    sign: bytes
    """SEC 1 uncompressed P-256 point, 65 bytes."""
    hpke: bytes
    """ML-KEM-768 key ‖ X25519 key, 1,216 bytes."""

    def __post_init__(self) -> None:
        """Refuse a name or keys that no document could hold."""
        document.name(self.name, "name")
        document.public_key(self.sign)
        sealing_key(self.hpke)

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of SHA-256 over both keys, to compare by telephone."""
        return document.digest(self.sign + self.hpke).hex()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the public file; refuses to overwrite."""
        lines = {"type": "myelin/party/1", "name": self.name}
        keys = {"sign": self.sign.hex(), "hpke": self.hpke.hex()}
        _write(Path(path), f"# Myelin public party {self.fingerprint}", lines | keys, 0o644)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PublicParty:
        """Read a public file; raises `PartyFileInvalid`."""
        fields = _read(Path(path), "myelin/party/1")
        try:
            return cls(name=fields["name"], sign=_hex(fields, "sign"), hpke=_hex(fields, "hpke"))
        except (DocumentInvalid, ValueError) as error:
            raise PartyFileInvalid(f"{path}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Party:
    """A party with its secret keys. Lives in one text file that the owner names."""

    name: str
    _sign: bytes = field(repr=False)
    _hpke: bytes = field(repr=False)

    @classmethod
    def generate(cls, name: str) -> Party:
        """Make fresh keys from the system's generator."""
        document.name(name, "name")
        scalar = secrets.randbelow(P256_ORDER - 1) + 1
        return cls(name=name, _sign=scalar.to_bytes(32, "big"), _hpke=secrets.token_bytes(32))

    @classmethod
    def from_seeds(cls, name: str, *, sign: bytes, hpke: bytes) -> Party:
        """Rebuild a party from its P-256 scalar and X-Wing seed, 32 bytes each."""
        document.name(name, "name")
        if len(sign) != 32 or not 0 < int.from_bytes(sign, "big") < P256_ORDER or len(hpke) != 32:
            raise PartyFileInvalid("the secret keys are not 32 bytes each in their range")
        return cls(name=name, _sign=sign, _hpke=hpke)

    @property
    def public(self) -> PublicParty:
        """What to give to the others."""
        sign = self.signing_key.public_key()
        return PublicParty(
            name=self.name,
            sign=sign.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint),
            hpke=_sealing_public(self._hpke),
        )

    @property
    def signing_key(self) -> ec.EllipticCurvePrivateKey:
        """The P-256 key."""
        return ec.derive_private_key(int.from_bytes(self._sign, "big"), ec.SECP256R1())

    def sign(self, domain: str, body: Value) -> bytes:
        """Sign a body into an envelope of the given type (docs/protocol.md)."""
        return Envelope.signed(domain, body, self.signing_key).to_bytes()

    def open(self, enc: bytes, ct: bytes, info: bytes) -> bytes:
        """Open what was HPKE-sealed to this party; raises `DocumentInvalid` hpke-failed."""
        mlkem_key, x25519_key = _sealing_secret(self._hpke)
        try:
            key = hpke.MLKEM768X25519PrivateKey(mlkem_key, x25519_key)
            return _SUITE.decrypt(enc + ct, key, info)
        except (InvalidTag, ValueError):
            raise DocumentInvalid(
                "hpke-failed", f"was not sealed to {self.name!r} with this context"
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key file with mode 0600; refuses to overwrite."""
        lines = {"type": "myelin/party-secret/1", "name": self.name}
        keys = {"sign": self._sign.hex(), "hpke": self._hpke.hex()}
        comment = f"# Secret keys of {self.public.fingerprint}: whoever reads them is this party."
        _write(Path(path), comment, lines | keys, 0o600)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Party:
        """Read a key file; refuses one that others can read. Raises `PartyFileInvalid`."""
        fields = read_secret(Path(path), "myelin/party-secret/1", ("name", "sign", "hpke"))
        try:
            return cls.from_seeds(
                fields["name"], sign=_hex(fields, "sign"), hpke=_hex(fields, "hpke")
            )
        except (DocumentInvalid, ValueError, PartyFileInvalid) as error:
            raise PartyFileInvalid(f"{path}: {error}") from None


def seal_to(hpke_key: bytes, info: bytes, plaintext: bytes) -> tuple[bytes, bytes]:
    """HPKE base mode, single shot, no AAD. Returns `enc` (1,120 bytes) and `ct`."""
    sealed = _SUITE.encrypt(plaintext, sealing_key(hpke_key), info)
    return sealed[:HPKE_ENC], sealed[HPKE_ENC:]


def sealing_key(data: bytes) -> hpke.MLKEM768X25519PublicKey:
    """Load a public sealing key; raises `DocumentInvalid` field-wrong."""
    if len(data) != HPKE_PUBLIC:
        raise DocumentInvalid("field-wrong", f"a sealing key has {HPKE_PUBLIC} bytes")
    try:
        return hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(data[:1184]),
            x25519.X25519PublicKey.from_public_bytes(data[1184:]),
        )
    except ValueError:
        raise DocumentInvalid("field-wrong", "a sealing key is not an X-Wing key") from None


def write_secret(path: Path, comment: str, fields: dict[str, str]) -> None:
    """Write a small text file of secrets with mode 0600; refuses to overwrite."""
    _write(path, comment, fields, 0o600)


def read_secret(path: Path, form: str, keys: tuple[str, ...]) -> dict[str, str]:
    """Read a secret file; refuses one that group or others can read."""
    return _read(path, form, keys, secret_mode=0o077)


def _sealing_secret(seed: bytes) -> tuple[mlkem.MLKEM768PrivateKey, x25519.X25519PrivateKey]:
    """Expand an X-Wing seed (draft-connolly-cfrg-xwing-kem §5.2)."""
    expanded = hashlib.shake_256(seed).digest(96)
    return (
        mlkem.MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        x25519.X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


def _sealing_public(seed: bytes) -> bytes:
    mlkem_key, x25519_key = _sealing_secret(seed)
    return mlkem_key.public_key().public_bytes_raw() + x25519_key.public_key().public_bytes_raw()


def _write(path: Path, comment: str, fields: dict[str, str], mode: int) -> None:
    # JSON strings of printable text are TOML basic strings.
    lines = [comment, *(f"{key} = {json.dumps(value)}" for key, value in fields.items()), ""]
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, mode)
    except FileExistsError:
        raise PartyFileInvalid(f"{path} exists; it is never overwritten, name another") from None
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write("\n".join(lines))
        file.flush()
        os.fsync(file.fileno())


def _read(
    path: Path,
    form: str,
    keys: tuple[str, ...] = ("name", "sign", "hpke"),
    *,
    secret_mode: int = 0,
) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & secret_mode:
                raise PartyFileInvalid(
                    f"{path} has mode {mode:04o}: others can read it; run chmod 600 {path}"
                )
            fields = tomllib.loads(file.read(65_536).decode())
    except FileNotFoundError:
        raise PartyFileInvalid(f"{path} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PartyFileInvalid(f"{path}: {error}") from None
    if fields.get("type") != form:
        raise PartyFileInvalid(f"{path}: type is {fields.get('type')!r}, not {form!r}")
    for key in sorted({"type", *keys} ^ fields.keys()):
        raise PartyFileInvalid(
            f"{path}: key {key!r} is {'unknown' if key in fields else 'missing'}"
        )
    for key, value in fields.items():
        if not isinstance(value, str):
            raise PartyFileInvalid(f"{path}: {key} is not a string")
    return fields


def _hex(fields: dict[str, str], key: str) -> bytes:
    try:
        return bytes.fromhex(fields[key])
    except ValueError:
        raise PartyFileInvalid(f"{key} is not hex") from None
