"""Appraisal policies: what an owner demands of an enclave before it gets a key.

A policy is a strict TOML file. Only Intel's root is trusted by default; the simulator's root is
accepted only by a policy that names it under a key that says what that means.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from myelin.errors import PolicyInvalid

INTEL_ROOT = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""SHA-256 of Intel's SGX root certificate (DER), valid until 2049."""

TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
"""What a policy may accept. `Revoked` is not among them."""


class _Job(Protocol):
    @property
    def digest(self) -> bytes: ...
    @property
    def image(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Reference values and limits for `myelin.evidence.appraise`.

    A policy from a file becomes complete by `for_job`, which adds the job and, where the file
    names no measurement, the job's.
    """

    measurements: tuple[bytes, ...] = ()
    """Accepted MRENCLAVE values, 32 bytes each."""
    job: bytes | None = None
    """The digest of the one job accepted."""
    tcb_statuses: tuple[str, ...] = ("UpToDate",)
    advisories: tuple[str, ...] = ()
    """Intel advisories, such as INTEL-SA-00615, that may be open on the platform."""
    grace_days: int = 0
    """For so long after its TCB was superseded an `OutOfDate` platform may still be accepted."""
    dynamic_platforms: str = "refuse"
    """`allow` accepts multi-package platforms."""
    smt: str = "allow"
    """`refuse` rejects platforms with hyper-threading on."""
    simulator_root: str | None = None
    """SHA-256 (hex) of a simulator's root. With it the policy accepts that root only, and what it
    accepts is protected by nothing."""

    def __post_init__(self) -> None:
        """Refuse values that could never match, or would match too much."""
        _refuse_unless(
            all(len(value) == 32 for value in self.measurements), "a measurement has 32 bytes"
        )
        _refuse_unless(self.job is None or len(self.job) == 32, "a job digest has 32 bytes")
        for status in self.tcb_statuses:
            _refuse_unless(
                status in TCB_STATUSES, f"TCB status {status!r}: not one of {TCB_STATUSES}"
            )
        _refuse_unless(
            0 <= self.grace_days <= 3650, f"grace_days is {self.grace_days}, not 0 to 3650"
        )
        for key in ("dynamic_platforms", "smt"):
            value = getattr(self, key)
            _refuse_unless(value in ("allow", "refuse"), f"{key} is {value!r}: allow or refuse")
        root = self.simulator_root
        if root is not None:
            _refuse_unless(
                len(root) == 64 and not set(root) - set("0123456789abcdef"),
                f"the simulator's root is {root!r}, not a SHA-256 in lower-case hex",
            )
            _refuse_unless(root != INTEL_ROOT, "the simulator's root is Intel's")

    @property
    def root(self) -> str:
        """SHA-256 (hex) of the only root accepted."""
        return self.simulator_root or INTEL_ROOT

    @classmethod
    def dangerous_simulation(cls, root: str | os.PathLike[str], **limits: Any) -> Policy:
        """A policy that accepts a simulator's enclaves: function is shown, nothing is protected.

        root: SHA-256 of the root certificate in hex, or the path of its PEM file.
        """
        return cls(simulator_root=_root_digest(root), **limits)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy file; paths in it are relative to it. Raises `PolicyInvalid`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyInvalid(f"{path}: {error}") from None
        try:
            return cls.parse(text, folder=Path(path).parent)
        except PolicyInvalid as error:
            raise PolicyInvalid(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str, *, folder: Path = Path()) -> Policy:
        """Parse the text of a policy file. Raises `PolicyInvalid`, naming the key."""
        try:
            fields = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PolicyInvalid(str(error)) from None
        for key, value in fields.items():
            _refuse_unless(key in _KEYS, f"unknown key {key!r}; known are {', '.join(_KEYS)}")
            kind = _KEYS[key]
            _refuse_unless(_is(value, kind), f"{key} is not of the kind {kind}")
        _refuse_unless(fields.get("type") == "myelin/policy/1", 'type is not "myelin/policy/1"')
        made: dict[str, Any] = {
            key: tuple(fields[key]) for key in ("tcb_statuses", "advisories") if key in fields
        }
        made |= {key: fields[key] for key in _SCALARS if key in fields}
        made["measurements"] = tuple(
            _digest("measurements", value) for value in fields.get("measurements", [])
        )
        if "job" in fields:
            made["job"] = _digest("job", fields["job"])
        if _SIMULATOR in fields:
            root = fields[_SIMULATOR]
            made["simulator_root"] = _root_digest(root if _is_digest(root) else folder / root)
        return cls(**made)

    def for_job(self, job: _Job) -> Policy:
        """Demand this job, and its image's measurement.

        Raises `PolicyInvalid` where the policy is for another job or image.
        """
        _refuse_unless(self.job in (None, job.digest), "the policy is for another job")
        measurement: bytes = job.image.measurement
        _refuse_unless(
            not self.measurements or measurement in self.measurements,
            f"the job's measurement {measurement.hex()} is not one of the policy's",
        )
        return replace(self, job=job.digest, measurements=(measurement,))


_SIMULATOR = "danger_simulator_root"
_SCALARS = ("grace_days", "dynamic_platforms", "smt")

_KEYS: Mapping[str, str] = {
    "type": "string",
    "measurements": "list of strings",
    "job": "string",
    "tcb_statuses": "list of strings",
    "advisories": "list of strings",
    "grace_days": "integer",
    "dynamic_platforms": "string",
    "smt": "string",
    _SIMULATOR: "string",
}


def _is(value: object, kind: str) -> bool:
    if kind == "string":
        return isinstance(value, str)
    if kind == "integer":
        return type(value) is int
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_digest(value: str) -> bool:
    return len(value) == 64 and not set(value.lower()) - set("0123456789abcdef")


def _digest(key: str, value: str) -> bytes:
    _refuse_unless(_is_digest(value), f"{key}: {value!r} is not 64 hex digits")
    return bytes.fromhex(value)


def _root_digest(root: str | os.PathLike[str]) -> str:
    if isinstance(root, str) and _is_digest(root):
        return root.lower()
    try:
        certificate = x509.load_pem_x509_certificate(Path(root).read_bytes())
    except (OSError, ValueError) as error:
        raise PolicyInvalid(f"{_SIMULATOR}: {error}") from None
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def _refuse_unless(holds: bool, detail: str) -> None:
    if not holds:
        raise PolicyInvalid(detail)
