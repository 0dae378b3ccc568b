from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from templates import data, few

from myelin.kernels import clipping

RNG = np.random.default_rng(3)
N = 53


def squares(*shape, rng=RNG):
    return (rng.random(shape) * 10.0 ** rng.integers(-6, 6, shape)).astype(np.float32)


def hyper(threshold):
    values = np.zeros(16, np.float32)
    values[0] = threshold
    return values


def test_clipped_norms_never_exceed_the_threshold(cpu, call):
    check_factors(cpu, call, N, [1e-6, 3e-5], [1e-5])


# Of at most 14 arguments mask, hyper and c are three, and each Gram norm is two.
@given(
    n=st.integers(1, 70),
    inflation=st.lists(st.floats(0, 1e-3), min_size=1, max_size=5),
    kappa=st.lists(st.floats(0, 1e-3), max_size=3),
)
@few(8)
def test_any_number_of_norms(cpu, call, n, inflation, kappa):
    check_factors(cpu, call, n, inflation, kappa)


def check_factors(cpu, call, n, inflation, kappa):
    """In exact arithmetic, for the largest true norm that the stated bounds allow."""
    rng = np.random.default_rng(4)
    terms = [squares(n, rng=rng) for _ in inflation]
    grams = [(squares(n, rng=rng), squares(n, rng=rng)) for _ in kappa]
    mask = (np.arange(n) % 7 != 0).astype(np.float32)
    kernel = clipping.clip_factors(cpu, n, len(terms), len(grams), inflation=inflation, kappa=kappa)
    threshold = np.float32(1.7)
    c = call(kernel, mask, hyper(threshold), *terms, *(norm for gram in grams for norm in gram))
    for i in range(n):
        bound = sum(
            Fraction(float(a[i])) * (1 + Fraction(e)) for a, e in zip(terms, inflation, strict=True)
        )
        for (s, t), error in zip(grams, kappa, strict=True):
            bound += Fraction(float(s[i])) + Fraction(error) * Fraction(float(t[i]))
        if mask[i] == 0:
            assert c[i] == 0
            continue
        assert Fraction(float(c[i])) ** 2 * bound <= Fraction(float(threshold)) ** 2
        # And no more is taken than rounding asks for.
        wanted = min(1.0, float(threshold) / float(bound) ** 0.5)
        assert wanted * (1 - 1e-5) <= c[i] <= 1


def test_norms_that_are_not_finite_give_exactly_zero(cpu, call):
    s = np.array([1, np.nan, np.inf, 3e38, 0, -np.inf], np.float32)
    kernel = clipping.clip_factors(cpu, 6, 2, inflation=[0.0, 0.0])
    c = call(kernel, np.ones(6, np.float32), hyper(1.0), s, s)
    assert list(c[1:4]) == [0, 0, 0], "NaN, infinity and overflow"
    assert c[0] == pytest.approx(0.5**0.5)
    assert c[4] == 1
    assert c[5] == 0


@pytest.mark.parametrize(
    ("s", "t"),
    [
        *((np.nan, 1.0), (np.nan, np.inf), (1.0, np.nan), (np.nan, np.nan)),
        *((-np.inf, 1.0), (-np.inf, np.inf), (np.inf, 1.0), (1.0, np.inf)),
    ],
)
def test_gram_norms_that_are_not_finite_give_exactly_zero(cpu, call, s, t):
    squares, largest = np.ones(N, np.float32), np.ones(N, np.float32)
    squares[::2], largest[::2] = s, t
    term, mask = np.full(N, 1e-9, np.float32), np.ones(N, np.float32)
    kernel = clipping.clip_factors(cpu, N, 1, 1, inflation=[0.0], kappa=[1e-5])
    c = call(kernel, mask, hyper(1.0), term, squares, largest)
    assert not c[::2].any()
    assert c[1::2].all()
    sums = call(
        clipping.norm_sum(cpu, N, 1, 1, inflation=[0.0], kappa=[1e-5]), term, squares, largest
    )
    assert not np.isfinite(sums[::2]).any()
    assert np.isfinite(sums[1::2]).all()


def test_gram_square_below_zero_by_cancellation_is_still_bounded(cpu, call):
    s, t = np.full(4, -1e-6, np.float32), np.full(4, 1.0, np.float32)
    kernel = clipping.clip_factors(cpu, 4, 0, 1, inflation=[], kappa=[1e-5])
    c = call(kernel, np.ones(4, np.float32), hyper(1e-3), s, t)
    np.testing.assert_allclose(c, 1e-3 / np.sqrt(9e-6), rtol=1e-5)


def test_norm_sum_is_a_term_without_inflation(cpu, call):
    terms = [squares(N) for _ in range(3)]
    kernel = clipping.norm_sum(cpu, N, 1, 1, inflation=[1e-4], kappa=[1e-3])
    u = call(kernel, *terms)
    true = terms[0].astype(float) * (1 + 1e-4) + terms[1] + 1e-3 * terms[2].astype(float)
    assert np.all(u >= true)
    np.testing.assert_allclose(u, true, rtol=1e-5)


def test_bounds_must_match_the_norms(cpu):
    with pytest.raises(ValueError, match="2 norms need as many inflations"):
        clipping.clip_factors(cpu, 4, 2, inflation=[0.0])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (50, 333), (64, 64), (300, 10), (9, 17_003)])
def test_weighted_sum_rounds_once(cpu, call, n, m):
    check_sum(cpu, call, n, m)


@given(st.integers(1, 70), st.integers(1, 300))
@few(8)
def test_a_weighted_sum_of_any_shape(cpu, call, n, m):
    check_sum(cpu, call, n, m)


def check_sum(cpu, call, n, m):
    g, c = data(n, m), np.abs(data(n, seed=1))
    c[::2] = 0
    poisoned = g.copy()
    poisoned[::4], poisoned[2::4] = np.nan, np.inf
    value = call(clipping.weighted_sum(cpu, n, m), poisoned, c)
    true = c.astype(float) @ g.astype(float)
    np.testing.assert_allclose(value, true, rtol=2.0**-23, atol=1e-12)
