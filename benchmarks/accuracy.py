"""`make bench-accuracy`: loss curves of our kernels beside PyTorch's, from one start.

`python -m benchmarks.accuracy [--models NAME,…] [--steps N]`. The same weights, the same batches,
no noise: the kernels of a private image, norms and factors included, run outside any enclave with a
threshold that clips nothing. What float32 alone does is shown by PyTorch against itself in another
memory layout, what bfloat16 does by a bf16 image and by PyTorch's autocast.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_NUM_THREADS", "2")

import numpy as np
import torch

from benchmarks import pictures, report
from benchmarks.models import Case, case_named
from benchmarks.report import BUILD, THREADS, Section, Table
from myelin import nn
from myelin.cpu import Cpu, Precision
from myelin.importers import load
from myelin.model import Model
from myelin.optimizer import SGD
from myelin.outside import Outside
from myelin.plan import compile_training
from myelin.weights import pack

MODELS = ("cifar_cnn", "vgg9")
STEPS = 200
RATE, MOMENTUM = 0.001, 0.9
UNCLIPPED = 1e6
"""A threshold above every gradient's norm."""

REFERENCE = "PyTorch"

Batches = list[tuple[Any, Any]]


def main() -> None:
    """Trains, prints, draws build/losses.svg."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args()
    with report.alone():
        section(asked.models.split(","), asked.steps, BUILD).print()


def section(models: Sequence[str], steps: int, folder: Path) -> Section:
    """A table a model, and a picture."""
    cases = [case_named(model) for model in models]
    found = {case.name: curves(case, steps) for case in cases}
    report.say("")
    picture = pictures.losses(found, folder)
    return Section(
        title="Accuracy",
        text=(
            f"Mean loss of each step's batch before the step, {steps} steps of SGD with rate "
            f"{RATE} and momentum {MOMENTUM} on scikit-learn's digits, enlarged: the same start "
            "and batches, nothing noised, nothing clipped. Ours are the kernels of a private "
            "image. PyTorch against itself in channels_last shows how far rounding alone leads, "
            "its bf16 autocast how far bfloat16 does. "
            + ("" if has_bf16() else f"{Cpu.native().level} has no bf16: those curves are missing.")
        ).strip(),
        tables=[table(model, values) for model, values in found.items()],
        pictures=[("Loss curves", picture)],
    )


def curves(case: Case, steps: int) -> dict[str, list[float]]:
    """The losses of each system."""
    model = started(load(case.layers(nn), case.shape))
    drawn = batches(case, steps)
    plain, last = torch.contiguous_format, torch.channels_last
    systems: dict[str, Callable[[], list[float]]] = {
        "Myelin": lambda: ours(case, model, drawn, "float32"),
        REFERENCE: lambda: theirs(case, model, drawn, plain),
        "PyTorch, channels_last": lambda: theirs(case, model, drawn, last),
    }
    if has_bf16():
        systems |= {
            "Myelin, bf16": lambda: ours(case, model, drawn, "bf16"),
            "PyTorch, bf16": lambda: theirs(case, model, drawn, last, autocast=True),
        }
    found = {}
    for name, train in systems.items():
        report.say(f"{case.name}: {steps} steps of {name}")
        found[name] = train()
    return found


def has_bf16() -> bool:
    """Whether this machine's level has the precision."""
    return "bf16" in Cpu.native().precisions


def started(model: Model) -> Model:
    """With weights √6 times those that layers start with, whose variance is 1 / (3 · fan-in).

    That is 2 / fan-in (He et al., 2015, equation 10): from the usual start vgg9, which has no
    norms, stays where it is for half of the steps, and curves that do not move agree for nothing.
    """
    larger = {
        name: value * np.float32(math.sqrt(6)) if value.ndim > 1 else value
        for name, value in model.parameters.items()
    }
    return dataclasses.replace(model, parameters=larger)


def batches(case: Case, steps: int) -> Batches:
    """Digits as images of the case's shape, at random but the same for everybody."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    channels, height, width = case.shape
    large = np.kron(digits.images / 16, np.ones((4, 4)))
    edge = (large.shape[1] - height) // 2
    large = (large - large.mean()) / large.std()
    large = large[:, None, edge : edge + height, edge : edge + width]
    images = np.repeat(large, channels, axis=1).astype(np.float32)
    labels = digits.target.astype(np.int32)
    generator = np.random.default_rng(0)
    chosen = [generator.choice(len(labels), case.batch, replace=False) for _ in range(steps)]
    return [(images[rows], labels[rows]) for rows in chosen]


def ours(case: Case, model: Model, drawn: Batches, precision: Precision) -> list[float]:
    """By the compiled kernels; the loss in float64 from what `predict` gives."""
    cpu = Cpu.native()
    program = compile_training(
        model,
        loss="cross-entropy",
        optimizer=SGD(lr=RATE, momentum=MOMENTUM),
        batch=case.batch,
        cpu=cpu,
        precision=precision,
    )
    outside = Outside(program, cpu)
    weights = pack(program, model.parameters)
    everyone = np.ones(case.batch, np.float32)
    losses = []
    for step, (x, y) in enumerate(drawn, 1):
        losses.append(cross_entropy(outside.predict(x, weights), y))
        total = outside.gradient(x, y, everyone, weights, UNCLIPPED)
        weights = outside.update(total / case.batch, step)
    return losses


def theirs(
    case: Case,
    model: Model,
    drawn: Batches,
    layout: torch.memory_format,
    *,
    autocast: bool = False,
) -> list[float]:
    """By PyTorch, from the same weights."""
    torch.set_num_threads(THREADS)
    net = case.layers(torch.nn)
    net.load_state_dict({name: torch.tensor(value) for name, value in model.parameters.items()})
    net = net.to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    for x, y in drawn:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = net(torch.tensor(x).contiguous(memory_format=layout)).float()
        losses.append(cross_entropy(outputs.detach().numpy(), y))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(outputs, torch.tensor(y).long()).backward()
        optimizer.step()
    return losses


def cross_entropy(outputs: Any, labels: Any) -> float:
    """Mean loss of logits [examples, classes]."""
    logits = outputs.astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-chances[np.arange(len(labels)), labels].mean())


def table(model: str, found: dict[str, list[float]]) -> Table:
    """Every tenth part of the way, and the largest differences of all steps."""
    reference = found[REFERENCE]
    others = [name for name in found if name != REFERENCE]
    apart = {name: np.abs(np.subtract(found[name], reference)).max() for name in others}
    steps = len(reference)
    shown = sorted({*range(0, steps, max(1, steps // 10)), steps - 1})
    return Table(
        title=f"{model}: loss, and its difference from that of PyTorch in float32",
        columns=("step", REFERENCE, *others),
        rows=[
            *(
                (
                    str(i + 1),
                    f"{reference[i]:.5f}",
                    *(f"{found[name][i] - reference[i]:+.1e}" for name in others),
                )
                for i in shown
            ),
            ("largest of all", "", *(f"{apart[name]:.1e}" for name in others)),
        ],
        words=1,
    )


if __name__ == "__main__":
    main()
