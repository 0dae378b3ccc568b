"""PyTorch without privacy and Opacus with it, as child processes so that peak memory is their own.

`python -m benchmarks.peers CASE MODE PRECISION` is a row's process (`benchmarks.burst`).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.burst import KEPT, serve, timed
from benchmarks.models import Case, case_named
from benchmarks.report import THREADS, peak_mib


def main() -> None:
    """Serves one mode of one case."""
    case, mode, precision = case_named(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as in the cell
    warnings.simplefilter("ignore")
    way = mode.removesuffix(KEPT)
    private = way in ("hooks", "ghost")
    if private:
        import opacus  # noqa: F401 so that it counts before the model
    before = peak_mib(os.getpid())
    step = _step(case, way, precision)
    for _ in range(5):
        step()

    def facts() -> dict[str, Any]:
        return {
            "model": case.name,
            "batch": case.batch,
            "system": "opacus" if private else "pytorch",
            "mode": mode,
            "precision": precision,
            "private": private,
            "peak_mib": peak_mib(os.getpid()),
            "before_mib": before,
        }

    serve(lambda seconds: {"step": timed(step, seconds)}, facts)


def _step(case: Case, mode: str, precision: str) -> Callable[[], None]:
    model = case.layers(torch.nn)
    x = torch.randn(case.batch, *case.shape)
    y = torch.randint(0, case.classes, (case.batch,))
    if mode == "channels_last" and x.ndim == 4:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = torch.nn.CrossEntropyLoss()
    if mode in ("hooks", "ghost"):
        return _opacus(model, optimizer, loss, x, y, ghost=mode == "ghost")
    run = torch.compile(model) if mode == "compile" else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = run(x)
            value = loss(out, y)
        value.backward()
        optimizer.step()

    return step


def _opacus(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    ghost: bool,
) -> Callable[[], None]:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    # The engine wants a loader; the steps below use the same batch again and again.
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        criterion=loss,
        grad_sample_mode="ghost" if ghost else "hooks",
    )
    module, private = made[0], made[1]
    criterion = made[2] if ghost else loss

    def step() -> None:
        private.zero_grad()
        criterion(module(x), y).backward()
        private.step()

    return step


if __name__ == "__main__":
    main()
