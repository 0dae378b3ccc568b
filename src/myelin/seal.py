"""Sealed files: data encrypted once, padded to a public size, readable where a grant goes.

The format is docs/protocol.md, "Sealed file". Everything streams: memory does not grow with the
data. A fresh key is drawn for every file and kept beside it in `FILE.key`, which stays with the
owner; `myelin.grant` later releases it to an appraised enclave.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hmac import compare_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from myelin import document
from myelin.document import Kind
from myelin.errors import DataRefused, PartyFileInvalid, SealedFileInvalid
from myelin.features import BYTES
from myelin.party import HPKE_ENC, Party, read_secret, write_secret

if TYPE_CHECKING:
    from myelin.job import Job

MAGIC = b"myelin/sealed/1\n"
HEADER = 96
CHUNK = 65_536
TAG = 16
RECORD_MAGIC = b"MYRECORD"
RECORD_HEADER = 64
MOST_RECORDS = 2**32 - 1

Place: TypeAlias = "str | os.PathLike[str] | BinaryIO"
"""A path, or a binary stream such as a socket or an object in remote storage."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the plaintext bytes done and all of them."""

OUTPUT: Kind = document.record(
    {
        "ct": document.octets(),
        "enc": document.octets(HPKE_ENC),
        "job": document.octets(32),
        "slot": document.text("weights", "score"),
        "type": document.label("myelin/output/1"),
        "party": document.unsigned(15),
    }
)


