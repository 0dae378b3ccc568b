"""PyTorch without privacy and Opacus with it, as child processes so that peak memory is their own.

`python -m benchmarks.peers CASE MODE SECONDS PRECISION` prints one JSON line.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch

from benchmarks.models import Case, case_named
from benchmarks.report import THREADS

MODES = ("eager", "channels_last", "compile", "hooks", "ghost")


def main() -> None:
    """Runs one mode of one case."""
    case = case_named(sys.argv[1])
    mode = sys.argv[2]
    seconds, precision = float(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    step = _step(case, mode, precision)
    for _ in range(5):
        step()
    times = []
    until = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < until and len(times) < 400):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(
        json.dumps(
            {
                "model": case.name,
                "batch": case.batch,
                "system": "opacus" if mode in ("hooks", "ghost") else "pytorch",
                "mode": mode,
                "precision": precision,
                "private": mode in ("hooks", "ghost"),
                "median_ms": 1e3 * statistics.median(times),
                "examples_per_second": case.batch / statistics.median(times),
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


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
