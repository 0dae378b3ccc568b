from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from myelin import privacy
from myelin.errors import DocumentInvalid, PrivacyRefused
from myelin.privacy import Privacy, compose, largest_batch

USUAL: dict[str, Any] = {
    "noise_multiplier": 2.0,
    "max_grad_norm": 1.0,
    "sample_rate": 0.05,
    "steps": 100,
    "delta": 1e-5,
}


def usual(**changes: Any) -> Privacy:
    return Privacy.for_records(1000, **USUAL | changes)


def gaussian_epsilon(noise: float, steps: int, delta: float) -> float:
    """Exact epsilon of `steps` full-batch Gaussian releases (Balle & Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise

    def excess(epsilon: float) -> float:
        first = stats.norm.cdf(mu / 2 - epsilon / mu)
        return float(first - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta)

    return float(optimize.brentq(excess, 0, 500))


def sampled_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon of the Poisson-sampled Gaussian by our own convolution of privacy losses."""
    x = np.linspace(-15 * noise, 1 + 15 * noise, 2_000_001)
    without = stats.norm.pdf(x, 0, noise)
    with_it = (1 - rate) * without + rate * stats.norm.pdf(x, 1, noise)
    loss = np.log1p(rate * np.expm1((2 * x - 1) / (2 * noise**2)))
    found = []
    for density, losses in ((with_it, loss), (without, -loss)):
        width, size = 1e-4, 2**19
        mass = density * (x[1] - x[0])
        index = np.round(losses / width).astype(int) % size
        transformed = np.fft.rfft(np.bincount(index, mass, size))
        composed = np.fft.irfft(transformed**steps, size)
        values = np.fft.fftfreq(size, 1 / size) * width

        def excess(epsilon: float, composed: Any = composed, values: Any = values) -> float:
            above = values > epsilon
            return float(np.sum(composed[above] * -np.expm1(epsilon - values[above])) - delta)

        found.append(optimize.brentq(excess, 0, 20))
    return float(max(found))


@pytest.mark.parametrize(("noise", "steps"), [(10.0, 100), (1.0, 1), (4.0, 50), (30.0, 1000)])
def test_full_batches_agree_with_the_exact_gaussian(noise: float, steps: int) -> None:
    made = usual(noise_multiplier=noise, sample_rate=1.0, steps=steps)
    exact = gaussian_epsilon(noise, steps, 1e-5)
    assert exact <= made.epsilon <= exact * 1.001 + 1e-3


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [(1.0, 0.01, 1000), (2.0, 0.05, 400), (0.8, 0.1, 20), (5.0, 0.5, 60)],
)
def test_sampled_batches_agree_with_another_accountant(
    noise: float, rate: float, steps: int
) -> None:
    made = usual(noise_multiplier=noise, sample_rate=rate, steps=steps)
    expected = sampled_epsilon(noise, made.sample_rate, steps, 1e-5)
    assert made.epsilon == pytest.approx(expected, rel=2e-3, abs=2e-3)
    accountant = rdp.RdpAccountant()
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    accountant.compose(event, steps)
    assert made.epsilon <= accountant.get_epsilon(1e-5)


def test_more_of_anything_costs_more() -> None:
    base = usual().epsilon
    assert usual(steps=200).epsilon > base
    assert usual(sample_rate=0.1).epsilon > base
    assert usual(noise_multiplier=1.5).epsilon > base
    assert usual(delta=1e-6).epsilon > base
    assert usual(max_grad_norm=9.0).epsilon == base


@given(st.floats(0.1, 10), st.sampled_from([0.01, 0.05, 0.3]), st.sampled_from([10, 400]))
@settings(max_examples=5, deadline=None)
def test_for_epsilon_meets_the_target_closely(target: float, rate: float, steps: int) -> None:
    made = Privacy.for_epsilon(
        target, delta=1e-5, max_grad_norm=1.0, sample_rate=rate, steps=steps, records=569
    )
    assert made.epsilon <= target
    assert replace(made, noise_multiplier=made.noise_multiplier * 0.99).epsilon > target
    assert made.expected_batch == pytest.approx(made.sample_rate * 569)


