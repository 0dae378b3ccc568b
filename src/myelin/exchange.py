"""The exchange folder: where parties and host leave files for each other.

Nobody needs to trust it: every file in it is public, signed or sealed. A shared folder, a
synchronised bucket or a memory stick will do. `N` is a party's index in the job.

    job.cbor  image.elf  model.json  weights.safetensors     the job and what it names
    approvals/N.cbor                                         each party
    sealed/SLOT-N.sealed                                     each sender
    nonces/N  →  evidence/N.cbor, endorsements.json          asked by a sender, answered by the host
    grants/SLOT-N.cbor                                       each sender, after appraisal
    outputs/SLOT-N.cbor, SLOT-N.sealed, receipt.cbor         the host, at the end
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from myelin.errors import ExchangeError


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """The paths of one exchange folder."""

    folder: Path

    @property
    def job(self) -> Path:
        """The job document."""
        return self.folder / "job.cbor"

    @property
    def image(self) -> Path:
        """The image's ELF file."""
        return self.folder / "image.elf"

    @property
    def model(self) -> Path:
        """The model file, to rebuild the image from."""
        return self.folder / "model.json"

    @property
    def weights(self) -> Path:
        """The public initial weights."""
        return self.folder / "weights.safetensors"

    @property
    def endorsements(self) -> Path:
        """Collateral for the quotes, JSON."""
        return self.folder / "endorsements.json"

    @property
    def receipt(self) -> Path:
        """The receipt file."""
        return self.folder / "receipt.cbor"

    def approval(self, party: int) -> Path:
        """A party's approval of the job."""
        return self.folder / "approvals" / f"{party}.cbor"

    def sealed(self, slot: str, party: int) -> Path:
        """A sender's sealed file."""
        return self.folder / "sealed" / f"{slot}-{party}.sealed"

    def nonce(self, party: int) -> Path:
        """32 random bytes by which a party asks for fresh evidence."""
        return self.folder / "nonces" / str(party)

    def evidence(self, party: int) -> Path:
        """The evidence for a party's nonce."""
        return self.folder / "evidence" / f"{party}.cbor"

    def grant(self, slot: str, party: int) -> Path:
        """A sender's grant to the running instance."""
        return self.folder / "grants" / f"{slot}-{party}.cbor"

    def envelope(self, slot: str, party: int) -> Path:
        """The key of a sealed output, sealed to its receiver."""
        return self.folder / "outputs" / f"{slot}-{party}.cbor"

    def output(self, slot: str, party: int) -> Path:
        """A sealed output."""
        return self.folder / "outputs" / f"{slot}-{party}.sealed"


def place(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def wait(path: Path, *, seconds: float, what: str) -> bytes:
    """The content of a file that somebody else will place; `ExchangeError` when nobody does."""
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise ExchangeError(f"{path} did not appear within {seconds:g} s: {what}")
        time.sleep(0.05)
    return path.read_bytes()
