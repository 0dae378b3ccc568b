"""Layers for people with neither torch nor ONNX.

A layer declares an operator and its parameters; nothing is computed here. `myelin.importers.load`
turns a layer, an example and a seed into a `Model`, with parameters named as PyTorch names them
("0.weight", "2.0.bias") and drawn from the distributions that PyTorch uses.

Shapes leave out the batch: an image is (channels, height, width), a row of features (features,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from myelin.model import Builder, Node


class Layer(Protocol):
    """Anything that appends its operators to a builder and returns the name of its output."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append this layer, called `name`, applied to the value `x`."""
        ...  # pragma: no cover


class Sequential:
    """Layers one after another."""

    def __init__(self, *layers: Layer) -> None:
        """`layers` in order of application; may be empty inside `Residual` (the identity)."""
        self.layers = layers

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the layers in order."""
        for i, layer in enumerate(self.layers):
            x = layer.build(builder, _join(name, i), x, generator)
        return x


class Residual:
    """x + body(x)."""

    def __init__(self, *body: Layer, shortcut: Layer | None = None) -> None:
        """`shortcut` replaces the identity where the body changes the shape."""
        self.body = Sequential(*body)
        self.shortcut = shortcut

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append body, shortcut and their sum."""
        y = self.body.build(builder, name, x, generator)
        if self.shortcut is not None:
            x = self.shortcut.build(builder, _join(name, "shortcut"), x, generator)
        return builder.append(Node(op="add", inputs=(y, x)))


class Concat:
    """Branches applied to the same value, joined along the first axis (channels or features)."""

    def __init__(self, *branches: Layer) -> None:
        """At least two branches."""
        self.branches = branches

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the branches and their concatenation."""
        ends = tuple(
            branch.build(builder, _join(name, i), x, generator)
            for i, branch in enumerate(self.branches)
        )
        return builder.append(Node(op="concat", inputs=ends, attributes={"axis": 0}))


@dataclass(frozen=True)
class Linear:
    """y = x Wᵀ + b over the last axis; W [out, in], b [out], uniform in ±1/√in."""

    features_in: int
    features_out: int
    bias: bool = True

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the product."""
        shape = (self.features_out, self.features_in)
        weights = _uniform(builder, name, shape, self.features_in, self.bias, generator)
        return builder.append(Node(op="linear", inputs=(x, *weights)))


@dataclass(frozen=True)
class Conv2d:
    """2-D cross-correlation; W [out, in, kh, kw], b [out], uniform in ±1/√(in·kh·kw)."""

    channels_in: int
    channels_out: int
    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    bias: bool = True

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the convolution."""
        kernel = _pair(self.kernel)
        shape = (self.channels_out, self.channels_in, *kernel)
        weights = _uniform(builder, name, shape, math.prod(shape[1:]), self.bias, generator)
        attributes = {"stride": _pair(self.stride), "padding": _pair(self.padding) * 2}
        return builder.append(Node(op="conv2d", inputs=(x, *weights), attributes=attributes))


@dataclass(frozen=True)
class GroupNorm:
    """Each example's channels normalised in `groups` groups, then scaled and shifted a channel."""

    groups: int
    channels: int
    epsilon: float = 1e-5

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the normalisation."""
        weights = _scale(builder, name, (self.channels,))
        attributes = {"groups": self.groups, "epsilon": self.epsilon}
        return builder.append(Node(op="group_norm", inputs=(x, *weights), attributes=attributes))


@dataclass(frozen=True)
class LayerNorm:
    """Each example's last axes, of the given shape, normalised, scaled and shifted."""

    shape: int | tuple[int, ...]
    epsilon: float = 1e-5

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the normalisation."""
        shape = (self.shape,) if isinstance(self.shape, int) else tuple(self.shape)
        weights = _scale(builder, name, shape)
        attributes = {"axes": len(shape), "epsilon": self.epsilon}
        return builder.append(Node(op="layer_norm", inputs=(x, *weights), attributes=attributes))


@dataclass(frozen=True)
class MaxPool2d:
    """Maximum of each window; the stride is the kernel unless given."""

    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] | None = None
    padding: int | tuple[int, int] = 0

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the pooling."""
        return builder.append(Node(op="max_pool2d", inputs=(x,), attributes=_window(self)))