def test_for_epsilon_refuses_the_impossible() -> None:
    fields: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "sample_rate": 1.0,
        "steps": 100,
        "records": 100,
    }
    for target in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(PrivacyRefused, match="must be a positive number"):
            Privacy.for_epsilon(target, delta=1e-5, **fields)
    with pytest.raises(PrivacyRefused, match="no noise reaches"):
        Privacy.for_epsilon(1e-6, delta=1e-12, **fields)


# Charges


def test_charges_are_there_and_small() -> None:
    """Against the bare accountant, at the same grid."""
    made = usual(steps=1000)
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    gaussian = dp_accounting.GaussianDpEvent(made.noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(made.sample_rate, gaussian), 1000)
    bare = accountant.get_epsilon(made.delta)
    drift = privacy._sampler_drift(1000)
    assert 2 * drift < made.epsilon - bare < 2 * drift + 1e-4
    assert 0 < drift < 1e-3


def test_delta_smaller_than_the_charges_is_refused() -> None:
    with pytest.raises(PrivacyRefused, match="too small for"):
        _ = usual(noise_multiplier=0.5, sample_rate=1.0, steps=10, delta=1e-12).epsilon


@given(st.integers(1, 10**7), st.floats(1e-6, 1))
@settings(max_examples=300)
def test_batches_beyond_max_batch_are_improbable(records: int, rate: float) -> None:
    kept = largest_batch(records, rate)
    assert 1 <= kept <= records
    if kept < records:
        assert stats.binom.logsf(kept, records, rate) <= -60 * math.log(2)
    expected = records * rate
    assert kept <= expected + 10 * math.sqrt(expected) + 60


@pytest.mark.parametrize(("records", "rate"), [(0, 0.5), (2**32, 0.5), (10, 0.0), (10, 1.1)])
def test_no_batch(records: int, rate: float) -> None:
    with pytest.raises(PrivacyRefused, match="not a batch"):
        largest_batch(records, rate)


def test_composition_is_that_of_one_longer_run() -> None:
    half = usual(steps=50)
    assert compose([half, half], 1e-5) == pytest.approx(compose([usual()], 1e-5))
    mixed = [usual(), usual(noise_multiplier=3.0)]
    together = compose(mixed, 1e-5)
    assert max(each.epsilon for each in mixed) < together < sum(each.epsilon for each in mixed)
    assert compose([], 1e-5) == 0


# Fixed point


@given(st.floats(0.01, 1000), st.floats(1e-5, 1e6), st.floats(1e-9, 1), st.floats(1e-11, 0.9))
def test_rounding_is_safe_and_exact(noise: float, norm: float, rate: float, delta: float) -> None:
    made = Privacy(
        noise_multiplier=noise,
        max_grad_norm=norm,
        sample_rate=rate,
        steps=7,
        delta=delta,
        expected_batch=12.5,
        max_batch=50,
    )
    assert made.noise_multiplier >= noise
    assert made.sample_rate <= rate
    assert made.delta <= delta
    made.__dict__["epsilon"] = 1.0  # the accountant is not what is tested here
    fields = made.to_fields()
    assert all(type(value) in (int, str) for value in fields.values())
    assert Privacy.from_fields(fields) == made
    assert Privacy.from_fields(fields | {"epsilon": 0}) == made


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1e12},
        {"max_grad_norm": 1e-9},
        {"sample_rate": 1.5},
        {"sample_rate": 1e-12},
        {"delta": 1.0},
        {"delta": 1e-14},
        {"steps": 0},
        {"steps": 2**32},
        {"steps": True},
        {"steps": 1.0},
    ],
)
def test_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(PrivacyRefused):
        usual(**changes)


def test_document_with_numbers_out_of_range_is_refused_by_name() -> None:
    fields = usual().to_fields()
    assert privacy.check(fields) == usual()
    for key, value in (("delta", 10**12), ("sample_rate", 2**32 + 1), ("steps", 0)):
        with pytest.raises(DocumentInvalid) as refused:
            privacy.check(fields | {key: value})
        assert refused.value.reason == "job-wrong"
