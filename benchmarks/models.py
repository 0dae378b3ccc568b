"""The models of the tables, each written once for PyTorch and for Myelin's own layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from myelin import nn


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row family: `shape` is one example's, channels first.

    `layers` makes the model of a library, which is `torch.nn` or `myelin.nn`: layers have the same
    names in both.
    """

    name: str
    shape: tuple[int, ...]
    batch: int
    layers: Callable[[Any], Any]
    classes: int = 10


class TorchResidual(torch.nn.Module):
    """x + body(x), its parameters named as those of `myelin.nn.Residual`."""

    def __init__(self, *body: torch.nn.Module, shortcut: torch.nn.Module | None = None) -> None:
        super().__init__()
        for i, layer in enumerate(body):
            self.add_module(str(i), layer)
        self.body, self.shortcut = body, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.body:
            y = layer(y)
        return y + (x if self.shortcut is None else self.shortcut(x))


def _mlp(lib: Any) -> Any:
    return lib.Sequential(
        *(lib.Linear(784, 256), lib.ReLU()),
        *(lib.Linear(256, 128), lib.ReLU()),
        lib.Linear(128, 10),
    )


def _cnn(lib: Any, width: float = 1) -> Any:
    """The convolutional model of DP-SGD papers; `width` multiplies its channels and units."""
    first, second, hidden = (int(n * width) for n in (16, 32, 32))
    return lib.Sequential(
        *(lib.Conv2d(1, first, 8, 2, padding=2), lib.Tanh(), lib.MaxPool2d(2, 1)),
        *(lib.Conv2d(first, second, 4, 2), lib.Tanh(), lib.MaxPool2d(2, 1)),
        *(lib.Flatten(), lib.Linear(second * 16, hidden), lib.Tanh(), lib.Linear(hidden, 10)),
    )


def _pyramid(
    lib: Any,
    widths: Sequence[int],
    dense: Sequence[int],
    activation: str,
    width: float = 1,
) -> Any:
    """Two 3×3 convolutions and a pool for each of `widths`, then linear layers."""
    layers, last = [], 3
    for channels in (int(n * width) for n in widths):
        for inputs in (last, channels):
            layers += [lib.Conv2d(inputs, channels, 3, padding=1), getattr(lib, activation)()]
        layers.append(lib.MaxPool2d(2))
        last = channels
    side = 32 >> len(widths)
    units = [last * side * side, *(int(n * width) for n in dense), 10]
    layers.append(lib.Flatten())
    for i, (inputs, outputs) in enumerate(pairwise(units)):
        layers += [getattr(lib, activation)()] * (i > 0) + [lib.Linear(inputs, outputs)]
    return lib.Sequential(*layers)


def _resnet32(lib: Any) -> Any:
    """Three stages of five blocks, group norm, 1×1 shortcuts."""
    theirs = lib is torch.nn
    residual = TorchResidual if theirs else nn.Residual

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[Any]:
        padding = kernel // 2
        return [
            lib.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
            lib.GroupNorm(8, outputs),
        ]

    layers, last = [*conv(3, 16, 3), lib.ReLU()], 16
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        for i in range(5):
            first = stride if i == 0 else 1
            body = [*conv(last, width, 3, first), lib.ReLU(), *conv(width, width, 3)]
            way = lib.Sequential(*conv(last, width, 1, first)) if first > 1 else None
            layers += [residual(*body, shortcut=way), lib.ReLU()]
            last = width
    pool = lib.AdaptiveAvgPool2d(1) if theirs else lib.GlobalAvgPool2d()
    return lib.Sequential(*layers, pool, lib.Flatten(), lib.Linear(64, 10))


_cifar = partial(_pyramid, widths=(32, 64, 128), dense=(128,), activation="Tanh")
_vgg9 = partial(_pyramid, widths=(64, 128, 256), dense=(256, 256), activation="ReLU")

CASES = (
    Case(name="mlp 784-256-128-10", shape=(784,), batch=256, layers=_mlp),
    Case(name="mnist_cnn 26k", shape=(1, 28, 28), batch=256, layers=_cnn),
    Case(name="cifar_cnn 550k", shape=(3, 32, 32), batch=64, layers=_cifar),
    Case(name="vgg9 2.3M", shape=(3, 32, 32), batch=64, layers=_vgg9),
    Case(name="resnet32 467k", shape=(3, 32, 32), batch=64, layers=_resnet32),
)
SMALL = CASES[:2]
WIDENED: dict[str, Callable[..., Any]] = {"mnist_cnn": _cnn, "cifar_cnn": _cifar, "vgg9": _vgg9}
"""Models that take `width`: what the scaling benchmark measures."""


def case_named(name: str) -> Case:
    """The one case whose name starts so; SystemExit names them all where there is none."""
    for case in CASES:
        if case.name.startswith(name):
            return case
    names = ", ".join(case.name.split()[0] for case in CASES)
    raise SystemExit(f"no model {name!r}: choose from {names}")


def cases_named(names: str) -> list[Case]:
    """The cases of a list of names with commas, or of "all"."""
    return list(CASES) if names == "all" else [case_named(name) for name in names.split(",")]
