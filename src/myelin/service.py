"""One job in one enclave, as the untrusted host runs it.

`Service` drives an enclave through a job's life; `serve` does the same over an exchange folder, for
parties on other machines. Neither learns anything but sizes and timing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol, Self

import safetensors.numpy

from myelin import receipt
from myelin.cell import Backend, Cell
from myelin.enclave import Enclave
from myelin.errors import DocumentInvalid, EnclaveRefused, ExchangeError, ImageMismatch
from myelin.evidence import Evidence
from myelin.exchange import Exchange, place
from myelin.grant import check_grant
from myelin.image import Image
from myelin.job import Job, Receive, Send
from myelin.seal import RECORD_HEADER, sealed_size
from myelin.weights import pack

NONCE = 32
_POLL_SECONDS = 0.05
_SLICE_SECONDS = 0.2


class Attester(Protocol):
    """Turns report data into a quote: the simulator's world, or a platform's quoting service."""

    def quote(self, measurement: bytes, report_data: bytes) -> bytes:
        """A quote over the 64 bytes of report data."""

    def endorsements(self, *, now: int) -> str:
        """Collateral that lets others check the quote, JSON."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One sealed output: who receives it, the envelope with its key, the pieces of the file."""

    receive: Receive
    envelope: bytes
    sealed: Iterator[bytes]


class Service:
    """Runs one job. A context manager: leaving it ends the enclave and all that it held."""

    def __init__(
        self,
        *,
        job: Job,
        image: Path,
        weights: Path,
        attester: Attester,
        backend: Backend = "process",
    ) -> None:
        """Starts the job's image.

        `weights` is the safetensors file of the public initial weights. Raises `ImageMismatch` when
        the image is not the one that the job names, `DataRefused` when the weights do not fit it,
        `CellDied` when it does not start; every operation may raise `EnclaveRefused` or `CellDied`.
        """
        self._job = job
        self._attester = attester
        self._approvals: list[bytes] = []
        content = Image.read(image)
        if content.digest != job.image.digest:
            raise ImageMismatch(
                f"{image} has SHA-256 {content.digest.hex()}, the job names "
                f"{job.image.digest.hex()}: fetch the image that the job was written for"
            )
        self._measurement = content.measurement
        description = content.description
        values = safetensors.numpy.load_file(weights)
        self._record = description["record"]["features"] + description["record"]["label"]
        self._weights = pack(description["parameters"], values).tobytes()
        self.cell = Cell(
            image,
            backend=backend,
            threads=description["threads"],
            features=description["cpu"]["features"],
        )
        self._enclave = Enclave(self.cell)
        try:
            self._enclave.job(job.to_bytes())
        except BaseException:
            self.cell.close()
            raise

    def approve(self, approval: bytes) -> None:
        """Hands over one party's approval; the enclave does nothing until it has all."""
        self._enclave.approve(approval)
        self._approvals.append(approval)

    def evidence(self, nonce: bytes) -> bytes:
        """Fresh evidence for a party's 32-byte nonce."""
        keys = self._enclave.attest(nonce)
        quote = self._attester.quote(self._measurement, keys.report_data)
        return Evidence(
            job=self._job.digest, hpke=keys.hpke, sign=keys.sign, nonce=nonce, quote=quote
        ).to_bytes()

    def endorsements(self, *, now: int) -> str:
        """Collateral for the evidence, JSON."""
        return self._attester.endorsements(now=now)

    def accept(self, index: int, grant: bytes, sealed: Path | BinaryIO) -> None:
        """Hands over an owner's grant and streams in the sealed file of entry `index` of sends."""
        self.grant(grant)
        self.load(index, sealed)

    def grant(self, grant: bytes) -> None:
        """Hands over an owner's grant."""
        self._enclave.grant(grant)

    def load(self, index: int, sealed: Path | BinaryIO) -> None:
        """Streams in the sealed file of entry `index` of the job's sends."""
        if isinstance(sealed, Path):
            with sealed.open("rb") as stream:
                self._enclave.load(index, stream)
        else:
            self._enclave.load(index, sealed)

    def sealed_size(self, send: Send) -> int:
        """Bytes of the sealed file that belongs to an entry of the job's sends."""
        return sealed_size(RECORD_HEADER + send.capacity * self._record)

    def train(self, progress: Callable[[int], None] = lambda done: None) -> int:
        """Trains all steps of the job; `progress` is told the steps done. Returns that number."""
        self._enclave.weights(self._weights)
        fields = self._job.privacy.to_fields()
        done, size = 0, 1
        while done < self._job.privacy.steps:
            start = time.perf_counter()
            size = min(size, self._job.privacy.steps - done)
            done = self._enclave.train(
                steps=size,
                sample_rate=fields["sample_rate"],
                noise_multiplier=fields["noise_multiplier"],
            )
            progress(done)
            # Requests long enough to cost nothing, short enough to show progress.
            seconds = max(time.perf_counter() - start, 1e-6)
            size = max(1, int(size * min(4.0, _SLICE_SECONDS / seconds)))
        return done

    def finish(self) -> bytes:
        """Ends training and returns the receipt file: the signed receipt, bundled with evidence."""
        signed = self._enclave.finish()
        return receipt.bundle(
            job=self._job.to_bytes(),
            receipt=signed,
            evidence=self.evidence(receipt.nonce(signed)),
            approvals=self._approvals,
        )

    def outputs(self) -> Iterator[Output]:
        """The sealed outputs; public ones stand in the receipt."""
        for index, receive in enumerate(self._job.receives):
            if receive.party is not None:
                envelope, sealed = self._enclave.output(index)
                yield Output(receive=receive, envelope=envelope, sealed=sealed)

    def close(self) -> None:
        """Ends the enclave."""
        self.cell.close()

    def __enter__(self) -> Self:
        """The service itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the enclave."""
        self.close()


