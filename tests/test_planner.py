"""What the planner chooses, within its budget, and what it says of it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myelin import cost, nn, planner
from myelin.cpu import Cpu
from myelin.kernels.conv import Conv
from myelin.model import load
from myelin.optimizer import SGD
from myelin.plan import compile_training

LARGE = Conv(n=64, h=32, w=32, ci=64, co=64, kh=3, kw=3, padding=(1, 1, 1, 1))
DEEP = Conv(n=64, h=8, w=8, ci=256, co=256, kh=3, kw=3, padding=(1, 1, 1, 1))


@pytest.mark.parametrize("level", cost.RATES)
def test_large_images_store_and_deep_layers_do_not(level):
    """Measured: 14.6 against 59 ms, and 21.6 against 16.4."""
    assert planner.store({"a": LARGE, "b": DEEP}, level, 1 << 40) == {"a"}


@given(st.lists(st.integers(1, 96), min_size=1, max_size=6), st.integers(0, 200 << 20))
def test_the_budget_holds_for_all_layers_together(channels, budget):
    convs = {
        str(i): Conv(n=64, h=32, w=32, ci=16, co=co, kh=3, kw=3, padding=(1, 1, 1, 1))
        for i, co in enumerate(channels)
    }
    stored = planner.store(convs, "x86-64-v4", budget)
    assert sum(4 * convs[name].n * convs[name].weights for name in stored) <= budget
    assert planner.store(convs, "x86-64-v4", 1 << 40) >= stored


def test_a_program_has_a_decision_for_every_call():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    model = load(net, (1, 8, 8))
    program, small = (
        compile_training(
            model,
            loss="cross-entropy",
            optimizer=SGD(lr=1.0),
            batch=4,
            cpu=Cpu.native(),
            stored_bytes=budget,
        )
        for budget in (planner.STORED_BYTES, 0)
    )
    assert [d.kernel for d in program.decisions] == [call.kernel for call in program.gradient]
    rows = {d.kernel.partition("_")[2]: d for d in program.decisions}
    assert rows["conv_relu"].layer == rows["conv_stored"].layer == rows["weighted_sum"].layer == "0"
    assert rows["conv_stored"].method == "stored"
    assert math.isclose(rows["conv_relu"].gflop, 2e-9 * 4 * 36 * 9 * 4)
    assert rows["linear"].bytes == 4 * (4 * 144 + 144 * 3 + 3 + 4 * 3)
    assert rows["linear_norm"].method == "product"
    assert all(d.ms > 0 for d in program.decisions)
    assert rows["conv_relu"].algorithm == "direct"
    assert (rows["conv_relu"].threads, rows["linear"].threads) == (2, 1)
    assert dict(small.clipping)["0"] == "gram"
    assert any(d.layer == "0" and "conv_gram" in d.kernel for d in small.decisions)


def test_operands_of_convolutions_are_bf16_where_that_is_faster():
    cpu, tall = Cpu.named("znver4"), Conv(n=64, h=9, w=9, ci=3, co=5, kh=2, kw=3)
    found = {
        precision: [
            planner.convolution(cpu, conv, which, precision)
            for conv, which in ((LARGE, "forward"), (DEEP, "stored_gradient"), (tall, "forward"))
        ]
        for precision in cpu.precisions
    }
    exact = [("winograd", "float32"), ("winograd", "float32"), ("direct", "float32")]
    assert found == {
        "float32": exact,
        "bf16": [("winograd", "bf16"), ("direct", "bf16"), ("direct", "float32")],
        "bf16x3": exact,
    }
