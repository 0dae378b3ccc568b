"""Grants: releasing a file key to one appraised enclave instance, after debiting a ledger."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from myelin import document, privacy
from myelin.document import Envelope, Kind
from myelin.errors import (
    BudgetExceeded,
    DocumentInvalid,
    GrantRefused,
    LedgerInvalid,
    PrivacyRefused,
)
from myelin.evidence import Appraised
from myelin.job import RECEIVE_SLOTS, SEND_SLOTS, Job, Send
from myelin.party import HPKE_ENC, Party, seal_to
from myelin.privacy import Privacy, compose
from myelin.seal import SealedKey

GRANT: Kind = document.record(
    {
        "ct": document.octets(),
        "enc": document.octets(HPKE_ENC),
        "job": document.octets(32),
        "slot": document.text(*SEND_SLOTS, *RECEIVE_SLOTS),
        "party": document.unsigned(),
    }
)

INNER: Kind = document.record(
    {
        "key": document.octets(32),
        "uses": document.unsigned(1, least=1),
        "commitment": document.octets(32),
    }
)


def grant(
    party: Party,
    job: Job,
    appraised: Appraised,
    sealed: SealedKey,
    *,
    slot: str = "records",
    ledger: Ledger | None = None,
) -> bytes:
    """Release a file key to the instance that was appraised; returns the signed grant.

    `job` is the one that this party approved, from its own records: never a copy that the host
    just handed over.
    For the slot `records` a ledger is needed, and debited before the grant exists. A `test` slot
    has none: its score is released exactly, which its owner agreed to by approving the job.
    Raises `GrantRefused` (job, measurement, party, ledger) and `BudgetExceeded`.
    """
    if appraised.job != job.digest:
        raise GrantRefused("job", f"the enclave runs {appraised.job.hex()}, not this job")
    if appraised.measurement != job.image.measurement:
        raise GrantRefused("measurement", "the enclave is not the image of this job")
    index = _sender(job, party, slot)
    if slot == "records":
        if ledger is None:
            raise GrantRefused("ledger", "training records need a ledger to debit")
        if ledger.commitment != sealed.commitment:
            raise GrantRefused("ledger", f"{ledger.path} is the ledger of another sealed file")
        ledger.debit(job, appraised)
    elif ledger is not None:
        raise GrantRefused("ledger", f"the slot {slot!r} has no privacy budget; give no ledger")
    inner = document.encode({"key": sealed.key, "uses": 1, "commitment": sealed.commitment})
    enc, ct = seal_to(appraised.hpke, b"myelin/grant/1\0" + job.digest, inner)
    body: dict[str, document.Value] = {
        "ct": ct,
        "enc": enc,
        "job": job.digest,
        "slot": slot,
        "party": index,
    }
    return party.sign("myelin/grant/1", body)


def check_grant(data: bytes, job: Job) -> Send:
    """Check a grant's form and signature, as the enclave does; says which send it feeds.

    Raises `DocumentInvalid`.
    """
    envelope = Envelope.from_bytes(data, "myelin/grant/1")
    body = document.decode(envelope.claimed, GRANT)
    if body["job"] != job.digest:
        raise DocumentInvalid("job-wrong", "the grant is for another job")
    if body["party"] >= len(job.parties):
        raise DocumentInvalid("party-unknown", f"the job has no party {body['party']}")
    for send in job.sends:
        if (send.slot, send.party) == (body["slot"], body["party"]):
            envelope.verified(job.parties[send.party].sign)
            return send
    raise DocumentInvalid("grant-wrong", f"party {body['party']} sends no {body['slot']!r}")


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The privacy budget of one sealed file: an append-only text file that its owner keeps.

    The first line states the file's commitment and the budget, every further line one grant. All
    grants compose, also two for the same job, since each lets one instance run. A line is on disk
    before its grant exists; a crash in between costs budget, never privacy.
    """

    path: Path
    commitment: bytes
    """SHA-256 of the sealed file, 32 bytes."""
    epsilon: float
    """Budget, at `delta`, under add-or-remove-one neighbours."""
    delta: float

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, commitment: bytes, epsilon: float, delta: float
    ) -> Ledger:
        """Open a new budget; refuses to overwrite."""
        if not (0 < epsilon < float("inf") and 0 < delta < 1):
            raise LedgerInvalid(f"a budget of epsilon {epsilon}, delta {delta} is none")
        head = {
            "type": "myelin/ledger/1",
            "commitment": commitment.hex(),
            "epsilon": epsilon,
            "delta": delta,
        }
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise LedgerInvalid(f"{path} exists; a ledger is never overwritten") from None
        with os.fdopen(descriptor, "wb") as file:
            _append(file, head)
        _sync_folder(Path(path).parent)
        return cls(path=Path(path), commitment=commitment, epsilon=epsilon, delta=delta)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Ledger:
        """Read a ledger's budget; raises `LedgerInvalid`."""
        with _locked(Path(path)) as file:
            head, _ = _read(file, Path(path))
        return cls(
            path=Path(path),
            commitment=bytes.fromhex(head["commitment"]),
            epsilon=head["epsilon"],
            delta=head["delta"],
        )

    @property
    def spent(self) -> float:
        """Epsilon at `delta` of all grants so far, composed."""
        with _locked(self.path) as file:
            return compose(_read(file, self.path)[1], self.delta)

    def debit(self, job: Job, appraised: Appraised) -> float:
        """Write down one grant, if the budget allows; returns the epsilon spent after it.

        Raises `BudgetExceeded` and leaves the file as it was.
        """
        with _locked(self.path) as file:
            _, earlier = _read(file, self.path)
            asked = compose([*earlier, job.privacy], self.delta)
            if asked > self.epsilon:
                spent = compose(earlier, self.delta)
                raise BudgetExceeded(
                    spent=spent, asked=asked, budget=self.epsilon, delta=self.delta
                )
            line = {
                "job": job.digest.hex(),
                "instance": appraised.sign.hex(),
                "privacy": job.privacy.to_fields(),
            }
            _append(file, line)
            return asked


