"""Write the vectors of docs/protocol.md beside this file: `python vectors/protocol/generate.py`.

Keys come from labels, signatures are deterministic, so only HPKE ciphertexts, the simulator's
world and what is made from them change from run to run. Bytes are hex. An `invalid` entry names the
`reason` of docs/protocol.md for which it must be refused.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import cbor2
from cryptography.hazmat.primitives.asymmetric import ec

from myelin import document, receipt
from myelin.document import P256_ORDER, Envelope, Value
from myelin.evidence import Evidence, report_data
from myelin.evidence.simulator import World
from myelin.job import ImageReference, Job
from myelin.party import Party, seal_to
from myelin.privacy import Privacy
from myelin.seal import seal_stream

HERE = Path(__file__).parent
NOW = 1_790_000_000


def main() -> None:
    """Write every file."""
    job = example_job()
    write("job", job_vectors(job))
    write("approval", approval_vectors(job))
    write("grant", grant_vectors(job))
    write("sealed", sealed_vectors())
    write("report-data", report_data_vectors(job))
    receipts = receipt_vectors(job)
    write("receipt", receipts)
    write("evidence", evidence_vectors(receipts))
    write("output", output_vectors(job))


def h(label: str) -> bytes:
    """32 bytes from a label."""
    return hashlib.sha256(label.encode()).digest()


def party(name: str) -> Party:
    """A party whose secrets come from its name."""
    return Party.from_seeds(name, sign=h(f"{name} sign"), hpke=h(f"{name} hpke"))


A, B, T, R = (party(name) for name in ("hospital-a", "hospital-b", "tester", "researcher"))
OTHER = party("stranger")
INSTANCE = party("instance")


def secrets_of(of: Party) -> dict[str, str]:
    """P-256 scalar and X-Wing seed, with the public keys."""
    public = of.public
    return {
        "name": of.name,
        "sign_secret": h(f"{of.name} sign").hex(),
        "hpke_seed": h(f"{of.name} hpke").hex(),
        "sign": public.sign.hex(),
        "hpke": public.hpke.hex(),
    }


def example_job() -> Job:
    """Two owners, a test set, one receiver, a public score."""
    return Job.draft(
        image=ImageReference(digest=h("image"), measurement=h("measurement")),
        weights=h("weights"),
        privacy=Privacy.for_records(
            300, noise_multiplier=2.5, max_grad_norm=1.0, sample_rate=0.125, steps=100, delta=1e-5
        ),
        sends={"records": {A.public: 100, B.public: 200}, "test": {T.public: 50}},
        receives={"weights": [R.public], "score": [None]},
    )


def fields_of(job: Job) -> dict[str, Any]:
    """The decoded map, to be spoilt."""
    return document.decode(job.to_bytes(), lambda value, where: None)


def job_vectors(job: Job) -> dict[str, Any]:  # noqa: PLR0915 - a list of cases
    """A job and everything that is not one."""
    data = job.to_bytes()
    invalid: list[dict[str, str]] = []

    def refuse(name: str, reason: str, made: bytes) -> None:
        invalid.append({"name": name, "reason": reason, "job": made.hex()})

    def spoil(name: str, reason: str, *path: str | int, to: Any) -> None:
        fields = fields_of(job)
        place: Any = fields
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        refuse(name, reason, document.encode(fields))

    refuse("empty", "cbor-malformed", b"")
    refuse("cut short", "cbor-malformed", data[:-1])
    refuse("trailing byte", "cbor-malformed", data + b"\0")
    refuse(
        "text that is not UTF-8", "cbor-malformed", data.replace(b"hospital-a", b"hospital-\xff")
    )
    head = b"\x64type\x6cmyelin/job/1"
    assert head in data
    refuse("long length", "cbor-not-canonical", data.replace(head, b"\x78\x04" + head[1:]))
    refuse("indefinite map", "cbor-not-canonical", b"\xbf" + data[1:] + b"\xff")
    refuse("keys out of order", "field-wrong", b"\xa7" + data[1 + len(head) :] + head)
    refuse("float", "field-wrong", data.replace(b"\x65steps\x18\x64", b"\x65steps\xf9\x56\x40"))
    refuse("tag", "field-wrong", data.replace(b"\x65steps\x18\x64", b"\x65steps\xc6\x18\x64"))
    refuse("too long", "message-too-long", bytes(65_537))
    spoil("other type", "type-wrong", "type", to="myelin/job/2")
    missing = fields_of(job)
    del missing["weights"]
    refuse("missing key", "field-wrong", document.encode(missing))
    refuse("unknown key", "field-wrong", document.encode(fields_of(job) | {"extra": 1}))
    spoil("short digest", "field-wrong", "image", "digest", to=bytes(31))
    spoil("unknown slot", "field-wrong", "sends", 0, "slot", to="secrets")
    spoil("empty name", "field-wrong", "parties", 0, "name", to="")
    spoil("long name", "field-wrong", "parties", 0, "name", to="n" * 65)
    spoil("other sampler", "field-wrong", "privacy", "sampler", to="shuffle")
    spoil("other relation", "field-wrong", "privacy", "neighboring_relation", to="replace-one")
    sends = fields_of(job)["sends"]
    spoil("17 sends", "limit-exceeded", "sends", to=[sends[0]] * 17)
    spoil("unknown party", "party-unknown", "sends", 0, "party", to=4)
    spoil("unknown receiver", "party-unknown", "receives", 0, "party", to=2**32)
    spoil("no sends", "job-wrong", "sends", to=[])
    spoil("same send twice", "job-wrong", "sends", to=[sends[0], *sends])
    spoil("sends a score", "job-wrong", "sends", 0, "slot", to="score")
    spoil("public weights", "job-wrong", "receives", 0, "party", to=None)
    spoil("score without test", "job-wrong", "sends", to=sends[:2])
    spoil("no room", "job-wrong", "sends", 0, "capacity", to=0)
    spoil("too much room", "job-wrong", "sends", 0, "capacity", to=2**32)
    spoil("key not on the curve", "job-wrong", "parties", 0, "sign", to=b"\4" + bytes(64))
    parties = fields_of(job)["parties"]
    spoil("same key twice", "job-wrong", "parties", 1, "sign", to=parties[0]["sign"])
    spoil("no steps", "job-wrong", "privacy", "steps", to=0)
    spoil("no noise", "job-wrong", "privacy", "noise_multiplier", to=0)
    spoil("no threshold", "job-wrong", "privacy", "max_grad_norm", to=0)
    spoil("no divisor", "job-wrong", "privacy", "expected_batch", to=0)
    spoil("no batch", "job-wrong", "privacy", "max_batch", to=0)
    spoil("rate above one", "job-wrong", "privacy", "sample_rate", to=2**32 + 1)
    return {
        "parties": [secrets_of(one) for one in (A, B, T, R)],
        "valid": [{"name": "two hospitals", "job": data.hex(), "digest": job.digest.hex()}],
        "invalid": invalid,
    }


def high_s(data: bytes) -> bytes:
    """The same signature with s in the upper half, which must be refused."""
    fields = document.decode(data, lambda value, where: None)
    r, s = fields["signature"][:32], int.from_bytes(fields["signature"][32:], "big")
    fields["signature"] = r + (P256_ORDER - s).to_bytes(32, "big")
    return document.encode(fields)


def other_signature(domain: str, body: Value, key: ec.EllipticCurvePrivateKey, claim: str) -> bytes:
    """An envelope that claims to be of another type than the one that was signed."""
    made = Envelope.signed(domain, body, key)
    return Envelope(domain=claim, claimed=made.claimed, signature=made.signature).to_bytes()


def approval_vectors(job: Job) -> dict[str, Any]:
    """Approvals by all parties."""
    domain = "myelin/approval/1"
    body: dict[str, Value] = {"job": job.digest, "sign": A.public.sign}
    good = job.approve(A)

    def bad(name: str, reason: str, data: bytes) -> dict[str, str]:
        return {"name": name, "reason": reason, "approval": data.hex()}

    return {
        "job": job.to_bytes().hex(),
        "valid": [
            {"name": one.name, "party": index, "approval": job.approve(one).hex()}
            for index, one in enumerate((A, B, T, R))
        ],
        "invalid": [
            bad("cut short", "cbor-malformed", good[:-1]),
            bad("trailing byte", "cbor-malformed", good + b"\0"),
            bad("other type", "type-wrong", A.sign("myelin/grant/1", body)),
            bad("unknown key", "field-wrong", A.sign(domain, body | {"extra": 1})),
            bad("other job", "job-wrong", A.sign(domain, body | {"job": h("other job")})),
            bad(
                "stranger", "party-unknown", OTHER.sign(domain, body | {"sign": OTHER.public.sign})
            ),
            bad("signed by another", "signature-wrong", B.sign(domain, body)),
            bad("high s", "signature-wrong", high_s(good)),
            bad(
                "signed for another type",
                "signature-wrong",
                other_signature("myelin/grant/1", body, A.signing_key, domain),
            ),
        ],
    }


def grant_vectors(job: Job) -> dict[str, Any]:
    """Grants for all sends."""
    domain = "myelin/grant/1"
    key, commitment = h("file key"), h("commitment")

    def made(
        by: Party = A,
        *,
        to: Party = INSTANCE,
        info: bytes = b"myelin/grant/1\0" + job.digest,
        inner: dict[str, Value] | None = None,
        **changes: Value,
    ) -> bytes:
        secret: dict[str, Value] = {"key": key, "uses": 1, "commitment": commitment}
        enc, ct = seal_to(to.public.hpke, info, document.encode(secret | (inner or {})))
        body: dict[str, Value] = {
            "ct": ct,
            "enc": enc,
            "job": job.digest,
            "slot": "records",
            "party": 0,
        }
        return by.sign(domain, body | changes)

    def bad(name: str, reason: str, data: bytes) -> dict[str, str]:
        return {"name": name, "reason": reason, "grant": data.hex()}

    good = made()
    return {
        "job": job.to_bytes().hex(),
        "instance": secrets_of(INSTANCE),
        "valid": [
            {
                "name": f"{slot} of {by.name}",
                "send": send,
                "grant": made(by, slot=slot, party=index).hex(),
                "key": key.hex(),
                "commitment": commitment.hex(),
            }
            for send, (by, slot, index) in enumerate(
                ((A, "records", 0), (B, "records", 1), (T, "test", 2))
            )
        ],
        "invalid": [
            bad("cut short", "cbor-malformed", good[:-1]),
            bad("trailing byte", "cbor-malformed", good + b"\0"),
            bad("unknown key", "field-wrong", made(extra=1)),
            bad("unknown slot", "field-wrong", made(slot="secrets")),
            bad("short enc", "field-wrong", made(enc=bytes(1119))),
            bad("other job", "job-wrong", made(job=h("other job"))),
            bad("unknown party", "party-unknown", made(party=4)),
            bad("slot of nobody", "grant-wrong", made(slot="test")),
            bad("signed by another", "signature-wrong", made(B)),
            bad("high s", "signature-wrong", high_s(good)),
            bad("to another instance", "hpke-failed", made(to=OTHER)),
            bad(
                "context of another job",
                "hpke-failed",
                made(info=b"myelin/grant/1\0" + h("other job")),
            ),
            bad("ct altered", "hpke-failed", made(ct=bytes(106))),
            bad("many uses", "grant-wrong", made(inner={"uses": 2})),
        ],
    }


def pattern(length: int) -> bytes:
    """Byte i is i mod 251."""
    return (bytes(range(251)) * (length // 251 + 1))[:length]


def sealed_vectors() -> dict[str, Any]:
    """Sealed files of all lengths around a chunk."""

    def case(name: str, plaintext: bytes) -> dict[str, Any]:
        key, salt = h(f"{name} key"), h(f"{name} salt")
        stream = BytesIO()
        commitment = seal_stream([plaintext], len(plaintext), stream, key=key, salt=salt)
        sealed = stream.getvalue()
        return {
            "name": name,
            "key": key.hex(),
            "salt": salt.hex(),
            "length": len(plaintext),
            "header": sealed[:96].hex(),
            "commitment": commitment.hex(),
            "sealed": sealed.hex() if len(sealed) < 4096 else None,
        }

    record = struct.pack("<8sIII44x", b"MYRECORD", 2, 3, 12)
    record += struct.pack("<ffi", 1.5, -2.0, 1) + struct.pack("<ffi", 0.25, 8.0, 0) + bytes(12)
    one = case("records", record)
    sealed = bytes.fromhex(one["sealed"])

    def bad(name: str, reason: str, data: bytes) -> dict[str, str]:
        return {"name": name, "reason": reason, "key": one["key"], "sealed": data.hex()}

    def changed(at: int, to: int | None = None) -> bytes:
        data = bytearray(sealed)
        data[at] = data[at] ^ 1 if to is None else to
        return bytes(data)

    return {
        "pattern": "plaintext byte i is i mod 251, where no plaintext is given; "
        "files of 4096 bytes and more are given by header and commitment only",
        "valid": [
            one | {"plaintext": record.hex()},
            *(
                case(f"pattern {length}", pattern(length))
                for length in (1, 65_535, 65_536, 65_537, 131_072, 200_000)
            ),
        ],
        "invalid": [
            bad("magic", "sealed-header-wrong", changed(0)),
            bad("chunk size", "sealed-header-wrong", changed(88)),
            bad("not zero", "sealed-header-wrong", changed(95)),
            bad("salt", "key-commitment-wrong", changed(16)),
            bad("key commitment", "key-commitment-wrong", changed(48)),
            bad("ciphertext", "chunk-tag-wrong", changed(96)),
            bad("tag", "chunk-tag-wrong", changed(len(sealed) - 1)),
        ],
    }


def report_data_vectors(job: Job) -> dict[str, Any]:
    """What a quote binds."""
    public = INSTANCE.public
    fields = {
        "nonce": h("nonce"),
        "hpke": public.hpke,
        "sign": public.sign,
        "job": job.digest,
    }
    made = {name: value.hex() for name, value in fields.items()}
    return {"valid": [made | {"report_data": report_data(**fields).hex()}]}


def evidence_vectors(receipts: dict[str, Any]) -> dict[str, Any]:
    """The evidence document of the good receipt, field by field, and what it is appraised by."""
    data = cbor2.loads(bytes.fromhex(receipts["file"]))["evidence"]
    fields = cbor2.loads(data)
    return {
        "evidence": data.hex(),
        "fields": {
            name: value.hex() if isinstance(value, bytes) else value
            for name, value in fields.items()
        },
        "root": receipts["root"],
        "endorsements": receipts["endorsements"],
        "now": NOW,
    }


def receipt_body(job: Job, changes: dict[str, Any]) -> dict[str, Any]:
    """The body that the instance signs."""
    fields = fields_of(job)
    body: dict[str, Any] = {
        "job": job.digest,
        "image": fields["image"],
        "score": {"total": 50, "correct": 47},
        "inputs": [
            {"slot": send.slot, "party": send.party, "commitment": h(f"input {index}")}
            for index, send in enumerate(job.sends)
        ],
        "outputs": [{"slot": "weights", "party": 3, "digest": h("trained weights")}],
        "privacy": fields["privacy"] | {"steps": 80},
        "weights": job.weights,
    }
    return body | changes


def receipt_vectors(job: Job) -> dict[str, Any]:
    """A receipt, its file, and files that must not verify."""
    with tempfile.TemporaryDirectory() as folder:
        world = World.create(Path(folder, "world"), now=NOW)
    approvals = [job.approve(one) for one in (A, B, T, R)]

    def file(body: dict[str, Any], by: Party = INSTANCE, approved: list[bytes] = approvals) -> str:
        signed = by.sign("myelin/receipt/1", body)
        public = INSTANCE.public
        bound = {
            "nonce": receipt.nonce(signed),
            "hpke": public.hpke,
            "sign": public.sign,
            "job": job.digest,
        }
        quote = world.quote(job.image.measurement, report_data(**bound))
        evidence = Evidence(quote=quote, **bound).to_bytes()
        return receipt.bundle(
            job=job.to_bytes(), receipt=signed, evidence=evidence, approvals=approved
        ).hex()

    def bad(name: str, check: str, **changes: Any) -> dict[str, str]:
        return {"name": name, "check": check, "file": file(receipt_body(job, changes))}

    good = receipt_body(job, {})
    limits = good["privacy"]
    return {
        "instance": secrets_of(INSTANCE),
        "job": job.to_bytes().hex(),
        "steps": 80,
        "score": {"total": 50, "correct": 47},
        "commitments": [h(f"input {index}").hex() for index in range(3)],
        "output": h("trained weights").hex(),
        "receipt": INSTANCE.sign("myelin/receipt/1", good).hex(),
        "root": world.root,
        "now": NOW,
        "endorsements": world.endorsements(now=NOW),
        "file": file(good),
        "invalid": [
            {"name": "by another", "check": "signature", "file": file(good, OTHER)},
            {"name": "no approval", "check": "approvals", "file": file(good, approved=[])},
            {
                "name": "doubled approval",
                "check": "approvals",
                "file": file(good, approved=[approvals[0], *approvals[:3]]),
            },
            bad("other job", "job", job=h("other job")),
            bad("other image", "image", image={"digest": h("x"), "measurement": h("measurement")}),
            bad("other weights", "weights", weights=h("other weights")),
            bad("input missing", "inputs", inputs=good["inputs"][:2]),
            bad("output missing", "outputs", outputs=[]),
            bad("more steps", "privacy", privacy=limits | {"steps": 101}),
            bad("less noise", "privacy", privacy=limits | {"noise_multiplier": 2_400_000}),
            bad("less epsilon", "privacy", privacy=limits | {"epsilon": 1}),
            bad("no score", "score", score=None),
            bad("too good", "score", score={"total": 50, "correct": 51}),
            bad("more than there are", "score", score={"total": 51, "correct": 47}),
        ],
    }


def output_vectors(job: Job) -> dict[str, Any]:
    """An output as its receiver gets it."""
    key, plaintext = h("output key"), pattern(256)
    stream = BytesIO()
    seal_stream([plaintext], len(plaintext), stream, key=key, salt=h("output salt"))
    info = b"myelin/output/1\0" + job.digest
    enc, ct = seal_to(R.public.hpke, info, document.encode({"key": key}))
    envelope: dict[str, Value] = {
        "ct": ct,
        "enc": enc,
        "job": job.digest,
        "slot": "weights",
        "type": "myelin/output/1",
        "party": 3,
    }
    return {
        "job": job.to_bytes().hex(),
        "receiver": secrets_of(R),
        "envelope": document.encode(envelope).hex(),
        "sealed": stream.getvalue().hex(),
        "key": key.hex(),
        "plaintext": plaintext.hex(),
        "digest": document.digest(plaintext).hex(),
    }


def write(name: str, content: dict[str, Any]) -> None:
    """Write one file."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
