"""Optimisers: what a step does to the weights, given the noisy mean gradient.

Both follow PyTorch's definitions (`torch.optim.SGD`, `torch.optim.Adam`, weight decay as L2 term).
They see only the released gradient, so they cost no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from myelin.errors import ModelRefused

_STATELESS = 16
"""Floats of state of an optimiser without state, so that the buffer is not empty."""


@dataclass(frozen=True, kw_only=True)
class SGD:
    """w ← w - lr · v, v ← momentum · v + g + weight_decay · w (v ← g + … in the first step)."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers outside their ranges; raises ModelRefused."""
        _check(self.lr > 0, "lr", self.lr, "positive")
        _check(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        if self.nesterov and self.momentum == 0:
            raise ModelRefused("nesterov needs a momentum above 0")

    def state(self, weights: int) -> int:
        """Floats of state for so many weights."""
        return weights if self.momentum else _STATELESS

    def kernel(self, cpu: Any, weights: int) -> Any:
        """The update of all weights: (weights, state, gradient, hyper), in place on two."""
        from myelin.kernels import update

        return update.sgd(
            cpu,
            weights,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Kingma and Ba, arXiv:1412.6980, with bias correction by the number of the step."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers outside their ranges; raises ModelRefused."""
        _check(self.lr > 0, "lr", self.lr, "positive")
        for beta in self.betas:
            _check(0 <= beta < 1, "betas", beta, "at least 0 and below 1")
        _check(self.eps > 0, "eps", self.eps, "positive")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")

    def state(self, weights: int) -> int:
        """Floats of state for so many weights: both moments."""
        return 2 * weights

    def kernel(self, cpu: Any, weights: int) -> Any:
        """The update of all weights: (weights, state, gradient, hyper), in place on two."""
        from myelin.kernels import update

        return update.adam(
            cpu,
            weights,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


Optimizer = SGD | Adam

_NAMES: dict[str, type[SGD] | type[Adam]] = {"sgd": SGD, "adam": Adam}


def optimizer_to_dict(optimizer: Optimizer, *, text: bool = False) -> dict[str, Any]:
    """Name and settings; with `text` every number as text, for documents without floats."""
    settings: dict[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(optimizer).items()
    }
    if text:
        settings = {key: str(value) for key, value in settings.items()}
    name = next(name for name, kind in _NAMES.items() if isinstance(optimizer, kind))
    return {"name": name, **settings}


def optimizer_from_dict(read: Mapping[str, Any]) -> Optimizer:
    """The inverse of `optimizer_to_dict` without `text`; raises ModelRefused for anything else."""
    if not isinstance(read, dict) or read.get("name") not in _NAMES:
        raise ModelRefused(f"an optimiser is an object whose name is one of {', '.join(_NAMES)}")
    kind = _NAMES[read["name"]]
    wanted = {"name", *kind.__dataclass_fields__}
    if set(read) != wanted:
        raise ModelRefused(f"optimiser {read['name']} has exactly the keys {sorted(wanted)}")
    settings = {key: value for key, value in read.items() if key != "name"}
    for key, value in settings.items():
        if key == "nesterov":
            fits = type(value) is bool
        elif key == "betas":
            fits = isinstance(value, list) and len(value) == 2 and all(map(_real, value))
        else:
            fits = _real(value)
        if not fits:
            raise ModelRefused(f"optimiser {read['name']}: {key} is {value!r}")
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    return kind(**settings)


def _real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check(condition: bool, name: str, value: float, wanted: str) -> None:
    if not condition or not math.isfinite(value):
        raise ModelRefused(f"{name} is {value}; it must be {wanted}")
