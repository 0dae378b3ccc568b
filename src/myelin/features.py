"""How records keep their features, in sealed files and in the enclave's memory (docs/image.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from myelin.errors import UsageError

BYTES = {"float32": 4, "float16": 2, "uint8": 1}
_MICRO = 10**6
MOST_UNIT, MOST_ZERO = 1 << 36, (1 << 31) - 1
"""Of a description, in micro. The enclave subtracts a zero from a byte in 32 bits."""


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
        if self.type == "uint8":
            _check("unit", self.unit, 1, MOST_UNIT)
            _check("zero", self.zero, 0, MOST_ZERO)

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


def _check(name: str, value: float, least: int, most: int) -> None:
    """Refuses what is not in least … most micro, as the description keeps it; NaN never is."""
    if not (math.isfinite(value) and least <= round(value * _MICRO) <= most):
        raise UsageError(
            f"uint8 features need a {name} from {least / _MICRO:.6f} to {most / _MICRO:.6f}, "
            f"not {value}"
        )
