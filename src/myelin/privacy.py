"""The privacy of a training job: integers that the enclave enforces, and what they are worth.

The mechanism is DP-SGD with Poisson sampling inside the enclave (docs/privacy.md). Its epsilon is
that of the Poisson-sampled Gaussian under add-or-remove-one neighbours, by privacy loss
distributions (dp-accounting), plus charges for what differs from the ideal mechanism: batches
cut at `max_batch` and the sampler's rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import dp_accounting
from dp_accounting import pld

from myelin import document
from myelin.document import Kind
from myelin.errors import DocumentInvalid, PrivacyRefused

MICRO = 10**6
PICO = 10**12
RATE = 2**32

NEIGHBORING_RELATION = "add-or-remove-one"

# What the ideal mechanism does not have, and what bounds it (docs/privacy.md, "Charges").
OVERFLOW_BITS = 60
"""A batch is larger than `max_batch` with probability at most 2⁻⁶⁰ a step."""
SAMPLER_ERROR = 2.0**-38
"""Bound of |ln(p'/p)| for each released integer within 12 sigma (ideally p, in fact p')."""
SAMPLER_TAIL = 4e-33
"""Probability of a Gaussian beyond 12 sigma, where the sampler draws nothing."""
MOST_WEIGHTS = 2**30
"""More float32 weights than an arena below 4 GiB can hold."""

SCHEMA: Kind = document.record(
    {
        "delta": document.unsigned(),
        "steps": document.unsigned(),
        "epsilon": document.unsigned(),
        "sampler": document.text("poisson"),
        "max_batch": document.unsigned(),
        "sample_rate": document.unsigned(),
        "max_grad_norm": document.unsigned(),
        "expected_batch": document.unsigned(),
        "noise_multiplier": document.unsigned(),
        "neighboring_relation": document.text(NEIGHBORING_RELATION),
    }
)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """Privacy parameters of a training job, exactly as its document holds them.

    Reals are rounded to the document's fixed point when the object is made, in the direction
    that gives more privacy, and everything after that, accounting included, uses what was kept.
    """

    noise_multiplier: float
    """Standard deviation of the noise over `max_grad_norm`; rounded up to a millionth."""
    max_grad_norm: float
    """L2 norm to which the gradient of each record is clipped; rounded to a millionth."""
    sample_rate: float
    """Probability that a record is in a step; rounded down to a multiple of 2⁻³²."""
    steps: int
    """The most steps that may be taken."""
    delta: float
    """Rounded down to a multiple of 10⁻¹²."""
    expected_batch: float
    """Public divisor of the noisy sum; changes the learning rate, not the privacy."""
    max_batch: int
    """Records of one step beyond this many are dropped."""

    def __post_init__(self) -> None:
        """Round to the fixed point of the document and refuse what lies outside its range."""
        kept = {
            "noise_multiplier": _ceil(self.noise_multiplier, MICRO) / MICRO,
            "max_grad_norm": _nearest(self.max_grad_norm, MICRO) / MICRO,
            "sample_rate": _floor(self.sample_rate, RATE) / RATE,
            "delta": _floor(self.delta, PICO) / PICO,
            "expected_batch": _nearest(self.expected_batch, MICRO) / MICRO,
        }
        for field, value in kept.items():
            if value <= 0:
                raise PrivacyRefused(f"{field} is {getattr(self, field)!r}: too small to write")
            object.__setattr__(self, field, value)
        if self.sample_rate > 1 or self.delta >= 1:
            raise PrivacyRefused("sample_rate must be at most 1 and delta below 1")
        for field in ("steps", "max_batch"):
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value < 2**32:
                raise PrivacyRefused(f"{field} is {value!r}, not an integer from 1 to 2³² - 1")

    @classmethod
    def for_records(
        cls,
        records: int,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        sample_rate: float,
        steps: int,
        delta: float,
    ) -> Privacy:
        """Fill in the batch sizes for a public upper bound of the number of records.

        `records` is the sum of the capacities of all senders of the slot `records`.
        """
        rate = _floor(sample_rate, RATE) / RATE
        return cls(
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            sample_rate=sample_rate,
            steps=steps,
            delta=delta,
            expected_batch=rate * records,
            max_batch=largest_batch(records, rate),
        )

    @classmethod
    def for_epsilon(
        cls,
        epsilon: float,
        *,
        delta: float,
        max_grad_norm: float,
        sample_rate: float,
        steps: int,
        records: int,
    ) -> Privacy:
        """Find the least noise, within about one part in a thousand, that keeps `epsilon`.

        Raises `PrivacyRefused` when no noise multiplier below a million does.
        """
        for name, value, fits, wanted in (
            ("the target epsilon", epsilon, 0 < epsilon < math.inf, "a positive number"),
            ("sample_rate", sample_rate, 0 < sample_rate <= 1, "above 0 and at most 1"),
            ("steps", steps, 1 <= steps < 2**32, "from 1 to 2³² - 1"),
            ("delta", delta, 1 / PICO <= delta < 1, "from 1e-12 to 1"),
            ("max_grad_norm", max_grad_norm, 0 < max_grad_norm < math.inf, "a positive number"),
            ("records", records, 1 <= records < 2**32, "from 1 to 2³² - 1"),
        ):
            if not fits:
                raise PrivacyRefused(f"{name} is {value!r}: it must be {wanted}")

        def at(noise: float) -> Privacy:
            return cls.for_records(
                records,
                noise_multiplier=noise,
                max_grad_norm=max_grad_norm,
                sample_rate=sample_rate,
                steps=steps,
                delta=delta,
            )

        # Searching on a coarser grid is quick, and pessimistic; the end is checked on the fine one.
        coarse = min(max(epsilon / 2000, _INTERVAL), 10 * _INTERVAL)

        def enough(noise: float) -> bool:
            try:
                return _compose((at(noise),), delta, coarse) <= epsilon
            except PrivacyRefused:
                return False

        low, high = 0.5, 1.0
        while not enough(high):
            low, high = high, high * 2
            if high > 1e6:
                raise PrivacyRefused(
                    f"no noise reaches epsilon {epsilon} at delta {delta} in {steps} steps; "
                    "lower sample_rate or steps, or ask for more epsilon"
                )
        while low > 1e-3 and enough(low):
            low, high = low / 2, low
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
        while at(high).epsilon > epsilon:
            high *= 1.0005
        return at(high)

    @cached_property
    def epsilon(self) -> float:
        """Epsilon at `delta`, rounded up to a millionth, every charge included."""
        return _ceil(compose([self], self.delta), MICRO) / MICRO

    def after(self, steps: int) -> Privacy:
        """The same parameters for the steps that were really done."""
        return replace(self, steps=steps)

    def to_fields(self) -> dict[str, Any]:
        """The `privacy` map of a job, all integers."""
        return {
            "delta": round(self.delta * PICO),
            "steps": self.steps,
            "epsilon": round(self.epsilon * MICRO),
            "sampler": "poisson",
            "max_batch": self.max_batch,
            "sample_rate": round(self.sample_rate * RATE),
            "max_grad_norm": round(self.max_grad_norm * MICRO),
            "expected_batch": round(self.expected_batch * MICRO),
            "noise_multiplier": round(self.noise_multiplier * MICRO),
            "neighboring_relation": NEIGHBORING_RELATION,
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Privacy:
        """Read a checked `privacy` map. The epsilon it states is not believed, see `check`."""
        return cls(
            noise_multiplier=fields["noise_multiplier"] / MICRO,
            max_grad_norm=fields["max_grad_norm"] / MICRO,
            sample_rate=fields["sample_rate"] / RATE,
            steps=fields["steps"],
            delta=fields["delta"] / PICO,
            expected_batch=fields["expected_batch"] / MICRO,
            max_batch=fields["max_batch"],
        )


def largest_batch(records: int, sample_rate: float) -> int:
    """The least k such that Binomial(records, sample_rate) exceeds k with probability ≤ 2⁻⁶⁰.

    By Chernoff: P[B ≥ j] ≤ exp(-records · KL(j / records ‖ sample_rate)) for j above the mean.
    """
    if not (1 <= records < 2**32 and 0 < sample_rate <= 1):
        raise PrivacyRefused(f"{records} records at rate {sample_rate}: not a batch")
    bits = OVERFLOW_BITS * math.log(2) * (1 + 1e-9)
    low, high = math.floor(records * sample_rate), records
    while low < high:  # the least k in low … high whose successor is improbable
        middle = (low + high) // 2
        if records * _divergence((middle + 1) / records, sample_rate) >= bits:
            high = middle
        else:
            low = middle + 1
    return max(1, low)


def check(fields: dict[str, Any]) -> Privacy:
    """Read a checked `privacy` map and recompute the epsilon that it states.

    Raises `DocumentInvalid` job-wrong where a number is out of range, or where it states less
    than the accountant finds, or more than a hundredth above it. Differences of 10⁻⁴ pass, since
    summation orders vary between machines.
    """
    stated = fields["epsilon"] / MICRO
    try:
        made = Privacy.from_fields(fields)
        computed = made.epsilon
    except PrivacyRefused as error:
        raise DocumentInvalid("job-wrong", str(error)) from None
    if not computed - 1e-4 <= stated <= computed * 1.01 + 1e-4:
        raise DocumentInvalid(
            "job-wrong",
            f"privacy.epsilon states {stated:.6f} where these numbers give {computed:.6f}",
        )
    # From here on `epsilon` is what the document states, whatever the last digit is here.
    made.__dict__["epsilon"] = stated
    return made


def compose(jobs: Iterable[Privacy], delta: float) -> float:
    """Epsilon at `delta` of all these jobs on one data set together, charges included.

    Raises `PrivacyRefused` where the charges alone use up `delta`.
    """
    return _compose(tuple(jobs), delta, _INTERVAL)


@lru_cache(maxsize=256)
def _compose(jobs: tuple[Privacy, ...], delta: float, interval: float) -> float:
    if not jobs:
        return 0.0
    accountant = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=interval,
    )
    steps_of: Counter[tuple[float, float]] = Counter()
    for job in jobs:
        steps_of[job.noise_multiplier, job.sample_rate] += job.steps
    for (noise, rate), count in steps_of.items():
        gaussian = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), count)
    steps = steps_of.total()
    drift = _sampler_drift(steps)
    epsilon = float(accountant.get_epsilon(delta))
    for _ in range(8):
        # The charges grow with epsilon and are tiny, so this settles at once, from below.
        left = (delta - _charged_delta(epsilon + drift, steps)) * math.exp(-drift)
        if left <= 0:
            break
        ideal = float(accountant.get_epsilon(left))
        if ideal <= epsilon:
            return epsilon + 2 * drift
        epsilon = ideal * (1 + 1e-9)
    raise PrivacyRefused(
        f"delta {delta:g} is too small for {steps} steps at this noise; add noise or raise delta"
    )


_INTERVAL = 1e-4
"""Grid of the privacy loss distribution; results are rounded up, so coarser is never unsafe."""


def _sampler_drift(steps: int) -> float:
    """Bound of |ln(P'/P)| over a whole run, except with probability 2⁻⁶⁰ (docs/privacy.md)."""
    draws = steps * MOST_WEIGHTS
    spread = SAMPLER_ERROR * math.sqrt(2 * draws * OVERFLOW_BITS * math.log(2))
    return spread + draws * SAMPLER_ERROR**2


def _charged_delta(epsilon: float, steps: int) -> float:
    """What the events outside the ideal mechanism add to delta."""
    unlikely = (
        steps * 2.0**-OVERFLOW_BITS  # a batch was cut
        + 2.0**-OVERFLOW_BITS  # the sampler drifted further than accounted
        + steps * MOST_WEIGHTS * SAMPLER_TAIL  # a draw beyond 12 sigma
    )
    return (1 + math.exp(min(epsilon, 700.0))) * unlikely


def _divergence(a: float, b: float) -> float:
    """Kullback–Leibler divergence of Bernoulli(a) from Bernoulli(b), in nats."""
    if a > 1:
        return math.inf
    first = a * math.log(a / b) if a > 0 else 0.0
    if a < 1:
        return first + ((1 - a) * (math.log1p(-a) - math.log1p(-b)) if b < 1 else math.inf)
    return first


# Fixed point. A real that stands for an integer already comes back as that integer.


def _nearest(value: float, unit: int) -> int:
    if not math.isfinite(value) or not 0 < value * unit < 2**50:
        raise PrivacyRefused(f"{value!r} is not a positive number that a job can hold")
    return round(value * unit)


def _floor(value: float, unit: int) -> int:
    nearest = _nearest(value, unit)
    return nearest if nearest / unit <= value else nearest - 1


def _ceil(value: float, unit: int) -> int:
    nearest = _nearest(value, unit)
    return nearest if nearest / unit >= value else nearest + 1
