"""The job: one document that every party approves, and the approval itself (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from myelin import document, privacy
from myelin.document import Envelope, Kind
from myelin.errors import DocumentInvalid, GrantRefused
from myelin.party import Party, PublicParty
from myelin.privacy import Privacy, largest_batch

SEND_SLOTS = ("records", "test")
RECEIVE_SLOTS = ("weights", "score")
MOST = 16
"""The most parties, sends or receives of a job."""
CAPACITY = 2**32 - 1

IMAGE: Kind = document.record({"digest": document.octets(32), "measurement": document.octets(32)})

SCHEMA: Kind = document.record(
    {
        "type": document.label("myelin/job/1"),
        "image": IMAGE,
        "sends": document.listing(
            document.record(
                {
                    "slot": document.text(*SEND_SLOTS, *RECEIVE_SLOTS),
                    "party": document.unsigned(),
                    "capacity": document.unsigned(),
                }
            ),
            MOST,
        ),
        "parties": document.listing(
            document.record(
                {"hpke": document.octets(1216), "name": document.name, "sign": document.octets(65)}
            ),
            MOST,
        ),
        "privacy": privacy.SCHEMA,
        "weights": document.octets(32),
        "receives": document.listing(
            document.record(
                {
                    "slot": document.text(*SEND_SLOTS, *RECEIVE_SLOTS),
                    "party": document.optional(document.unsigned()),
                }
            ),
            MOST,
        ),
    }
)

APPROVAL: Kind = document.record({"job": document.octets(32), "sign": document.octets(65)})


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """The enclave image that a job runs."""

    digest: bytes
    """SHA-256 of the ELF file."""
    measurement: bytes
    """MRENCLAVE, 32 bytes."""


@dataclass(frozen=True, kw_only=True)
class Send:
    """What one party sends in: at most `capacity` records, which is also the padded size."""

    slot: str
    party: int
    capacity: int


@dataclass(frozen=True, kw_only=True)
class Receive:
    """What one party receives; `party` None means that the receipt makes it public."""

    slot: str
    party: int | None


class Reference(Protocol):
    """Anything that has an image's digest and measurement, such as `myelin.Image`."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the ELF file."""

    @property
    def measurement(self) -> bytes:
        """MRENCLAVE, 32 bytes."""