def _sender(job: Job, party: Party, slot: str) -> int:
    public = party.public
    for send in job.sends:
        if send.slot == slot and job.parties[send.party] == public:
            return send.party
    raise GrantRefused("party", f"{party.name!r} sends no {slot!r} in this job")


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """Open a ledger for reading and appending, alone."""
    try:
        file = path.open("r+b")
    except OSError as error:
        raise LedgerInvalid(f"{path}: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _read(file: BinaryIO, path: Path) -> tuple[dict[str, Any], list[Privacy]]:
    """Read all complete lines and leave the file there, ready to append.

    A last line without its end was being written when the machine stopped: its grant never
    existed, and the next line replaces it.
    """
    content = file.read()
    end = content.rfind(b"\n") + 1
    file.seek(end)
    try:
        head, *lines = [json.loads(line) for line in content[:end].splitlines()]
        if head["type"] != "myelin/ledger/1" or not head["epsilon"] > 0 < head["delta"] < 1:
            raise ValueError("the first line states no budget")
        if len(bytes.fromhex(head["commitment"])) != 32:
            raise ValueError("the first line states no commitment")
        for line in lines:
            privacy.SCHEMA(line["privacy"], "privacy")
        return head, [Privacy.from_fields(line["privacy"]) for line in lines]
    except (ValueError, KeyError, TypeError, DocumentInvalid, PrivacyRefused) as error:
        raise LedgerInvalid(
            f"{path} is damaged ({error}); restore it from a copy, nothing is granted without it"
        ) from None


def _append(file: BinaryIO, line: dict[str, Any]) -> None:
    file.truncate()  # what a crash left after the last complete line
    file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
