from __future__ import annotations

import hashlib
import hmac
import struct
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from parties import cases, party, vector_job, vectors
from parties import job as another_job

from myelin.errors import DataRefused, DocumentInvalid, PartyFileInvalid, SealedFileInvalid
from myelin.party import Party
from myelin.seal import (
    CHUNK,
    SealedKey,
    key_path,
    open_output,
    open_sealed,
    read_sealed,
    seal_records,
    seal_stream,
    seal_weights,
)

KEY, SALT = bytes([7] * 32), bytes([9] * 32)


def sealed(plaintext: bytes) -> bytes:
    stream = BytesIO()
    seal_stream([plaintext], len(plaintext), stream, key=KEY, salt=SALT)
    return stream.getvalue()


def by_the_page(data: bytes, key: bytes) -> bytes:
    """Open by docs/protocol.md alone: HKDF by hand, one AES-GCM call a chunk."""
    assert data[:16] == b"myelin/sealed/1\n"
    extracted = hmac.digest(data[16:48], key, "sha256")
    first = hmac.digest(extracted, b"myelin/sealed/1\x01", "sha256")
    second = hmac.digest(extracted, first + b"myelin/sealed/1\x02", "sha256")
    assert data[48:80] == second
    length, chunk, zero = struct.unpack("<QII", data[80:96])
    assert (chunk, zero) == (65_536, 0)
    body, plaintext = data[96:], b""
    pieces = [body[at : at + 65_552] for at in range(0, len(body), 65_552)]
    for index, piece in enumerate(pieces):
        nonce = struct.pack("<QI", index, index == len(pieces) - 1)
        plaintext += AESGCM(first).decrypt(nonce, piece, data[:96])
    assert len(plaintext) == length
    return plaintext


@pytest.mark.parametrize("length", [1, 15, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 200_000])
def test_sealed_file_is_what_the_page_says(length: int) -> None:
    plaintext = np.random.default_rng(length).bytes(length)
    data = sealed(plaintext)
    assert by_the_page(data, KEY) == plaintext
    assert b"".join(open_sealed(BytesIO(data), KEY)) == plaintext
    header, chunks = read_sealed(BytesIO(data))
    assert header + b"".join(chunks) == data