class Row(NamedTuple):
    """One line of the table "who can see what"."""

    what: str
    source: str
    visible_to: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job. Making one checks it; every party then approves `digest`."""

    image: ImageReference
    parties: tuple[PublicParty, ...]
    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]
    privacy: Privacy
    weights: bytes
    """SHA-256 of the initial flat weights, which are public."""

    @classmethod
    def draft(
        cls,
        *,
        image: Reference,
        weights: bytes,
        privacy: Privacy,
        sends: Mapping[str, Mapping[PublicParty, int]],
        receives: Mapping[str, Sequence[PublicParty | None]],
        approvers: Sequence[PublicParty] = (),
    ) -> Job:
        """Write a job from parties instead of indices.

        `sends` maps a slot to its owners and their capacities, `receives` a slot to its
        receivers (None: public); `approvers` are further parties that must approve.
        """
        owners = [party for slot in sends.values() for party in slot]
        readers = [party for slot in receives.values() for party in slot if party is not None]
        parties = tuple(dict.fromkeys([*owners, *readers, *approvers]))
        return cls(
            image=ImageReference(digest=image.digest, measurement=image.measurement),
            parties=parties,
            sends=tuple(
                Send(slot=slot, party=parties.index(party), capacity=capacity)
                for slot, owned in sends.items()
                for party, capacity in owned.items()
            ),
            receives=tuple(
                Receive(slot=slot, party=None if party is None else parties.index(party))
                for slot, readers in receives.items()
                for party in readers
            ),
            privacy=privacy,
            weights=weights,
        )

    def __post_init__(self) -> None:
        """Refuse a job that the enclave would refuse, or whose privacy would not hold."""
        SCHEMA(self._fields(), "job")
        _refuse_unless(len(self.to_bytes()) <= document.DOCUMENT_LIMIT, "longer than 65,536 bytes")
        entries: list[Send | Receive] = [*self.sends, *self.receives]
        used = {entry.party for entry in entries if entry.party is not None}
        _refuse_unless(
            all(party < len(self.parties) for party in used),
            f"an entry names a party beyond the {len(self.parties)} there are",
            reason="party-unknown",
        )
        _refuse_unless(
            all(1 <= send.capacity <= CAPACITY for send in self.sends),
            "a capacity is from 1 to 2³² - 1 records",
        )
        once: dict[str, list[object]] = {
            "party name": [party.name for party in self.parties],
            "signing key": [party.sign for party in self.parties],
            "sealing key": [party.hpke for party in self.parties],
            "slot and party": [(entry.slot, entry.party) for entry in entries],
        }
        for what, values in once.items():
            _refuse_unless(len(set(values)) == len(values), f"two entries have the same {what}")
        _refuse_unless(
            all(send.slot in SEND_SLOTS for send in self.sends)
            and all(receive.slot in RECEIVE_SLOTS for receive in self.receives),
            f"one sends {' and '.join(SEND_SLOTS)}, and receives {' and '.join(RECEIVE_SLOTS)}",
        )
        slots = {entry.slot for entry in entries}
        _refuse_unless("records" in slots, "nobody sends records")
        _refuse_unless("weights" in slots, "nobody receives weights")
        _refuse_unless(
            all(
                receive.party is not None for receive in self.receives if receive.slot == "weights"
            ),
            "weights go to a party, not to everyone",
        )
        _refuse_unless(
            all(receive.party is None for receive in self.receives if receive.slot == "score"),
            "a score stands in the receipt, so it is public: its party is null",
        )
        _refuse_unless("score" not in slots or "test" in slots, "a score needs a test slot")
        least = largest_batch(self.records, self.privacy.sample_rate)
        _refuse_unless(
            self.privacy.max_batch >= least,
            f"max_batch is {self.privacy.max_batch}; {self.records} records need at least {least}",
        )

    @property
    def records(self) -> int:
        """The most training records that all owners together can send."""
        return sum(send.capacity for send in self.sends if send.slot == "records")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the document, the name of the job everywhere."""
        return document.digest(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Encode the document."""
        return document.encode(self._fields())

    @classmethod
    def from_bytes(cls, data: bytes) -> Job:
        """Parse and check a job document, its stated epsilon included.

        Raises `DocumentInvalid`: the reasons of `document.decode`, or job-wrong.
        """
        fields = document.decode(data, SCHEMA)
        return cls(
            image=ImageReference(**fields["image"]),
            parties=tuple(_party(party) for party in fields["parties"]),
            sends=tuple(Send(**send) for send in fields["sends"]),
            receives=tuple(Receive(**receive) for receive in fields["receives"]),
            privacy=privacy.check(fields["privacy"]),
            weights=fields["weights"],
        )

    def approve(self, party: Party) -> bytes:
        """Sign the job's digest as one of its parties; returns the approval's bytes."""
        sign = party.public.sign
        _refuse_unless(
            any(sign == member.sign for member in self.parties),
            f"{party.name!r} is not one of its parties",
            reason="party-unknown",
        )
        return party.sign("myelin/approval/1", {"job": self.digest, "sign": sign})

    def check_approval(self, data: bytes) -> PublicParty:
        """Check one approval and say whose it is; raises `DocumentInvalid`."""
        envelope = Envelope.from_bytes(data, "myelin/approval/1")
        body = document.decode(envelope.claimed, APPROVAL)
        _refuse_unless(body["job"] == self.digest, "it approves another job")
        for party in self.parties:
            if party.sign == body["sign"]:
                envelope.verified(party.sign)
                return party
        raise DocumentInvalid("party-unknown", f"{body['sign'][1:9].hex()}… is no party of the job")

    def check_approvals(self, approvals: Sequence[bytes]) -> None:
        """Check that every party approved exactly once; raises `DocumentInvalid`."""
        seen: set[str] = set()
        for data in approvals:
            party = self.check_approval(data)
            _refuse_unless(
                party.name not in seen,
                f"{party.name!r} approved twice",
                reason="approval-duplicate",
            )
            seen.add(party.name)
        for party in self.parties:
            _refuse_unless(
                party.name in seen, f"{party.name!r} has not approved", reason="approval-missing"
            )

    def describe(self) -> list[Row]:
        """Who can see what, as rows for a table."""
        nobody = "nobody but the sender"
        rows = [
            Row(f"{send.slot}, at most {send.capacity:,}", self.parties[send.party].name, nobody)
            for send in self.sends
        ]
        for receive in self.receives:
            reader = "everyone" if receive.party is None else self.parties[receive.party].name
            private = (
                f" (epsilon {self.privacy.epsilon:g}, delta {self.privacy.delta:g}, "
                f"{privacy.NEIGHBORING_RELATION})"
            )
            source = "enclave" + (private if receive.slot == "weights" else "")
            rows.append(Row(receive.slot, source, reader))
        if any(receive.slot == "score" for receive in self.receives):
            rows.append(Row("number of test records", "enclave", "everyone"))
        rows.append(Row("job, initial weights, receipt", "all", "everyone"))
        rows.append(Row("sizes, timing, number of batches", "host", "the host"))
        return rows

    def _fields(self) -> dict[str, Any]:
        return {
            "type": "myelin/job/1",
            "image": dict(vars(self.image)),
            "sends": [dict(vars(send)) for send in self.sends],
            "parties": [dict(vars(party)) for party in self.parties],
            "privacy": self.privacy.to_fields(),
            "weights": self.weights,
            "receives": [dict(vars(receive)) for receive in self.receives],
        }


def _party(fields: dict[str, Any]) -> PublicParty:
    try:
        return PublicParty(**fields)
    except DocumentInvalid as error:
        raise DocumentInvalid("job-wrong", f"party {fields['name']!r}: {error.detail}") from None


# What a party approved is kept beside its key: later steps take the job from there, never from
# the host, who could have put another one in its place.


def keep_approved(job: Job, key: Path) -> Path:
    """Keep an approved job beside the party's key file; returns where."""
    path = _approved(job.digest, key)
    path.write_bytes(job.to_bytes())
    return path


def approved(digest: bytes, key: Path) -> Job:
    """The job of that digest as this party approved it; `GrantRefused` approval if it did not."""
    path = _approved(digest, key)
    if not path.exists():
        raise GrantRefused(
            "approval",
            f"the owner of {key} has not approved job {digest.hex()}: {path} does not exist; "
            "if the job changed, read it and approve it first",
        )
    job = Job.from_bytes(path.read_bytes())
    if job.digest != digest:
        raise GrantRefused("approval", f"{path} holds another job, {job.digest.hex()}")
    return job


def _approved(digest: bytes, key: Path) -> Path:
    return key.with_name(f"{key.stem}.{digest.hex()[:32]}.job")


def _refuse_unless(holds: bool, detail: str, *, reason: str = "job-wrong") -> None:
    if not holds:
        raise DocumentInvalid(reason, detail)