@dataclass(frozen=True, kw_only=True)
class SealedKey:
    """The secret of one sealed file, and the commitment to its bytes."""

    key: bytes = field(repr=False)
    """32 bytes; opens the file."""
    commitment: bytes
    """SHA-256 of the whole sealed file."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write with mode 0600; refuses to overwrite."""
        fields = {"key": self.key.hex(), "commitment": self.commitment.hex()}
        comment = "# Opens one sealed file. Keep it; it is released only by a grant."
        write_secret(Path(path), comment, {"type": "myelin/sealed-key/1"} | fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SealedKey:
        """Read; refuses a file that others can read. Raises `PartyFileInvalid`."""
        fields = read_secret(Path(path), "myelin/sealed-key/1", ("key", "commitment"))
        try:
            made = cls(**{name: bytes.fromhex(fields[name]) for name in ("key", "commitment")})
        except ValueError:
            raise PartyFileInvalid(f"{path}: key and commitment are hex") from None
        if len(made.key) != 32 or len(made.commitment) != 32:
            raise PartyFileInvalid(f"{path}: key and commitment have 32 bytes each")
        return made


def seal_records(
    features: npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int32] | npt.NDArray[np.float32],
    destination: Place,
    *,
    capacity: int,
    progress: Progress | None = None,
) -> SealedKey:
    """Seal a data set for the slot `records` or `test`, padded to `capacity` records.

    features: float32, float16 or uint8 [n, …] as the image's records keep them, finite;
    memory-mapped arrays are read block by block.
    labels: int32 [n], or float32 [n] or [n, outputs], finite.
    A path gets `FILE.key` beside it. Raises `DataRefused`, naming row and column.
    """
    _check_records(features, labels, capacity)
    count = len(features)
    record = _row_bytes(features) + _row_bytes(labels)
    head = struct.pack("<8sIII44x", RECORD_MAGIC, count, capacity, record)

    def plaintext() -> Iterator[bytes]:
        yield head
        rows = max(1, CHUNK // record)
        for first in range(0, count, rows):
            block = slice(first, first + rows)
            yield _records(features[block], labels[block], first)
        padding = (capacity - count) * record
        while padding:
            yield bytes(min(padding, CHUNK))
            padding -= min(padding, CHUNK)

    return _seal_to(destination, RECORD_HEADER + capacity * record, plaintext(), progress)


def seal_weights(
    weights: npt.NDArray[np.float32], destination: Place, *, progress: Progress | None = None
) -> SealedKey:
    """Seal flat weights, float32 [D], finite. Raises `DataRefused`."""
    if weights.dtype != np.float32 or weights.ndim != 1 or not len(weights):
        raise DataRefused(f"weights are {weights.dtype} {weights.shape}, not flat float32 [D]")
    _refuse_non_finite(weights.reshape(-1, 1), "weights", 0)
    plaintext = (weights[i : i + CHUNK].tobytes() for i in range(0, len(weights), CHUNK))
    return _seal_to(destination, weights.nbytes, plaintext, progress)


def seal_stream(
    plaintext: Iterable[bytes],
    length: int,
    stream: BinaryIO,
    *,
    key: bytes,
    salt: bytes,
    progress: Progress | None = None,
) -> bytes:
    """Write one sealed file of `length` plaintext bytes; returns its commitment.

    `key` and `salt` have 32 bytes and are used for this file only.
    """
    aead, key_commitment = _derive(key, salt)
    header = MAGIC + salt + key_commitment + struct.pack("<QII", length, CHUNK, 0)
    commitment = hashlib.sha256(header)
    stream.write(header)
    chunks = (length + CHUNK - 1) // CHUNK
    done = index = 0
    pending = bytearray()
    for piece in plaintext:
        pending += piece
        while index < chunks and len(pending) >= (size := min(CHUNK, length - done)):
            sealed = aead.encrypt(_nonce(index, chunks), bytes(pending[:size]), header)
            del pending[:size]
            commitment.update(sealed)
            stream.write(sealed)
            done += size
            index += 1
            if progress:
                progress(done, length)
    if done != length or pending or not length:
        raise DataRefused(f"the plaintext has {done + len(pending)} bytes, not {length}")
    return commitment.digest()


def read_sealed(source: Place) -> tuple[bytes, Iterator[bytes]]:
    """Split a sealed file into its header and its sealed chunks, without opening it.

    The iterator reads as it goes. Raises `SealedFileInvalid`.
    """
    with _reading(source) as stream:
        header = stream.read(HEADER)
    _header(header)
    return header, _chunks(source, header)


def open_sealed(source: Place, key: bytes) -> Iterator[bytes]:
    """Open a sealed file; yields authenticated plaintext, chunk by chunk.

    Only when the iterator ends is it sure that nothing was cut off. Raises `SealedFileInvalid`.
    """
    with _reading(source) as stream:
        header = stream.read(HEADER)
        length, salt, key_commitment = _header(header)
        aead, expected = _derive(key, salt)
        if not compare_digest(key_commitment, expected):
            raise SealedFileInvalid("key-commitment-wrong", "this key is not the file's key")
        chunks = (length + CHUNK - 1) // CHUNK
        for index, sealed in enumerate(_sealed_chunks(stream, length)):
            try:
                yield aead.decrypt(_nonce(index, chunks), sealed, header)
            except InvalidTag:
                raise SealedFileInvalid(
                    "chunk-tag-wrong", f"chunk {index} was altered or moved"
                ) from None


def open_output(
    party: Party, envelope: bytes, source: Place, *, job: Job, slot: str, digest: bytes
) -> bytes:
    """Open what an enclave sealed to `party`: the plaintext of slot `slot` of a job.

    envelope: the output envelope; source: the sealed file; digest: SHA-256 of the plaintext, as
    the verified receipt states it. Raises `DocumentInvalid` and `SealedFileInvalid`.
    """
    fields = document.decode(envelope, OUTPUT)
    if fields["job"] != job.digest or fields["slot"] != slot:
        raise SealedFileInvalid("field-wrong", "the output is of another job or slot")
    receiver = job.parties[fields["party"]] if fields["party"] < len(job.parties) else None
    if receiver != party.public:
        raise SealedFileInvalid("field-wrong", f"the output is not for {party.name!r}")
    inner = party.open(fields["enc"], fields["ct"], b"myelin/output/1\0" + job.digest)
    key = document.decode(inner, document.record({"key": document.octets(32)}))["key"]
    plaintext = b"".join(open_sealed(source, key))
    if document.digest(plaintext) != digest:
        raise SealedFileInvalid("commitment-wrong", "the output is not what the receipt states")
    return plaintext


# Records


def _check_records(features: npt.NDArray[Any], labels: npt.NDArray[Any], capacity: int) -> None:
    known = any(features.dtype == np.dtype(name) for name in BYTES)
    if not known or features.ndim < 2 or not features.size:
        raise DataRefused(
            f"features are {features.dtype} {features.shape}, not float32, float16 or uint8 "
            "[n, …] as the image takes them; convert by .astype(numpy.float32)"
        )
    if not (
        (labels.dtype == np.int32 and labels.ndim == 1)
        or (labels.dtype == np.float32 and labels.ndim in (1, 2) and labels.size)
    ):
        raise DataRefused(
            f"labels are {labels.dtype} {labels.shape}, not int32 [n] or float32 [n, outputs]"
        )
    if len(labels) != len(features):
        raise DataRefused(f"{len(features)} rows of features but {len(labels)} labels")
    if not 1 <= capacity <= MOST_RECORDS:
        raise DataRefused(f"the capacity is {capacity}: it must be from 1 to {MOST_RECORDS}")
    if len(features) > capacity:
        raise DataRefused(
            f"{len(features)} records do not fit the capacity {capacity} that the job states"
        )


def _records(features: npt.NDArray[Any], labels: npt.NDArray[Any], first: int) -> bytes:
    flat = np.ascontiguousarray(features).reshape(len(features), -1)
    answers = np.ascontiguousarray(labels).reshape(len(labels), -1)
    if flat.dtype != np.uint8:
        _refuse_non_finite(flat, "features", first)
    if answers.dtype == np.float32:
        _refuse_non_finite(answers, "labels", first)
    return np.hstack([flat.view(np.uint8), answers.view(np.uint8)]).tobytes()


def _refuse_non_finite(values: npt.NDArray[Any], what: str, first: int) -> None:
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        row, column = wrong[0]
        raise DataRefused(
            f"{what} row {first + row} column {column} is {values[row, column]}, not a finite "
            "number; fill in or leave out missing values before sealing"
        )


def _row_bytes(array: npt.NDArray[Any]) -> int:
    return array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))