@given(st.lists(st.binary(max_size=90_000), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_pieces_do_not_matter(pieces: list[bytes]) -> None:
    plaintext = b"".join(pieces)
    stream = BytesIO()
    if not plaintext:
        with pytest.raises(DataRefused, match="0 bytes"):
            seal_stream(pieces, 0, stream, key=KEY, salt=SALT)
        return
    commitment = seal_stream(pieces, len(plaintext), stream, key=KEY, salt=SALT)
    assert stream.getvalue() == sealed(plaintext)
    assert commitment == hashlib.sha256(stream.getvalue()).digest()


@pytest.mark.parametrize("length", [99, 101])
def test_length_must_be_true(length: int) -> None:
    with pytest.raises(DataRefused, match="bytes, not"):
        seal_stream([bytes(100)], length, BytesIO(), key=KEY, salt=SALT)


@pytest.mark.parametrize("case", vectors("sealed")["valid"], ids=lambda case: case["name"])
def test_vectors(case: dict[str, Any]) -> None:
    pattern = (bytes(range(251)) * (case["length"] // 251 + 1))[: case["length"]]
    plaintext = bytes.fromhex(case["plaintext"]) if "plaintext" in case else pattern
    stream = BytesIO()
    key, salt = bytes.fromhex(case["key"]), bytes.fromhex(case["salt"])
    commitment = seal_stream([plaintext], len(plaintext), stream, key=key, salt=salt)
    assert commitment.hex() == case["commitment"]
    assert stream.getvalue()[:96].hex() == case["header"]
    assert case["sealed"] in (None, stream.getvalue().hex())


@pytest.mark.parametrize("case", cases("sealed"))
def test_invalid_vectors(case: dict[str, str]) -> None:
    with pytest.raises(SealedFileInvalid) as refused:
        list(open_sealed(BytesIO(bytes.fromhex(case["sealed"])), bytes.fromhex(case["key"])))
    assert refused.value.reason == case["reason"]


def test_every_damage_is_refused() -> None:
    data = sealed(bytes(range(40)))
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        for wrong in (bytes(changed), data[:at]):
            with pytest.raises(SealedFileInvalid):
                list(open_sealed(BytesIO(wrong), KEY))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ([1, 0, 2], "chunk-tag-wrong"),
        ([0, 0, 2], "chunk-tag-wrong"),
        ([0, 2], "chunk-tag-wrong"),
        ([0, 1], "chunk-tag-wrong"),
        ([0, 1, 2, 2], "chunk-order"),
    ],
)
def test_moved_chunks_are_refused(order: list[int], reason: str) -> None:
    data = sealed(np.random.default_rng(1).bytes(2 * CHUNK + 100))
    chunks = [data[96:][at : at + CHUNK + 16] for at in range(0, len(data) - 96, CHUNK + 16)]
    moved = data[:96] + b"".join(chunks[index] for index in order)
    with pytest.raises(SealedFileInvalid) as refused:
        list(open_sealed(BytesIO(moved), KEY))
    assert refused.value.reason == reason


def test_shorter_file_under_a_shorter_header_is_refused() -> None:
    data = sealed(bytes(2 * CHUNK))
    cut = data[:80] + struct.pack("<QII", CHUNK, CHUNK, 0) + data[96 : 96 + CHUNK + 16]
    with pytest.raises(SealedFileInvalid, match="chunk-tag-wrong"):
        list(open_sealed(BytesIO(cut), KEY))


@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(0, 30),
    st.sampled_from(["int", "float", "floats"]),
)
@settings(max_examples=30, deadline=None)
def test_records_are_laid_out_and_padded(
    count: int, shape: list[int], spare: int, kind: str
) -> None:
    random = np.random.default_rng(count)
    features = random.normal(size=(count, *shape)).astype(np.float32)
    labels: Any = {
        "int": np.arange(count, dtype=np.int32),
        "float": random.normal(size=count).astype(np.float32),
        "floats": random.normal(size=(count, 3)).astype(np.float32),
    }[kind]
    stream = BytesIO()
    made = seal_records(features, labels, stream, capacity=count + spare)
    plaintext = by_the_page(stream.getvalue(), made.key)
    record = 4 * int(np.prod(shape)) + labels[0].nbytes
    head = struct.pack("<8sIII44x", b"MYRECORD", count, count + spare, record)
    rows = b"".join(features[i].tobytes() + labels[i].tobytes() for i in range(count))
    assert plaintext == head + rows + bytes(spare * record)
    assert made.commitment == hashlib.sha256(stream.getvalue()).digest()


def test_size_hides_the_number_of_records(tmp_path: Path) -> None:
    for count in (1, 17, 100):
        features, labels = np.ones((count, 8), np.float32), np.ones(count, np.int32)
        seal_records(features, labels, tmp_path / f"{count}", capacity=100)
    assert len({(tmp_path / f"{count}").stat().st_size for count in (1, 17, 100)}) == 1


X, Y = np.ones((4, 3), np.float32), np.zeros(4, np.int32)


def with_nan(at: tuple[int, ...], value: float = float("nan")) -> np.ndarray[Any, Any]:
    changed = X.copy()
    changed[at] = value
    return changed


@pytest.mark.parametrize(
    ("features", "labels", "capacity", "message"),
    [
        (with_nan((2, 1)), Y, 4, "features row 2 column 1 is nan"),
        (with_nan((3, 0), float("-inf")), Y, 4, "features row 3 column 0 is -inf"),
        (X, np.array([0, 1, np.inf, 0], np.float32), 4, "labels row 2 column 0 is inf"),
        (X.astype(np.float64), Y, 4, "float64"),
        (X.astype(">f4"), Y, 4, "not float32"),
        (X[:, 0], Y, 4, "not float32"),
        (X[:0], Y[:0], 4, "not float32"),
        (X, Y.astype(np.int64), 4, "labels are int64"),
        (X, Y.reshape(2, 2), 4, "labels are int32"),
        (X, Y[:3], 4, "4 rows of features but 3 labels"),
        (X, Y, 3, "4 records do not fit the capacity 3"),
    ],
)
def test_refuses_data(
    tmp_path: Path, features: Any, labels: Any, capacity: int, message: str
) -> None:
    with pytest.raises(DataRefused, match=message):
        seal_records(features, labels, tmp_path / "data", capacity=capacity)
    assert not list(tmp_path.iterdir())


def test_late_mistake_is_named_by_its_row_and_leaves_nothing(tmp_path: Path) -> None:
    features = np.ones((50_000, 8), np.float32)
    features[43_210, 5] = np.nan
    with pytest.raises(DataRefused, match="row 43210 column 5"):
        seal_records(features, np.zeros(50_000, np.int32), tmp_path / "data", capacity=50_000)
    assert not list(tmp_path.iterdir())


def test_weights_round_trip_and_refusals() -> None:
    flat = np.linspace(-1, 1, 40_000, dtype=np.float32)
    stream = BytesIO()
    made = seal_weights(flat, stream)
    assert by_the_page(stream.getvalue(), made.key) == flat.tobytes()
    for wrong in (flat.reshape(2, -1), flat.astype(np.float64), flat[:0]):
        with pytest.raises(DataRefused, match="not flat float32"):
            seal_weights(wrong, BytesIO())
    flat[39_999] = np.inf
    with pytest.raises(DataRefused, match="row 39999"):
        seal_weights(flat, BytesIO())


def test_key_lies_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    made = seal_records(X, Y, path, capacity=4)
    assert SealedKey.load(key_path(path)) == made
    assert (tmp_path / "data.key").stat().st_mode & 0o777 == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["data", "data.key"]
    assert made.key.hex() not in repr(made)
    with pytest.raises(DataRefused, match="never overwritten"):
        seal_records(X, Y, path, capacity=4)
    (tmp_path / "data.key").chmod(0o644)
    with pytest.raises(PartyFileInvalid, match="chmod 600"):
        SealedKey.load(key_path(path))


def test_every_file_has_its_own_key() -> None:
    made = [seal_records(X, Y, BytesIO(), capacity=4) for _ in range(2)]
    assert made[0].key != made[1].key
    assert made[0].commitment != made[1].commitment


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    features = np.ones((20_000, 8), np.float32)
    labels = np.ones(20_000, np.int32)
    seal_records(features, labels, BytesIO(), capacity=30_000, progress=lambda *at: seen.append(at))
    total = 64 + 30_000 * 36
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    shape = (400_000, 32)
    features = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    labels = np.zeros(shape[0], np.int32)
    tracemalloc.start()
    made = seal_records(features, labels, tmp_path / "data", capacity=500_000)
    for _ in open_sealed(tmp_path / "data", made.key):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "data").stat().st_size > 60e6
    assert peak < 4e6


