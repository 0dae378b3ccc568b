"""The models of the tables, each as torch and in Myelin's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from myelin import nn


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row family: `shape` is one example's, channels first."""

    name: str
    shape: tuple[int, ...]
    batch: int
    classes: int
    torch: Callable[[], torch.nn.Module]
    layers: Callable[[], nn.Layer]


def _mlp() -> torch.nn.Module:
    t = torch.nn
    return t.Sequential(
        t.Linear(784, 256), t.ReLU(), t.Linear(256, 128), t.ReLU(), t.Linear(128, 10)
    )


def _mlp_layers() -> nn.Layer:
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def _cnn() -> torch.nn.Module:
    t = torch.nn
    return t.Sequential(
        t.Conv2d(1, 16, 8, 2, padding=2),
        t.Tanh(),
        t.MaxPool2d(2, 1),
        t.Conv2d(16, 32, 4, 2),
        t.Tanh(),
        t.MaxPool2d(2, 1),
        t.Flatten(),
        t.Linear(512, 32),
        t.Tanh(),
        t.Linear(32, 10),
    )


def _cnn_layers() -> nn.Layer:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


SMALL = (
    Case(
        name="mlp 784-256-128-10",
        shape=(784,),
        batch=256,
        classes=10,
        torch=_mlp,
        layers=_mlp_layers,
    ),
    Case(
        name="mnist_cnn 26k",
        shape=(1, 28, 28),
        batch=256,
        classes=10,
        torch=_cnn,
        layers=_cnn_layers,
    ),
)


def _vgg_like(
    channels: tuple[int, ...], hidden: tuple[int, ...], activation: str
) -> tuple[list[tuple[str, tuple[int, ...]]], str]:
    """Two 3×3 convolutions and a pool for each pair of channels, then linear layers."""
    layers: list[tuple[str, tuple[int, ...]]] = []
    previous = 3
    for number, width in enumerate(channels):
        layers += [("conv", (previous, width)), (activation, ())]
        previous = width
        if number % 2:
            layers.append(("pool", ()))
    side = 32 >> len(channels) // 2
    layers.append(("flatten", ()))
    previous = previous * side * side
    for number, width in enumerate(hidden):
        layers.append(("linear", (previous, width)))
        previous = width
        if number < len(hidden) - 1:
            layers.append((activation, ()))
    return layers, activation


CIFAR = _vgg_like((32, 32, 64, 64, 128, 128), (128, 10), "tanh")[0]
VGG9 = _vgg_like((64, 64, 128, 128, 256, 256), (256, 256, 10), "relu")[0]


def _in_torch(layers: list[tuple[str, tuple[int, ...]]]) -> torch.nn.Module:
    t = torch.nn
    made: dict[str, Callable[..., torch.nn.Module]] = {
        "conv": lambda a, b: t.Conv2d(a, b, 3, padding=1),
        "tanh": t.Tanh,
        "relu": t.ReLU,
        "pool": lambda: t.MaxPool2d(2),
        "flatten": t.Flatten,
        "linear": t.Linear,
    }
    return t.Sequential(*(made[kind](*sizes) for kind, sizes in layers))


def _in_layers(layers: list[tuple[str, tuple[int, ...]]]) -> nn.Layer:
    made: dict[str, Callable[..., nn.Layer]] = {
        "conv": lambda a, b: nn.Conv2d(a, b, 3, padding=1),
        "tanh": nn.Tanh,
        "relu": nn.ReLU,
        "pool": lambda: nn.MaxPool2d(2),
        "flatten": nn.Flatten,
        "linear": nn.Linear,
    }
    return nn.Sequential(*(made[kind](*sizes) for kind, sizes in layers))


CASES = (
    *SMALL,
    *(
        Case(
            name=name,
            shape=(3, 32, 32),
            batch=64,
            classes=10,
            torch=lambda layers=layers: _in_torch(layers),
            layers=lambda layers=layers: _in_layers(layers),
        )
        for name, layers in (("cifar_cnn 550k", CIFAR), ("vgg9 2.3M", VGG9))
    ),
)


def case_named(name: str) -> Case:
    """The case of that name."""
    return next(case for case in CASES if case.name == name)