# Files


def _seal_to(
    destination: Place, length: int, plaintext: Iterable[bytes], progress: Progress | None
) -> SealedKey:
    key, salt = secrets.token_bytes(32), secrets.token_bytes(32)
    if not isinstance(destination, str | os.PathLike):
        made = seal_stream(plaintext, length, destination, key=key, salt=salt, progress=progress)
        return SealedKey(key=key, commitment=made)
    path = Path(destination)
    for taken in (path, key_path(path)):
        if taken.exists():
            raise DataRefused(f"{taken} exists; a sealed file is never overwritten, name another")
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            made = seal_stream(plaintext, length, stream, key=key, salt=salt, progress=progress)
            stream.flush()
            os.fsync(stream.fileno())
        sealed = SealedKey(key=key, commitment=made)
        sealed.save(key_path(path))  # first the key: a file without one would be lost
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    return sealed


def sealed_size(length: int) -> int:
    """Bytes of the sealed file of `length` plaintext bytes."""
    return HEADER + length + TAG * ((length + CHUNK - 1) // CHUNK)


def key_path(path: str | os.PathLike[str]) -> Path:
    """Where the key of a sealed file lies: `FILE.key`."""
    return Path(path).with_name(Path(path).name + ".key")


def _derive(key: bytes, salt: bytes) -> tuple[AESGCM, bytes]:
    hkdf = HKDF(algorithm=hashes.SHA256(), length=64, salt=salt, info=b"myelin/sealed/1")
    derived = hkdf.derive(key)
    return AESGCM(derived[:32]), derived[32:]


def _nonce(index: int, chunks: int) -> bytes:
    return struct.pack("<QI", index, int(index == chunks - 1))


def _header(header: bytes) -> tuple[int, bytes, bytes]:
    """Check the 96 bytes; returns plaintext length, salt, key commitment."""
    if len(header) != HEADER or header[:16] != MAGIC:
        raise SealedFileInvalid("sealed-header-wrong", "this is not a sealed file")
    length, chunk, zero = struct.unpack_from("<QII", header, 80)
    if chunk != CHUNK or zero or not length:
        raise SealedFileInvalid("sealed-header-wrong", "the lengths in the header are wrong")
    return length, header[16:48], header[48:80]


def _chunks(source: Place, header: bytes) -> Iterator[bytes]:
    length, _, _ = _header(header)
    with _reading(source) as stream:
        if isinstance(source, str | os.PathLike) and stream.read(HEADER) != header:
            raise SealedFileInvalid("sealed-header-wrong", "the file changed while it was read")
        yield from _sealed_chunks(stream, length)


def _sealed_chunks(stream: BinaryIO, length: int) -> Iterator[bytes]:
    left = length
    index = 0
    while left:
        size = min(left, CHUNK) + TAG
        sealed = stream.read(size)
        if len(sealed) != size:
            raise SealedFileInvalid("chunk-tag-wrong", f"the file ends inside chunk {index}")
        yield sealed
        left -= size - TAG
        index += 1
    if stream.read(1):
        raise SealedFileInvalid("chunk-order", "bytes follow the last chunk")


@contextmanager
def _reading(source: Place) -> Iterator[BinaryIO]:
    if isinstance(source, str | os.PathLike):
        with Path(source).open("rb") as stream:
            yield stream
    else:
        yield source