def test_output_vector_opens_only_for_its_receiver() -> None:
    case = {
        name: bytes.fromhex(value) if isinstance(value, str) else value
        for name, value in vectors("output").items()
    }
    secret = case["receiver"]
    receiver = Party.from_seeds(
        secret["name"],
        sign=bytes.fromhex(secret["sign_secret"]),
        hpke=bytes.fromhex(secret["hpke_seed"]),
    )
    job = vector_job()

    def opened(who: Party = receiver, **changes: Any) -> bytes:
        fields: dict[str, Any] = {
            "envelope": case["envelope"],
            "source": BytesIO(case["sealed"]),
            "job": job,
            "slot": "weights",
            "digest": case["digest"],
        }
        return open_output(who, **fields | changes)

    assert opened() == case["plaintext"]
    impostor = Party.generate(receiver.name)
    for changes, reason in (
        ({"who": party("a")}, "field-wrong"),
        ({"who": impostor}, "field-wrong"),
        ({"job": another_job()}, "field-wrong"),
        ({"slot": "score"}, "field-wrong"),
        ({"digest": bytes(32)}, "commitment-wrong"),
        ({"source": BytesIO(case["sealed"][:-1])}, "chunk-tag-wrong"),
    ):
        with pytest.raises(DocumentInvalid) as refused:
            opened(**changes)
        assert refused.value.reason == reason


def test_every_damage_to_an_output_is_refused() -> None:
    case = vectors("output")
    secret = case["receiver"]
    receiver = Party.from_seeds(
        secret["name"],
        sign=bytes.fromhex(secret["sign_secret"]),
        hpke=bytes.fromhex(secret["hpke_seed"]),
    )
    envelope = bytes.fromhex(case["envelope"])
    job = vector_job()
    for at in range(len(envelope)):
        changed = bytearray(envelope)
        changed[at] ^= 1 << at % 8
        for wrong in (bytes(changed), envelope[:at]):
            with pytest.raises(DocumentInvalid):
                open_output(
                    receiver,
                    wrong,
                    BytesIO(bytes.fromhex(case["sealed"])),
                    job=job,
                    slot="weights",
                    digest=bytes.fromhex(case["digest"]),
                )
