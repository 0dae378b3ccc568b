"""Vectors and a small simulated world, for the tests of the client modules."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from myelin.errors import MyelinError
from myelin.evidence import Appraised, Evidence, appraise, report_data
from myelin.evidence.simulator import World
from myelin.job import ImageReference, Job
from myelin.party import Party
from myelin.policy import Policy
from myelin.privacy import Privacy

VECTORS = Path(__file__).parent.parent / "vectors" / "protocol"
NOW = 1_790_000_000
NONCE = bytes(range(32))


@functools.cache
def vectors(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def cases(name: str) -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in vectors(name)["invalid"]]


def vector_job() -> Job:
    return Job.from_bytes(bytes.fromhex(vectors("job")["valid"][0]["job"]))


@functools.cache
def party(name: str) -> Party:
    return Party.generate(name)


A, B, TESTER, RESEARCHER, INSTANCE = map(party, ("a", "b", "tester", "researcher", "instance"))


@functools.cache
def world() -> World:
    with TemporaryDirectory() as folder:
        return World.create(Path(folder, "world"), now=NOW)


PRIVACY = Privacy.for_records(
    300, noise_multiplier=2.5, max_grad_norm=1.0, sample_rate=0.125, steps=100, delta=1e-5
)


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "image": ImageReference(digest=bytes([1] * 32), measurement=bytes([2] * 32)),
        "weights": bytes([3] * 32),
        "privacy": PRIVACY,
        "sends": {"records": {A.public: 100, B.public: 200}, "test": {TESTER.public: 50}},
        "receives": {"weights": [RESEARCHER.public], "score": [None]},
    }
    return Job.draft(**fields | changes)


def evidence(made: Job, *, debug: bool = False, **changes: Any) -> bytes:
    """Evidence of INSTANCE for a job; `changes` come after the quote, so they break it."""
    public = INSTANCE.public
    bound = {"nonce": NONCE, "hpke": public.hpke, "sign": public.sign, "job": made.digest}
    quote = world().quote(made.image.measurement, report_data(**bound), debug=debug)
    return Evidence(**{"quote": quote, **bound, **changes}).to_bytes()


def policy(made: Job | None = None, **limits: Any) -> Policy:
    open_policy = Policy.dangerous_simulation(world().root, **limits)
    return open_policy if made is None else open_policy.for_job(made)


def appraised(made: Job) -> Appraised:
    endorsements = world().endorsements(now=NOW)
    return appraise(evidence(made), endorsements, policy(made), NONCE, NOW)


def damaged(data: bytes, *, every: int = 1, whole: bool = False) -> Iterator[tuple[str, bytes]]:
    """Single-byte mutations and truncations at every `every`-th place.

    One other value a byte, or with `whole` all 255.
    """
    for at in range(0, len(data), every):
        for change in range(1, 256) if whole else (1 << at % 8,):
            changed = bytearray(data)
            changed[at] ^= change
            yield f"byte {at} changed by {change}", bytes(changed)
        yield f"cut to {at}", data[:at]
    yield "one byte more", data + b"\0"


def assert_all_refused(
    data: bytes, use: Callable[[bytes], object], error: type[MyelinError], *, every: int = 1
) -> None:
    """No damaged form passes, and none fails otherwise than by `error`."""
    for what, changed in damaged(data, every=every):
        try:
            use(changed)
        except error:
            continue
        pytest.fail(f"accepted with {what}")