def serve(
    exchange: Exchange,
    *,
    attester: Attester,
    now: Callable[[], int],
    backend: Backend = "process",
    wait_seconds: float = 600.0,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> None:
    """Runs the job of an exchange folder from the first approval to the receipt.

    Waits for the parties' files, at most `wait_seconds` for the next one, then `ExchangeError`. An
    interrupted run starts afresh, with new grants: an instance's keys die with it, by design.
    """
    job = Job.from_bytes(exchange.job.read_bytes())
    for folder in (exchange.folder / "evidence", exchange.folder / "grants"):
        # What an earlier instance was given fits no other.
        for stale in folder.glob("*.cbor"):
            stale.unlink()
    with Service(
        job=job,
        image=exchange.image,
        weights=exchange.weights,
        attester=attester,
        backend=backend,
    ) as service:
        say(f"the enclave runs, measurement {job.image.measurement.hex()}")
        if service.cell.unpinned is not None:
            say(f"its threads are not pinned to cores of their own: {service.cell.unpinned}")
        _gather_approvals(exchange, job, service, wait_seconds, say)
        place(exchange.endorsements, service.endorsements(now=now()).encode())
        _gather_grants(exchange, job, service, wait_seconds, say)
        steps = job.privacy.steps
        service.train(lambda done: progress(done, steps))
        finished = service.finish()
        for output in service.outputs():
            assert output.receive.party is not None
            where = (output.receive.slot, output.receive.party)
            place(exchange.output(*where), output.sealed)
            place(exchange.envelope(*where), output.envelope)
        place(exchange.receipt, finished)
        say(f"the receipt lies in {exchange.receipt}")


def _gather_approvals(
    exchange: Exchange, job: Job, service: Service, seconds: float, say: Callable[[str], None]
) -> None:
    waiting = dict(enumerate(job.parties))
    refused: set[bytes] = set()
    until = time.monotonic() + seconds
    while waiting:
        for index in [index for index in waiting if exchange.approval(index).exists()]:
            name, approval = waiting[index].name, exchange.approval(index).read_bytes()
            if approval in refused:
                continue
            try:
                if job.check_approval(approval) != job.parties[index]:
                    raise DocumentInvalid("party-unknown", "it is another party's")
                service.approve(approval)
            except (DocumentInvalid, EnclaveRefused) as error:
                # Anyone may write into the folder; it costs the others nothing.
                refused.add(approval)
                say(f"what lies at {exchange.approval(index)} is no approval by {name}: {error}")
                continue
            say(f"{name} approves")
            del waiting[index]
            until = time.monotonic() + seconds
        _pause(until, seconds, "approval", [party.name for party in waiting.values()])


def _gather_grants(
    exchange: Exchange, job: Job, service: Service, seconds: float, say: Callable[[str], None]
) -> None:
    waiting = dict(enumerate(job.sends))
    seen: set[bytes] = set()
    until = time.monotonic() + seconds
    while waiting:
        for party in range(len(job.parties)):
            if exchange.nonce(party).exists():
                nonce = exchange.nonce(party).read_bytes()
                if len(nonce) == NONCE and nonce not in seen:
                    seen.add(nonce)
                    place(exchange.evidence(party), service.evidence(nonce))
                    say(f"{job.parties[party].name} asked for evidence")
                    until = time.monotonic() + seconds
        for index, send in list(waiting.items()):
            if _take(exchange, job, service, index, seen, say):
                say(f"{job.parties[send.party].name} sent {send.slot}")
                del waiting[index]
                until = time.monotonic() + seconds
        missing = [f"{job.parties[send.party].name} ({send.slot})" for send in waiting.values()]
        _pause(until, seconds, "grant", missing)


def _take(
    exchange: Exchange,
    job: Job,
    service: Service,
    index: int,
    seen: set[bytes],
    say: Callable[[str], None],
) -> bool:
    """Takes one send if its grant and its sealed file are there; says why a grant is not taken."""
    send = job.sends[index]
    path = exchange.grant(send.slot, send.party)
    sealed = exchange.sealed(send.slot, send.party)
    # A file that is still being copied is waited for.
    if (
        not path.exists()
        or not sealed.exists()
        or sealed.stat().st_size != service.sealed_size(send)
    ):
        return False
    grant = path.read_bytes()
    if grant in seen:
        return False
    seen.add(grant)
    try:
        if check_grant(grant, job) != send:
            raise DocumentInvalid("grant-wrong", "it is for another slot or party")
        service.grant(grant)
    except (DocumentInvalid, EnclaveRefused) as error:
        say(f"what lies at {path} is no grant by {job.parties[send.party].name}: {error}")
        return False
    service.load(index, sealed)
    return True


def _pause(until: float, seconds: float, what: str, missing: list[str]) -> None:
    if not missing:
        return
    if time.monotonic() > until:
        raise ExchangeError(
            f"no {what} within {seconds:g} s from: {', '.join(missing)}; nothing was trained"
        )
    time.sleep(_POLL_SECONDS)
