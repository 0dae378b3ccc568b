"""`make bench-accuracy`: loss curves of our kernels beside PyTorch's, from one start.

`python -m benchmarks.accuracy [--models NAME,…] [--steps N]`. The same weights, the same batches,
no noise: the kernels of a private image, norms and factors included, run outside any enclave with a
threshold that clips nothing. What float32 alone does is shown by PyTorch against itself: in another
memory layout, with each batch in another order, and with it in halves; what bfloat16 does by a bf16
image and by PyTorch's autocast.
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
VARIANTS = ("PyTorch, channels_last", "PyTorch, batch reversed", "PyTorch, batch in halves")
"""What computes the same as the reference, and rounds otherwise."""
MEASURES = {"Myelin": VARIANTS, "Myelin, bf16": ("PyTorch, bf16",)}
"""What the largest difference of each of ours is held against: the largest of these."""
WITHIN = 3
"""Times what PyTorch differs from itself: more than that, rounding alone does not explain."""
DRAWN = ("Myelin", REFERENCE, VARIANTS[0], "Myelin, bf16", "PyTorch, bf16")

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
    drawn = {
        case: {name: losses for name, losses in values.items() if name in DRAWN}
        for case, values in found.items()
    }
    picture = pictures.losses(drawn, folder)
    return Section(
        title="Accuracy",
        text=(
            f"Mean loss of each step's batch before the step, {steps} steps of SGD with rate "
            f"{RATE} and momentum {MOMENTUM} on scikit-learn's digits, enlarged: the same start "
            "and batches, nothing noised, nothing clipped. Ours are the kernels of a private "
            "image. PyTorch against itself (in channels_last, with each batch in reverse, with its "
            "halves one after the other) shows how far rounding alone leads, its bf16 autocast how "
            "far bfloat16 does. The criterion is that of all steps the largest difference of our "
            f"loss from PyTorch's lies within {WITHIN} times what PyTorch differs from itself: in "
            "float32 by the largest of the three, in bf16 by its bf16 from its float32. "
            + ("" if has_bf16() else f"{Cpu.native().level} has no bf16: those curves are missing.")
        ).strip(),
        tables=[criterion(found), *(table(model, values) for model, values in found.items())],
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
        VARIANTS[0]: lambda: theirs(case, model, drawn, last),
        VARIANTS[1]: lambda: theirs(case, model, [(x[::-1], y[::-1]) for x, y in drawn], plain),
        VARIANTS[2]: lambda: theirs(case, model, drawn, plain, parts=2),
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
    cpu = Cpu.native(precision).of(precision)
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
    parts: int = 1,
) -> list[float]:
    """By PyTorch, from the same weights; a batch in so many parts, whose gradients are summed."""
    torch.set_num_threads(THREADS)
    net = case.layers(torch.nn)
    net.load_state_dict({name: torch.tensor(value) for name, value in model.parameters.items()})
    net = net.to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    for x, y in drawn:
        optimizer.zero_grad()
        found = []
        for some, labels in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
            images = torch.tensor(some.copy()).contiguous(memory_format=layout)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                outputs = net(images).float()
            loss = torch.nn.functional.cross_entropy(outputs, torch.tensor(labels.copy()).long())
            (loss * (len(labels) / len(y))).backward()
            found.append(outputs.detach().numpy())
        losses.append(cross_entropy(np.concatenate(found), y))
        optimizer.step()
    return losses


def cross_entropy(outputs: Any, labels: Any) -> float:
    """Mean loss of logits [examples, classes]."""
    logits = outputs.astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-chances[np.arange(len(labels)), labels].mean())


def criterion(found: dict[str, dict[str, list[float]]]) -> Table:
    """The largest difference of every system, and for ours whether it is within the criterion."""
    rows = []
    for model, curves in found.items():
        largest = apart(curves)
        for name, difference in largest.items():
            bf16 = name.endswith("bf16")
            measure = max(
                largest[other] for other in MEASURES["Myelin, bf16" if bf16 else "Myelin"]
            )
            far = math.inf if difference else 0.0
            quotient = difference / measure if measure else far
            met = "–" if name not in MEASURES else "yes" if quotient <= WITHIN else "no"
            rows.append((model, name, f"{difference:.1e}", f"{quotient:.2f}", met))
    return Table(
        title="Largest difference of the loss, beside what PyTorch differs from itself",
        columns=(
            *("model", "system", "largest difference"),
            *("÷ that of PyTorch from itself", f"within {WITHIN} times"),
        ),
        rows=rows,
        words=2,
    )


def apart(curves: dict[str, list[float]]) -> dict[str, float]:
    """The largest difference of each system from the reference, of all steps."""
    return {
        name: float(np.abs(np.subtract(losses, curves[REFERENCE])).max())
        for name, losses in curves.items()
        if name != REFERENCE
    }


def table(model: str, found: dict[str, list[float]]) -> Table:
    """Every tenth part of the way, and the largest differences of all steps."""
    reference, largest = found[REFERENCE], apart(found)
    steps = len(reference)
    shown = sorted({*range(0, steps, max(1, steps // 10)), steps - 1})
    return Table(
        title=f"{model}: loss, and its difference from that of PyTorch in float32",
        columns=("step", REFERENCE, *largest),
        rows=[
            *(
                (
                    str(i + 1),
                    f"{reference[i]:.5f}",
                    *(f"{found[name][i] - reference[i]:+.1e}" for name in largest),
                )
                for i in shown
            ),
            ("largest of all", "", *(f"{value:.1e}" for value in largest.values())),
        ],
        words=1,
    )


if __name__ == "__main__":
    main()
