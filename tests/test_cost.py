"""What is counted, against formulas of its own, and what time becomes of it."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myelin import cost
from myelin.cost import Work
from myelin.cpu import LEVELS, Cpu
from myelin.kernels.conv import Conv
from myelin.kernels.elementwise import map as elementwise
from myelin.kernels.tir import is_parallel

CPU = Cpu.named("x86-64-v4")
SQUARE = Conv(n=64, h=32, w=32, ci=64, co=64, kh=3, kw=3, padding=(1, 1, 1, 1))
PASSES = (cost.forward, cost.backward_data, cost.stored_gradient, cost.weighted_gradient)


def test_every_level_has_rates():
    assert set(cost.RATES) == {cpu.level for cpu in LEVELS}


@pytest.mark.parametrize("count", PASSES)
def test_winograd_takes_a_quarter_of_the_products(count):
    direct, winograd = count(CPU, SQUARE, "direct"), count(CPU, SQUARE, "winograd")
    assert math.isclose(4 * winograd.points, direct.products)
    assert direct.gflop == winograd.gflop == 2e-9 * 64 * 32 * 32 * 9 * 64 * 64
    assert math.isclose(direct.products * 2 * CPU.lanes, 1e9 * direct.gflop)


@pytest.mark.parametrize("count", PASSES)
def test_a_vector_that_is_partly_empty_counts_as_whole(count):
    some, full = (replace(SQUARE, ci=c, co=c) for c in (17, 32))
    ratio = count(CPU, some, "direct").products / count(CPU, full, "direct").products
    assert math.isclose(ratio, 17 / 32)
    ragged = replace(SQUARE, h=29, w=29)
    assert count(CPU, ragged, "winograd").points == count(CPU, SQUARE, "winograd").points


def test_bf16_halves_the_instructions_of_a_product():
    whole, half = (cost.matrix(CPU, 64, 256, 96, p) for p in ("float32", "bf16"))
    assert (whole.products, whole.dots) == (64 * 256 * 6, 0)
    assert (half.products, half.dots) == (0, 64 * 256 * 3)
    assert cost.matrix(CPU, 64, 256, 96, "bf16x3").dots == 3 * half.dots
    for count in PASSES[:-1]:
        whole, half = (count(CPU, SQUARE, how) for how in ("winograd", "winograd bf16"))
        assert (half.points, half.dots, half.steps) == (0, whole.points / 2, whole.steps)
        assert (whole.algorithm, half.algorithm) == ("winograd", "winograd bf16")


@pytest.mark.parametrize("level", cost.RATES)
def test_a_second_of_each_kind_takes_a_second(level):
    rates = cost.RATES[level]
    kinds = ["products", "points", "pairs", "steps", *["dots"] * (level != "x86-64-v3")]
    for kind in kinds:
        work = Work(gflop=0, **{kind: 1e9 * getattr(rates, kind)})
        assert math.isclose(rates.milliseconds(work, 0), 1000 + rates.call_ms)
        assert math.isclose(rates.milliseconds(work, 0, threads=1), 2000 + rates.call_ms)


@given(st.integers(0, 1 << 30), st.integers(1, 1 << 20))
def test_more_bytes_take_longer_and_further_ones_longest(size, more):
    rates = cost.RATES["x86-64-v4"]
    once, then = rates.moving(size), rates.moving(size + more)
    assert more / rates.l2_gbytes / 1.001e6 <= then - once <= more / rates.memory_gbytes / 0.999e6
    assert once <= rates.moving(size, cold=size)
    assert math.isclose(rates.moving(size, cold=size), size / rates.memory_gbytes / 1e6)


def test_other_instructions_hide_behind_moving():
    rates = cost.RATES["x86-64-v4"]
    few, many = (Work(gflop=0, steps=n) for n in (1e3, 1e9))
    size = 64 << 20
    assert math.isclose(rates.milliseconds(few, size), rates.moving(size) + rates.call_ms)
    assert math.isclose(rates.milliseconds(many, size), rates.milliseconds(many, 0))


@pytest.mark.parametrize("numbers", [100, 10_000_000])
def test_what_runs_on_all_threads_is_seen_in_the_kernel(numbers):
    function = elementwise(CPU, [(numbers,)], (numbers,), lambda x: x + x)
    assert is_parallel(function) == (numbers > 1000)
