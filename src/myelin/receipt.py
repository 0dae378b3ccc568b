"""Receipts: proof, for anyone and offline, of what an enclave did with what and for whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from myelin import document, job, privacy
from myelin.document import Envelope, Kind
from myelin.errors import DocumentInvalid, EvidenceRejected, PolicyInvalid, ReceiptInvalid
from myelin.evidence import Appraised, appraise
from myelin.job import MOST, Job
from myelin.policy import Policy
from myelin.privacy import Privacy

LIMIT = 1_048_576

FILE: Kind = document.record(
    {
        "job": document.octets(),
        "type": document.label("myelin/receipt-file/1"),
        "receipt": document.octets(),
        "evidence": document.octets(),
        "approvals": document.listing(document.octets(), MOST),
    }
)

BODY: Kind = document.record(
    {
        "job": document.octets(32),
        "image": job.IMAGE,
        "score": document.optional(
            document.record({"total": document.unsigned(), "correct": document.unsigned()})
        ),
        "inputs": document.listing(
            document.record(
                {
                    "slot": document.text(*job.SEND_SLOTS),
                    "party": document.unsigned(MOST - 1),
                    "commitment": document.octets(32),
                }
            ),
            MOST,
        ),
        "outputs": document.listing(
            document.record(
                {
                    "slot": document.text(*job.RECEIVE_SLOTS),
                    "party": document.unsigned(MOST - 1),
                    "digest": document.octets(32),
                }
            ),
            MOST,
        ),
        "privacy": privacy.SCHEMA,
        "weights": document.octets(32),
    }
)


@dataclass(frozen=True, kw_only=True)
class Input:
    """One sealed file that was used; `commitment` is SHA-256 of the whole file."""

    slot: str
    party: str
    commitment: bytes


@dataclass(frozen=True, kw_only=True)
class Output:
    """One result; `digest` is SHA-256 of its plaintext."""

    slot: str
    party: str
    digest: bytes


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many records of the test slot were predicted correctly."""

    total: int
    correct: int

    @property
    def accuracy(self) -> float:
        """The fraction predicted correctly."""
        return self.correct / self.total


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a receipt proves, as `verify` returns it."""

    job: Job
    privacy: Privacy
    """With the steps that were done; `epsilon` is recomputed from the integers."""
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    score: Score | None
    appraised: Appraised

    def output(self, slot: str, party: str) -> Output:
        """The output of a slot for the party of that name; raises `ReceiptInvalid` output."""
        for output in self.outputs:
            if (output.slot, output.party) == (slot, party):
                return output
        raise ReceiptInvalid("output", f"it states no {slot!r} for {party!r}")


def nonce(receipt: bytes) -> bytes:
    """The nonce of the evidence that goes with a signed receipt: SHA-256 of its bytes."""
    return document.digest(receipt)


def bundle(*, job: bytes, receipt: bytes, evidence: bytes, approvals: Sequence[bytes]) -> bytes:
    """Put together a receipt file from its documents. `verify` judges it."""
    return document.encode(
        {
            "job": job,
            "type": "myelin/receipt-file/1",
            "receipt": receipt,
            "evidence": evidence,
            "approvals": list(approvals),
        }
    )


def verify(file: bytes, policy: Policy, endorsements: str, now: int) -> Receipt:
    """Verify a receipt file offline.

    policy, endorsements, now: as for `myelin.evidence.appraise`, judged as at `now`. The policy
    must name the job or a measurement that the caller has from elsewhere: a receipt cannot vouch
    for its own image or parties.
    Raises `ReceiptInvalid` with the check: file, job, approvals, policy, evidence, signature,
    body, image, weights, inputs, outputs, privacy, score.
    """
    with _check("file"):
        parts = document.decode(file, FILE, limit=LIMIT)
    with _check("job"):
        made = Job.from_bytes(parts["job"])
    with _check("approvals"):
        made.check_approvals(parts["approvals"])
    if policy.job is None and not policy.measurements:
        raise ReceiptInvalid(
            "policy",
            "it names neither the job nor a measurement, so any image would do; compare with the "
            f"job that you know (this receipt is of {made.digest.hex()}), or rebuild the image",
        )
    with _check("policy"):
        complete = policy.for_job(made)
    with _check("evidence"):
        appraised = appraise(
            parts["evidence"], endorsements, complete, nonce(parts["receipt"]), now
        )
    with _check("signature"):
        envelope = Envelope.from_bytes(parts["receipt"], "myelin/receipt/1")
        claimed = envelope.verified(appraised.sign)
    with _check("body"):
        body = document.decode(claimed, BODY)
    _same("job", body["job"].hex(), made.digest.hex())
    _same("image", body["image"], vars(made.image))
    _same("weights", body["weights"].hex(), made.weights.hex())
    _same(
        "inputs",
        [(entry["slot"], entry["party"]) for entry in body["inputs"]],
        [(send.slot, send.party) for send in made.sends],
    )
    _same(
        "outputs",
        [(entry["slot"], entry["party"]) for entry in body["outputs"]],
        [(one.slot, one.party) for one in made.receives if one.party is not None],
    )
    return Receipt(
        job=made,
        privacy=_privacy(body["privacy"], made),
        inputs=tuple(Input(**_named(entry, made)) for entry in body["inputs"]),
        outputs=tuple(Output(**_named(entry, made)) for entry in body["outputs"]),
        score=_score(body["score"], made),
        appraised=appraised,
    )


def _privacy(fields: dict[str, Any], made: Job) -> Privacy:
    """The job's limits with the steps done, whose epsilon is computed here."""
    steps = fields["steps"]
    if steps == 0:
        raise ReceiptInvalid("privacy", "no step was done: the weights are the initial ones")
    if steps > made.privacy.steps:
        raise ReceiptInvalid("privacy", f"{steps} steps were done, {made.privacy.steps} allowed")
    _same("privacy", fields, made.privacy.to_fields() | {"steps": steps})
    return made.privacy.after(steps)


def _score(fields: dict[str, int] | None, made: Job) -> Score | None:
    asked = any(receive.slot == "score" for receive in made.receives)
    if (fields is not None) != asked:
        raise ReceiptInvalid("score", "a score stands in it exactly if the job asks for one")
    if fields is None:
        return None
    capacity = sum(send.capacity for send in made.sends if send.slot == "test")
    score = Score(**fields)
    if not (0 < score.total <= capacity and score.correct <= score.total):
        raise ReceiptInvalid(
            "score", f"{score.correct} of {score.total} correct with a capacity of {capacity}"
        )
    return score


def _named(entry: dict[str, Any], made: Job) -> dict[str, Any]:
    return entry | {"party": made.parties[entry["party"]].name}


def _same(check: str, found: object, expected: object) -> None:
    if found != expected:
        raise ReceiptInvalid(check, f"it states {found}, the job {expected}")


@contextmanager
def _check(check: str) -> Iterator[None]:
    try:
        yield
    except (DocumentInvalid, EvidenceRejected, PolicyInvalid) as error:
        raise ReceiptInvalid(check, str(error)) from error
