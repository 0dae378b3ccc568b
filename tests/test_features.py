"""Compact records: what the enclave computes with is what `decode` says."""

from __future__ import annotations

import math
import re
import secrets
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parties import NOW, RESEARCHER, TESTER, A, policy, world

from myelin import nn, receipt, recipe, seal
from myelin.errors import DataRefused, UsageError
from myelin.evidence import appraise
from myelin.features import Features
from myelin.grant import Ledger, grant
from myelin.job import Job
from myelin.optimizer import SGD
from myelin.privacy import Privacy
from myelin.service import Service

PIXELS = Features(type="uint8", unit=127.5, zero=127.5)
COUNT, WIDTH = 40, 9
UNIT = "uint8 features need a unit from 0.000001 to 68719.476736"
ZERO = "uint8 features need a zero from 0.000000 to 2147.483647"


@pytest.mark.parametrize(
    ("features", "stored", "values"),
    [
        (Features(), np.array([0.1, -3], np.float32), [np.float32(0.1), -3]),
        (Features(type="float16"), np.array([0.1, -3], np.float16), [np.float16(0.1), -3]),
        (Features(type="uint8", unit=255), np.array([0, 51, 255], np.uint8), [0, 0.2, 1]),
        (PIXELS, np.array([0, 127, 255], np.uint8), [-1, -0.5 / 127.5, 1]),
    ],
)
def test_values(features: Features, stored: Any, values: list[float]) -> None:
    np.testing.assert_allclose(features.decode(stored), np.float32(values), rtol=1e-7)
    assert Features.from_document(features.document()) == features


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"type": "int8"}, "type 'int8': choose one of float32, float16, uint8"),
        ({"type": "uint8"}, f"{UNIT}, not 0.0"),
        ({"type": "uint8", "unit": -1.0}, f"{UNIT}, not -1.0"),
        ({"type": "uint8", "unit": 1e-7}, f"{UNIT}, not 1e-07"),
        ({"type": "uint8", "unit": 1e6}, f"{UNIT}, not 1000000.0"),
        ({"type": "uint8", "unit": math.inf}, f"{UNIT}, not inf"),
        ({"type": "uint8", "unit": math.nan}, f"{UNIT}, not nan"),
        ({"type": "uint8", "unit": 1.0, "zero": -1.0}, f"{ZERO}, not -1.0"),
        ({"type": "uint8", "unit": 1.0, "zero": 3000.0}, f"{ZERO}, not 3000.0"),
        ({"type": "uint8", "unit": 1.0, "zero": 2**31 / 1e6}, f"{ZERO}, not 2147.483648"),
        ({"type": "uint8", "unit": 1.0, "zero": math.nan}, f"{ZERO}, not nan"),
        ({"type": "float16", "unit": 1.0}, "type float16 have no unit and no zero"),
        ({"type": "float32", "zero": 1.0}, "type float32 have no unit and no zero"),
    ],
)
def test_refusals(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)):
        Features(**fields)


def test_the_largest_unit_and_zero() -> None:
    largest = Features(type="uint8", unit=2**36 / 1e6, zero=(2**31 - 1) / 1e6)
    assert Features.from_document(largest.document()) == largest


@pytest.mark.parametrize("kind", ["uint8", "float16"])
def test_the_score_inside_is_that_of_the_decoded_records(kind: str, tmp_path: Path) -> None:
    """The predictions of a random model on random records: any slip in the gather changes some."""
    generator = np.random.default_rng(5)
    features = PIXELS if kind == "uint8" else Features(type="float16")
    if kind == "uint8":
        stored: Any = generator.integers(0, 256, (COUNT, WIDTH), dtype=np.uint8)
    else:
        stored = generator.normal(size=(COUNT, WIDTH)).astype(np.float16)
    net = nn.Sequential(nn.Linear(WIDTH, 6))
    built = recipe.build(
        net,
        np.zeros((1, WIDTH), np.float32),
        loss="cross-entropy",
        optimizer=SGD(lr=1e-30),
        records=COUNT,
        test=COUNT,
        batch=16,
        features=features,
        directory=tmp_path / "built",
    )
    weight, bias = built.weights[: WIDTH * 6].reshape(WIDTH, 6), built.weights[64:70]
    assert len(built.weights) == 80
    predicted = (features.decode(stored).astype(np.float64) @ weight + bias).argmax(1)
    labels = predicted.astype(np.int32)
    labels[::3] = (labels[::3] + 1) % 6
    job = Job.draft(
        image=built.image,
        weights=built.weights_digest,
        privacy=Privacy.for_records(
            COUNT, noise_multiplier=1.0, max_grad_norm=1.0, sample_rate=0.5, steps=1, delta=1e-5
        ),
        sends={"records": {A.public: COUNT}, "test": {TESTER.public: COUNT}},
        receives={"weights": [RESEARCHER.public], "score": [None]},
    )
    with Service(
        job=job, image=built.image_path, weights=built.weights_path, attester=world()
    ) as service:
        for member in (A, TESTER, RESEARCHER):
            service.approve(job.approve(member))
        collateral = service.endorsements(now=NOW)
        for index, (member, slot) in enumerate(((A, "records"), (TESTER, "test"))):
            file, nonce = BytesIO(), secrets.token_bytes(32)
            key = seal.seal_records(stored, labels, file, capacity=COUNT)
            # What comes on top is less than a second byte of each feature would be.
            assert len(file.getvalue()) < COUNT * (WIDTH * features.bytes + 4) + COUNT * WIDTH
            fresh = appraise(service.evidence(nonce), collateral, policy(job), nonce, NOW)
            ledger = None
            if slot == "records":
                ledger = Ledger.create(
                    tmp_path / "ledger", commitment=key.commitment, epsilon=100, delta=1e-5
                )
            file.seek(0)
            service.accept(index, grant(member, job, fresh, key, slot=slot, ledger=ledger), file)
        service.train()
        proof = receipt.verify(service.finish(), policy(job), collateral, NOW)
    assert proof.score is not None
    assert (proof.score.correct, proof.score.total) == (COUNT - len(labels[::3]), COUNT)


def test_other_types_are_refused_by_name() -> None:
    with pytest.raises(DataRefused, match="float64"):
        seal.seal_records(np.zeros((2, 2)), np.zeros(2, np.int32), BytesIO(), capacity=2)  # type: ignore[arg-type]