@dataclass(frozen=True)
class AvgPool2d:
    """Mean of each window, zero padding counted; the stride is the kernel unless given."""

    kernel: int | tuple[int, int]
    stride: int | tuple[int, int] | None = None
    padding: int | tuple[int, int] = 0

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the pooling."""
        attributes = {**_window(self), "count_padding": True}
        return builder.append(Node(op="avg_pool2d", inputs=(x,), attributes=attributes))


@dataclass(frozen=True)
class GlobalAvgPool2d:
    """Mean over height and width: (channels, h, w) to (channels, 1, 1)."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the pooling."""
        return builder.append(Node(op="global_avg_pool2d", inputs=(x,)))


@dataclass(frozen=True)
class Flatten:
    """All axes in one, in the order channels, height, width."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the reshape."""
        shape = (math.prod(builder.shape(x)),)
        return builder.append(Node(op="reshape", inputs=(x,), attributes={"shape": shape}))


@dataclass(frozen=True)
class Reshape:
    """Another shape (without the batch) of the same numbers."""

    shape: tuple[int, ...]

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the reshape."""
        attributes = {"shape": tuple(self.shape)}
        return builder.append(Node(op="reshape", inputs=(x,), attributes=attributes))


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the function."""
        return builder.append(Node(op="relu", inputs=(x,)))


@dataclass(frozen=True)
class Tanh:
    """tanh(x)."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the function."""
        return builder.append(Node(op="tanh", inputs=(x,)))


@dataclass(frozen=True)
class Sigmoid:
    """1 / (1 + e⁻ˣ)."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the function."""
        return builder.append(Node(op="sigmoid", inputs=(x,)))


@dataclass(frozen=True)
class SiLU:
    """x / (1 + e⁻ˣ)."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the function."""
        return builder.append(Node(op="silu", inputs=(x,)))


@dataclass(frozen=True)
class GELU:
    """x Φ(x), or its tanh approximation (Hendrycks and Gimpel, arXiv:1606.08415)."""

    approximate: Literal["none", "tanh"] = "none"

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the function."""
        attributes = {"approximate": self.approximate}
        return builder.append(Node(op="gelu", inputs=(x,), attributes=attributes))


@dataclass(frozen=True)
class Softmax:
    """Softmax over the last axis."""

    def build(self, builder: Builder, name: str, x: str, generator: np.random.Generator) -> str:
        """Append the function."""
        return builder.append(Node(op="softmax", inputs=(x,)))


def _uniform(
    builder: Builder,
    name: str,
    shape: tuple[int, ...],
    fan_in: int,
    bias: bool,
    generator: np.random.Generator,
) -> tuple[str, ...]:
    bound = 1 / math.sqrt(max(fan_in, 1))
    draws = [("weight", shape)] + [("bias", shape[:1])] * bias
    return tuple(
        builder.parameter(
            _join(name, kind), generator.uniform(-bound, bound, drawn).astype(np.float32)
        )
        for kind, drawn in draws
    )


def _scale(builder: Builder, name: str, shape: tuple[int, ...]) -> tuple[str, str]:
    return (
        builder.parameter(_join(name, "weight"), np.ones(shape, np.float32)),
        builder.parameter(_join(name, "bias"), np.zeros(shape, np.float32)),
    )


def _window(pool: MaxPool2d | AvgPool2d) -> dict[str, tuple[int, ...]]:
    stride = pool.kernel if pool.stride is None else pool.stride
    return {
        "kernel": _pair(pool.kernel),
        "stride": _pair(stride),
        "padding": _pair(pool.padding) * 2,
    }


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _join(prefix: str, name: str | int) -> str:
    return f"{prefix}.{name}" if prefix else str(name)
