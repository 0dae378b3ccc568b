"""The demo's data: breast-cancer records of three hospitals, and a fourth party's test records.

Wolberg, Street and Mangasarian, Breast Cancer Wisconsin (Diagnostic), 1995; part of scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Lowest and highest value of each feature as the data set's own published description gives them.
# They are public, so standardising by them costs no privacy; a mean or a deviation computed from
# the hospitals' records would be a query on private data that nobody accounted for. With other
# data, take such constants from the literature or from the instrument, never from the records.
RANGES = {
    "radius (mean)": (6.981, 28.11),
    "texture (mean)": (9.71, 39.28),
    "perimeter (mean)": (43.79, 188.5),
    "area (mean)": (143.5, 2501.0),
    "smoothness (mean)": (0.053, 0.163),
    "compactness (mean)": (0.019, 0.345),
    "concavity (mean)": (0.0, 0.427),
    "concave points (mean)": (0.0, 0.201),
    "symmetry (mean)": (0.106, 0.304),
    "fractal dimension (mean)": (0.05, 0.097),
    "radius (standard error)": (0.112, 2.873),
    "texture (standard error)": (0.36, 4.885),
    "perimeter (standard error)": (0.757, 21.98),
    "area (standard error)": (6.802, 542.2),
    "smoothness (standard error)": (0.002, 0.031),
    "compactness (standard error)": (0.002, 0.135),
    "concavity (standard error)": (0.0, 0.396),
    "concave points (standard error)": (0.0, 0.053),
    "symmetry (standard error)": (0.008, 0.079),
    "fractal dimension (standard error)": (0.001, 0.03),
    "radius (worst)": (7.93, 36.04),
    "texture (worst)": (12.02, 49.54),
    "perimeter (worst)": (50.41, 251.2),
    "area (worst)": (185.2, 4254.0),
    "smoothness (worst)": (0.071, 0.223),
    "compactness (worst)": (0.027, 1.058),
    "concavity (worst)": (0.0, 1.252),
    "concave points (worst)": (0.0, 0.291),
    "symmetry (worst)": (0.156, 0.664),
    "fractal dimension (worst)": (0.055, 0.208),
}

NAMES = ("Hospital North", "Hospital River", "Hospital Hill")
TEST_NAME = "Registry"


@dataclass(frozen=True, kw_only=True)
class Records:
    """One party's records: features float32 [count, 30], labels float32 [count, 1], 1 is benign."""

    features: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]


def load() -> tuple[dict[str, Records], Records]:
    """The three hospitals' records (142 each) and the test records (143)."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    features = standardise(data.data)
    labels = data.target.astype(np.float32).reshape(-1, 1)
    # Which record lies where is public and fixed, so that runs can be compared.
    order = np.random.default_rng(0).permutation(len(labels))
    parts = np.split(order, np.cumsum([143, 142, 142]))
    test, *hospitals = (Records(features=features[part], labels=labels[part]) for part in parts)
    return dict(zip(NAMES, hospitals, strict=True)), test


def standardise(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Maps raw features [count, 30] to about -3 … 3, on a logarithmic scale of the public ranges.

    The features are sizes with long upper tails; the logarithm, after a shift of a tenth of the
    range that keeps it away from zero, makes them nearly symmetric.
    """
    low, high = np.array(list(RANGES.values())).T
    shift = 0.1 * (high - low)
    bottom, top = np.log(low + shift), np.log(high + shift)
    position = (np.log(np.maximum(values, 0) + shift) - bottom) / (top - bottom)
    return np.asarray(3 * (2 * position - 1), dtype=np.float32)
