"""How records keep their features, in sealed files and in the enclave's memory (docs/image.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from myelin.errors import UsageError

BYTES = {"float32": 4, "float16": 2, "uint8": 1}
_MICRO = 10**6


@dataclass(frozen=True, kw_only=True)
class Features:
    """The type of a feature; for uint8, u stands for (u - zero) / unit, both public.

    Pixels from 0 to 1 are `Features(type="uint8", unit=255)`, from -1 to 1
    `Features(type="uint8", unit=127.5, zero=127.5)`.
    """

    type: str = "float32"
    unit: float = 0.0
    zero: float = 0.0

    def __post_init__(self) -> None:
        """Refuses what docs/image.md does not allow."""
        if self.type not in BYTES:
            raise UsageError(f"features of type {self.type!r}: choose one of {', '.join(BYTES)}")
        if self.type != "uint8" and (self.unit or self.zero):
            raise UsageError(f"features of type {self.type} have no unit and no zero")
        if self.type == "uint8" and not (self.unit * _MICRO >= 1 and 0 <= self.zero < 4294.967296):
            raise UsageError(
                f"uint8 features need a unit of at least 1e-6 and a zero from 0 to 4294.967295, "
                f"not {self.unit} and {self.zero}"
            )

    @property
    def bytes(self) -> int:
        """Bytes of one feature."""
        return BYTES[self.type]

    def document(self) -> dict[str, Any]:
        """The fields of a description: the type, and unit and zero in micro."""
        return {
            "type": self.type,
            "unit": round(self.unit * _MICRO),
            "zero": round(self.zero * _MICRO),
        }

    @classmethod
    def from_document(cls, fields: Mapping[str, Any]) -> Features:
        """The inverse of `document`."""
        return cls(type=fields["type"], unit=fields["unit"] / _MICRO, zero=fields["zero"] / _MICRO)

    def decode(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The float32 values that the enclave computes with."""
        if stored.dtype != np.dtype(self.type):
            raise UsageError(f"features are {stored.dtype}, the image takes {self.type}")
        if self.type != "uint8":
            return stored.astype(np.float32)
        fields = self.document()
        whole = stored.astype(np.int64) * _MICRO - fields["zero"]
        return np.asarray(whole * (1 / fields["unit"]), dtype=np.float32)
