"""Named parameters to the flat weights of an image and back; numpy only.

A parameter lies at its offset in the axis order `layout` of its shape, every one 64-byte aligned,
zeros between (docs/image.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from myelin.errors import DataRefused

ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Where a parameter lies: `offset` in bytes, `stored = value.transpose(layout)`."""

    name: str
    shape: tuple[int, ...]
    layout: tuple[int, ...]
    offset: int

    def __post_init__(self) -> None:
        """Refuse what no description may hold; raises DataRefused."""
        if sorted(self.layout) != list(range(len(self.shape))):
            raise DataRefused(f"parameter {self.name}: layout {self.layout} permutes no axes")
        if self.offset % ALIGNMENT or self.offset < 0:
            raise DataRefused(f"parameter {self.name}: offset {self.offset} is no multiple of 64")

    @property
    def bytes(self) -> int:
        """Bytes that the parameter takes."""
        return 4 * math.prod(self.shape)

    @property
    def stored(self) -> tuple[int, ...]:
        """Its shape as stored."""
        return tuple(self.shape[axis] for axis in self.layout)

    def document(self) -> dict[str, Any]:
        """Its entry in a description."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


class HasParameters(Protocol):
    """A program, or anything else that knows where its parameters lie."""

    @property
    def parameters(self) -> Iterable[Parameter]:
        """The parameters."""
        ...  # pragma: no cover


Places = HasParameters | Iterable[Parameter] | Iterable[Mapping[str, Any]]
"""A program, or the `parameters` of an image's description."""


def place(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Parameter, ...]:
    """Lay parameters, name → (shape, layout), one after another."""
    parameters: list[Parameter] = []
    offset = 0
    for name, (shape, layout) in shapes.items():
        parameters.append(Parameter(name=name, shape=shape, layout=layout, offset=offset))
        offset = align(offset + parameters[-1].bytes)
    return tuple(parameters)


def flat_size(places: Places) -> int:
    """D: the number of float32 of the flat weights."""
    return max((align(p.offset + p.bytes) for p in _parameters(places)), default=0) // 4


def pack(places: Places, values: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """The flat weights float32 [D]; raises DataRefused for missing or misshapen parameters."""
    parameters = _parameters(places)
    names = {p.name for p in parameters}
    if set(values) != names:
        odd = sorted(set(values) ^ names)
        raise DataRefused(f"the weights and the image differ in the parameters {', '.join(odd)}")
    flat = np.zeros(flat_size(parameters), np.float32)
    for p in parameters:
        value = np.asarray(values[p.name])
        if value.shape != p.shape or value.dtype != np.float32:
            raise DataRefused(
                f"parameter {p.name} is {value.dtype}{list(value.shape)}, the image needs "
                f"float32{list(p.shape)}"
            )
        first = p.offset // 4
        flat[first : first + value.size] = value.transpose(p.layout).ravel()
    return flat


def unpack(places: Places, flat: npt.NDArray[Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Name → value in the model's own axis order; raises DataRefused for another length or type."""
    parameters = _parameters(places)
    if flat.shape != (flat_size(parameters),) or flat.dtype != np.float32:
        raise DataRefused(
            f"flat weights are {flat.dtype}{list(flat.shape)}, the image has "
            f"float32[{flat_size(parameters)}]"
        )
    values = {}
    for p in parameters:
        first = p.offset // 4
        stored = flat[first : first + math.prod(p.shape)].reshape(p.stored)
        values[p.name] = np.ascontiguousarray(stored.transpose(np.argsort(p.layout)))
    return values


def align(offset: int) -> int:
    """The next multiple of 64."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _parameters(places: Places) -> list[Parameter]:
    entries: Any = getattr(places, "parameters", places)
    return [
        entry
        if isinstance(entry, Parameter)
        else Parameter(
            name=entry["name"],
            shape=tuple(entry["shape"]),
            layout=tuple(entry["layout"]),
            offset=entry["offset"],
        )
        for entry in entries
    ]
