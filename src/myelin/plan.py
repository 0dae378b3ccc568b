"""From a training graph to a list of kernel calls on one arena.

`compile_training` lowers the Relax functions of `myelin.training` (`myelin.lowering`), each
operator by its template (`myelin.operators`), and places all memory. The result is a `Program`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from myelin import clipping, planner, training
from myelin.cpu import Cpu, Precision
from myelin.errors import ModelRefused
from myelin.graph import Objective, check_loss
from myelin.kernels import bounds
from myelin.kernels import object as kernel_object
from myelin.kernels.update import HYPER
from myelin.lowering import Buffer, Kernels, Lowering, Value, allocate
from myelin.model import Model
from myelin.operators import TEMPLATES
from myelin.optimizer import Optimizer
from myelin.outside import Outside
from myelin.planner import Decision
from myelin.program import Call, Program
from myelin.weights import Parameter, align, flat_size, place

__all__ = ["Outside", "Program", "compile_training"]

ARENA_LIMIT = (1 << 32) - 64
"""Bytes of an arena: the enclave keeps offsets in 32 bits."""


def compile_training(
    model: Model,
    *,
    loss: str,
    optimizer: Optimizer,
    batch: int,
    cpu: Cpu,
    precision: Precision = "float32",
    private: bool = True,
    stored_bytes: int = planner.STORED_BYTES,
    threads: int = 2,
    dump: Path | None = None,
) -> Program:
    """Derive the training graph of `model` and plan it for physical batches of `batch` examples.

    `private=False` leaves norms and factors out and sums the unmasked examples' gradients: a
    baseline, never an image. `precision` is one of `cpu.precisions`. `stored_bytes` bounds the
    memory for the stored per-example gradients of all convolutions together. `threads` are those
    that times are predicted for; nothing else depends on them. `dump` receives the IR after each
    pass, one file each. Raises ModelRefused or UnsupportedLayer, or BoundsError where a
    kernel cannot be shown to be safe.
    """
    if precision not in cpu.precisions:
        raise ModelRefused(
            f"precision {precision!r}: {cpu.level} has {', '.join(cpu.precisions)} only"
        )
    objective = Objective(
        names=tuple(model.shapes),
        loss=check_loss(loss),
        clipping="per-example" if private else "none",
        precision=precision,
        level=cpu.level,
        stored_bytes=stored_bytes,
    )
    if batch < 1:
        raise ModelRefused(f"a physical batch has at least 1 example, not {batch}")
    if loss == "cross-entropy" and model.outputs < 2:
        raise ModelRefused(
            "cross-entropy needs 2 outputs or more: use binary-cross-entropy for one"
        )
    recorder = _Recorder(dump)
    forward = model.relax(batch)
    recorder("import", forward)
    graph = training.training_graph(forward, objective, record=recorder)
    library = Kernels(
        cpu=cpu, precision=precision, linear=clipping.LINEAR[precision], threads=threads
    )
    return _plan(model, forward, graph, objective, optimizer, batch, library, recorder)


def _plan(
    model: Model,
    forward: Any,
    graph: Any,
    objective: Objective,
    optimizer: Optimizer,
    batch: int,
    library: Kernels,
    recorder: _Recorder,
) -> Program:
    parameters = place({n: (s, model.layout(n)) for n, s in model.shapes.items()})
    weights = flat_size(parameters)
    features = math.prod(model.input)
    label_bytes = 4 if objective.loss == "cross-entropy" else 4 * model.outputs
    sizes = {
        "x": 4 * batch * features,
        "y": batch * label_bytes,
        "mask": 4 * batch,
        "hyper": 4 * HYPER,
        "weights": 4 * weights,
        "gradient": 4 * weights,
        "state": 4 * optimizer.state(weights),
        "output": 4 * batch * model.outputs,
    }
    base, buffers = 0, {}
    for name, size in sizes.items():
        buffers[name] = (base, size)
        base = align(base + size)

    def fixed(name: str) -> Buffer:
        return Buffer(bytes=sizes[name], offset=buffers[name][0])

    def inside(name: str) -> list[Value]:
        at = buffers[name][0]
        return [Value(Buffer(bytes=p.bytes, offset=at + p.offset), p.stored) for p in parameters]

    methods = dict(clipping.methods(forward, objective))
    x = Value(fixed("x"), (batch, *model.input))
    labels = Value(fixed("y"), (batch,) if label_bytes == 4 else (batch, model.outputs))
    mask, hyper = Value(fixed("mask"), (batch,)), Value(fixed("hyper"), (HYPER,))
    weight_values = inside("weights")
    output = Value(fixed("output"), (batch, model.outputs))

    gradient = Lowering(library, graph["main"], TEMPLATES)
    sums = inside("gradient")
    gradient.run([x, *weight_values, labels, mask, hyper], sums)
    predict = Lowering(library, forward["main"], TEMPLATES)
    predict.run([x, *weight_values], [output])
    update = library.add("update", ("update",), lambda: optimizer.kernel(library.cpu, weights))
    steps = [fixed(name).offset for name in ("weights", "state", "gradient", "hyper")]

    ends = [allocate(lowering.steps, base) for lowering in (gradient, predict)]
    arena = max(base, *ends)
    if arena > ARENA_LIMIT:
        raise ModelRefused(
            f"the training graph needs {arena >> 20} MiB at batch {batch}, an arena has at most "
            f"{ARENA_LIMIT >> 20}: use a smaller physical batch"
        )
    program = Program(
        kernels=dict(library.functions),
        gradient=gradient.calls(),
        predict=predict.calls(),
        update=(Call(kernel=update, offsets=tuple(offset or 0 for offset in steps)),),
        buffers=buffers,
        arena=arena,
        parameters=parameters,
        batch=batch,
        outputs=model.outputs,
        features=features,
        label_bytes=label_bytes,
        loss=objective.loss,
        optimizer=optimizer,
        additions=clipping.additions(forward, objective),
        clipping=tuple(methods.items()),
        decisions=(
            *_decisions(gradient, [x, *weight_values], sums, parameters, methods),
            _decision(library, update, "", "none"),
        ),
    )
    recorder.program(program)
    for kernel in program.kernels.values():
        bounds.prove(kernel)
    return program


def _decisions(
    lowering: Lowering,
    arguments: Sequence[Value],
    results: Sequence[Value],
    parameters: Sequence[Parameter],
    methods: Mapping[str, planner.Method],
) -> tuple[Decision, ...]:
    """A row for each call. A call belongs to the layer whose parameters, or sums of gradients, it
    names; else to that of a call which reads its results; else to that of one which reads the same
    adjoint.
    """
    owner: dict[int, str] = {}
    for parameter, weight, total in zip(parameters, arguments[1:], results, strict=True):
        layer = parameter.name.rpartition(".")[0] or parameter.name
        owner |= {id(weight.buffer): layer, id(total.buffer): layer}
    direct = [next((owner[id(b)] for b in bs if id(b) in owner), "") for _, bs in lowering.steps]
    readers: dict[int, str] = {}
    for layer, (_, buffers) in zip(direct, lowering.steps, strict=True):
        if layer:
            for b in buffers[:-1]:
                readers.setdefault(id(b), layer)
    rows = []
    for layer, (name, buffers) in zip(direct, lowering.steps, strict=True):
        found = layer or next((readers[id(b)] for b in reversed(buffers) if id(b) in readers), "")
        rows.append(_decision(lowering.library, name, found, methods.get(found, "none")))
    return tuple(rows)


def _decision(library: Kernels, kernel: str, layer: str, method: planner.Method) -> Decision:
    known = library.costs[kernel]
    return Decision(
        layer=layer,
        kernel=kernel,
        method=method,
        algorithm=known.work.algorithm,
        threads=known.threads,
        gflop=known.work.gflop,
        ms=known.ms,
        bytes=sum(kernel_object.argument_bytes(library.functions[kernel])),
    )


# Around a program.


class _Recorder:
    """Writes the IR after each pass into a folder, if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, module: Any) -> None:
        self._write(f"{name}.py", lambda: str(module))

    def program(self, program: Program) -> None:
        """The list of calls, and every kernel's TIR."""
        lines = [
            f"{phase}: {call.kernel}({', '.join(map(str, call.offsets))})"
            for phase in ("gradient", "predict", "update")
            for call in getattr(program, phase)
        ]
        self._write("plan.txt", lambda: "\n".join([*lines, f"arena: {program.arena}", ""]))
        for name, kernel in program.kernels.items():
            self._write(f"{name}.py", lambda kernel=kernel: str(kernel))  # type: ignore[misc]

    def _write(self, name: str, text: Callable[[], str]) -> None:
        if self._folder is not None:
            (self._folder / f"{self._count:02d}-{name}").write_text(text())
            self._count += 1
