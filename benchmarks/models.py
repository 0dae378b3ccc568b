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


CASES = (
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
