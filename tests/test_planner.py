"""What the planner chooses, within its budget, and what it says of it."""

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myelin import cost, nn, planner
from myelin.cpu import Cpu
from myelin.importers import load
from myelin.kernels.window import Conv, Product
from myelin.optimizer import SGD
from myelin.plan import compile_training

CPU = Cpu.named("znver4")
SQUARE = {"kh": 3, "kw": 3, "padding": (1, 1, 1, 1)}
PRODUCTS = get_args(Product)
LARGE = Conv(n=64, h=32, w=32, ci=64, co=64, kh=3, kw=3, padding=(1, 1, 1, 1))
DEEP = Conv(n=64, h=8, w=8, ci=256, co=256, kh=3, kw=3, padding=(1, 1, 1, 1))


@pytest.mark.parametrize("level", cost.RATES)
def test_large_images_store_and_deep_layers_do_not(level):
    """Gram matrices grow with the square of pixels, gradients with that of channels."""
    assert planner.store({"a": LARGE, "b": DEEP}, Cpu.named(level), 1 << 40) == {"a"}


@given(st.lists(st.integers(1, 96), min_size=1, max_size=6), st.integers(0, 200 << 20))
def test_the_budget_holds_for_all_layers_together(channels, budget):
    convs = {
        str(i): Conv(n=64, h=32, w=32, ci=16, co=co, kh=3, kw=3, padding=(1, 1, 1, 1))
        for i, co in enumerate(channels)
    }
    stored = planner.store(convs, CPU, budget)
    assert sum(4 * convs[name].n * convs[name].weights for name in stored) <= budget
    assert planner.store(convs, CPU, 1 << 40) >= stored


@pytest.mark.parametrize("product", PRODUCTS)
def test_winograd_is_taken_where_it_is_faster(product):
    """Other strides and windows it cannot; few channels and pixels leave nothing to save."""
    for conv in (LARGE, DEEP, Conv(n=64, h=14, w=14, ci=24, co=40, **SQUARE)):
        assert planner.algorithm(CPU, conv, product, "float32") == "winograd"
    for conv in (
        Conv(n=64, h=32, w=32, ci=64, co=64, stride=(2, 2), **SQUARE),
        Conv(n=64, h=32, w=32, ci=64, co=64, kh=5, kw=3),
        Conv(n=64, h=2, w=2, ci=64, co=64, **SQUARE),
        Conv(n=64, h=32, w=32, ci=3, co=64, **SQUARE),
        Conv(n=64, h=32, w=32, ci=64, co=10, **SQUARE),
    ):
        assert planner.algorithm(CPU, conv, product, "float32") == "direct"


def test_gradients_of_one_tile_are_found_directly():
    """Transforming each gradient back is dear where it is the sum of one tile."""
    conv = Conv(n=16, h=4, w=4, ci=64, co=64, **SQUARE)
    found = {p: planner.algorithm(CPU, conv, p, "float32") for p in PRODUCTS}
    assert found == {
        "forward": "winograd",
        "backward_data": "winograd",
        "stored_gradient": "direct",
        "weighted_gradient": "direct",
        "batch_gradient": "winograd",
    }


def test_bf16_operands_are_taken_where_they_can_be_and_are_faster():
    strided = Conv(n=64, h=32, w=32, ci=64, co=64, stride=(2, 2), **SQUARE)
    odd = Conv(n=64, h=33, w=33, ci=3, co=65, kh=5, kw=5)
    for conv, expected in (
        (LARGE, ["winograd bf16"] * 3 + ["winograd", "winograd bf16"]),
        (strided, ["direct bf16"] * 3 + ["direct", "direct"]),
        (odd, ["direct", "direct", "direct bf16", "direct", "direct"]),
    ):
        assert [planner.algorithm(CPU, conv, p, "bf16") for p in PRODUCTS] == expected


CHANNELS = st.integers(1, 40) | st.sampled_from([16, 32, 48])


@given(
    st.tuples(st.integers(1, 40), CHANNELS, CHANNELS),
    st.tuples(*[st.integers(1, 3)] * 3),
    st.sampled_from(PRODUCTS),
    st.sampled_from([Cpu.named(level) for level in cost.RATES]),
)
def test_what_is_chosen_can_be_computed(sizes, kernel, product, cpu):
    (n, ci, co), (kh, kw, stride) = sizes, kernel
    conv = Conv(n=n, h=9, w=7, ci=ci, co=co, kh=kh, kw=kw, stride=(stride, 1))
    for precision in cpu.precisions:
        how = planner.algorithm(cpu, conv, product, precision)
        assert planner.CONV[how].can(conv, product)
        assert callable(getattr(planner.CONV[how], product))
        assert how in ("direct", "winograd") or how.endswith(f" {precision}")
        assert not how.startswith("tiles") or "amx_bf16" in cpu.features


def test_scratch_stays_within_its_limit():
    """64 channels of 512 × 512 pixels in the domain of points: 300 MB an example."""
    conv = Conv(n=64, h=512, w=512, ci=64, co=64, **SQUARE)
    assert planner.algorithm(CPU, conv, "forward", "float32") == "winograd"
    assert planner.algorithm(CPU, conv, "stored_gradient", "float32") == "direct"
    tiles = Cpu.named("sapphirerapids")
    large = Conv(n=64, h=192, w=192, ci=64, co=256, **SQUARE)
    assert cost.weighted_gradient(tiles, large, "tiles bf16").scratch <= planner.SCRATCH_BYTES
    assert cost.squared_norm(tiles, large, "tiles bf16").scratch > planner.SCRATCH_BYTES
    assert planner.recomputing(tiles, large, "bf16") is None


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
    assert [d.kernel for d in program.decisions] == [
        call.kernel for call in (*program.gradient, *program.update)
    ]
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


def test_tiles_are_taken_where_a_level_has_them():
    """Their norms are of what is summed, so that gradients need not be kept."""
    tiles = Cpu.named("sapphirerapids")
    for conv in (LARGE, DEEP):
        for product in ("forward", "backward_data"):
            assert planner.algorithm(tiles, conv, product, "bf16") == "tiles bf16"
            assert "bf16" not in planner.algorithm(tiles, conv, product, "float32")
        assert planner.unstored(tiles, conv, "bf16") == "recomputed"
        for precision in ("bf16", "bf16x3"):
            assert planner.recomputing(tiles, conv, precision) == f"tiles {precision}"
            assert planner.recomputing(CPU, conv, precision) is None
        assert planner.recomputing(tiles, conv, "float32") is None
        assert planner.unstored(tiles, conv, "float32") == "gram"
    large = Conv(n=64, h=16, w=16, ci=64, co=64, kh=5, kw=5)
    assert planner.algorithm(tiles, large, "forward", "bf16x3") == "tiles bf16x3"


def test_bf16x3_computes_convolutions_as_float32_does_without_tiles():
    for conv in (LARGE, DEEP, Conv(n=64, h=9, w=9, ci=3, co=5, kh=2, kw=3)):
        for product in PRODUCTS:
            found = [planner.algorithm(CPU, conv, product, p) for p in ("float32", "bf16x3")]
            assert found[0] == found[1]
