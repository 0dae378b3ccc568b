"""The operations of a running enclave (docs/protocol.md), typed, over the frames of a cell.

Everything here runs on the untrusted host: it carries bytes and can stop progress, nothing more.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from myelin.errors import SealedFileInvalid
from myelin.seal import CHUNK, HEADER, TAG

_JOB, _APPROVE, _ATTEST, _GRANT, _OPEN, _CHUNKS, _WEIGHTS, _TRAIN, _FINISH, _OUTPUT = range(1, 11)
_WEIGHTS_PART = 1 << 19
_BATCH = 15
"""Chunks of a request: as many as fit."""


class Transport(Protocol):
    """What carries a request to the enclave and its reply back: a `myelin.cell.Cell`."""

    def request(self, operation: int, *body: bytes) -> bytes:
        """Sends one operation; raises `EnclaveRefused` or `CellDied`."""

    def stream(self, operation: int, bodies: Iterable[Sequence[bytes]]) -> None:
        """Sends one operation with each of `bodies`, ahead of the replies, which are dropped."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The instance's public keys and the report data that binds them to job and nonce."""

    hpke: bytes
    sign: bytes
    report_data: bytes


class Enclave:
    """One enclave instance; it serves one job and then dies."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def job(self, document: bytes) -> None:
        """Hands over the job; the enclave makes its instance keys."""
        self._transport.request(_JOB, document)

    def approve(self, approval: bytes) -> None:
        """Hands over one party's approval."""
        self._transport.request(_APPROVE, approval)

    def attest(self, nonce: bytes) -> Keys:
        """Asks for the keys and the 64 bytes of report data for a 32-byte nonce."""
        reply = self._transport.request(_ATTEST, nonce)
        return Keys(hpke=reply[:1216], sign=reply[1216:1281], report_data=reply[1281:1345])

    def grant(self, grant: bytes) -> None:
        """Hands over an owner's grant."""
        self._transport.request(_GRANT, grant)

    def load(
        self, index: int, sealed: BinaryIO, progress: Callable[[int], None] | None = None
    ) -> None:
        """Streams a sealed file in for entry `index` of the job's sends.

        `progress` is told the bytes of each request. The enclave checks every chunk and, after the
        last, the commitment.
        """
        header = sealed.read(HEADER)
        if len(header) != HEADER:
            raise SealedFileInvalid(
                "sealed-header-wrong", f"{len(header)} bytes are no header of {HEADER}"
            )
        self._transport.request(_OPEN, struct.pack("<I", index) + header)
        self._transport.stream(_CHUNKS, _bodies(index, sealed, progress))

    def weights(self, flat: bytes) -> None:
        """Hands over the public initial weights, flat float32; their digest stands in the job."""
        for start in range(0, len(flat), _WEIGHTS_PART):
            part = flat[start : start + _WEIGHTS_PART]
            self._transport.request(_WEIGHTS, struct.pack("<Q", start) + part)

    def train(self, *, steps: int, sample_rate: int, noise_multiplier: int) -> int:
        """Runs `steps` more steps and returns the steps done in all.

        Rate and noise are in the job's fixed-point units (2⁻³², micro).
        """
        body = struct.pack("<IQQ", steps, sample_rate, noise_multiplier)
        (done,) = struct.unpack("<I", self._transport.request(_TRAIN, body))
        return int(done)

    def finish(self) -> bytes:
        """Ends training, scores the test slot if the job has one, returns the signed receipt."""
        return self._transport.request(_FINISH)

    def output(self, index: int) -> tuple[bytes, Iterator[bytes]]:
        """Entry `index` of the job's receives: its envelope, and the pieces of its sealed file."""
        return self._part(index, 0), self._sealed(index)

    def _sealed(self, index: int) -> Iterator[bytes]:
        part = 1
        while piece := self._part(index, part):
            yield piece
            part += 1

    def _part(self, index: int, part: int) -> bytes:
        return self._transport.request(_OUTPUT, struct.pack("<II", index, part))


def _bodies(
    index: int, sealed: BinaryIO, progress: Callable[[int], None] | None
) -> Iterator[tuple[bytes, bytes]]:
    number = 0
    while chunks := sealed.read(_BATCH * (CHUNK + TAG)):
        yield struct.pack("<IQ", index, number), chunks
        if progress is not None:
            progress(len(chunks))
        number += _BATCH
