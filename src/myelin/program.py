"""What an image is built from: kernels, the order of their calls, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from myelin.kernels import object as kernel_object
from myelin.optimizer import Optimizer
from myelin.planner import Decision
from myelin.weights import Parameter


@dataclass(frozen=True, kw_only=True)
class Call:
    """A kernel and where its arguments lie, as byte offsets into the arena."""

    kernel: str
    offsets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """All that an image holds of a model: kernels, calls, and where things lie (docs/image.md).

    `buffers` maps x, y, mask, hyper, weights, gradient, state and output to (offset, bytes) in an
    arena of `arena` bytes. `features` is the number of float32 of one example, `additions` the
    longest chain of float32 additions over the examples of one physical batch. `decisions` has a
    row for every call of `gradient`, then of `update`.
    """

    kernels: Mapping[str, Any]
    gradient: tuple[Call, ...]
    predict: tuple[Call, ...]
    update: tuple[Call, ...]
    buffers: Mapping[str, tuple[int, int]]
    arena: int
    parameters: tuple[Parameter, ...]
    batch: int
    outputs: int
    features: int
    label_bytes: int
    loss: str
    optimizer: Optimizer
    additions: int
    clipping: tuple[tuple[str, str], ...]
    decisions: tuple[Decision, ...]

    def description(self) -> dict[str, Any]:
        """The parts of an image's description that come from here, but for scalars."""
        index = {name: i for i, name in enumerate(self.kernels)}
        return {
            "kernels": [
                {"name": name, "args": kernel_object.argument_bytes(kernel)}
                for name, kernel in self.kernels.items()
            ],
            **{
                phase: [[index[call.kernel], *call.offsets] for call in calls]
                for phase, calls in (
                    ("gradient", self.gradient),
                    ("predict", self.predict),
                    ("update", self.update),
                )
            },
            "buffers": {name: list(where) for name, where in self.buffers.items()},
            "parameters": [parameter.document() for parameter in self.parameters],
            "clipping": [{"layer": layer, "norm": norm} for layer, norm in self.clipping],
        }
