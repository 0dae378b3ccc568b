"""A real image in a real cell: the protocol end to end, and everything that it must refuse."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from parties import NOW, RESEARCHER, TESTER, A, B, damaged, party, policy, world

from myelin import nn, receipt, recipe, seal
from myelin.cell import Cell, backends
from myelin.cpu import PRECISIONS, Cpu, Precision
from myelin.enclave import Enclave
from myelin.errors import EnclaveRefused, ImageMismatch
from myelin.evidence import Appraised, Evidence, appraise
from myelin.grant import Ledger, grant
from myelin.job import Job
from myelin.optimizer import SGD
from myelin.outside import Outside
from myelin.party import Party
from myelin.privacy import Privacy
from myelin.receipt import Receipt
from myelin.seal import SealedKey
from myelin.service import Service
from myelin.weights import unpack

FEATURES = 1000
CAPACITY = 40
PRIVACY = Privacy.for_records(
    2 * CAPACITY, noise_multiplier=1.5, max_grad_norm=0.25, sample_rate=0.5, steps=4, delta=1e-5
)
OWNERS = {A.public.sign: A, B.public.sign: B, TESTER.public.sign: TESTER}
BACKENDS = [
    pytest.param(
        name,
        marks=[] if problem is None else pytest.mark.skip(reason=f"{name}: {problem}"),
    )
    for name, problem in backends().items()
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> recipe.Build:
    return recipe.build(
        nn.Sequential(nn.Linear(FEATURES, 10)),
        np.zeros((1, FEATURES), np.float32),
        loss="mean-squared-error",
        optimizer=SGD(lr=1.0),
        records=2 * CAPACITY,
        batch=16,
        directory=tmp_path_factory.mktemp("built"),
    )


@dataclass(kw_only=True)
class Stage:
    """A job on a running image, with what the parties need to take part."""

    built: recipe.Build
    job: Job
    enclave: Enclave
    sealed: dict[str, tuple[bytes, SealedKey]]

    def approve(self) -> None:
        for member in (A, B, RESEARCHER):
            self.enclave.approve(self.job.approve(member))

    def appraised(self) -> Appraised:
        nonce = secrets.token_bytes(32)
        keys = self.enclave.attest(nonce)
        quote = world().quote(self.job.image.measurement, keys.report_data)
        claim = Evidence(
            job=self.job.digest, hpke=keys.hpke, sign=keys.sign, nonce=nonce, quote=quote
        )
        endorsements = world().endorsements(now=NOW)
        return appraise(claim.to_bytes(), endorsements, policy(self.job), nonce, NOW)

    def grant(self, member: Party, folder: Path, *, job: Job | None = None) -> bytes:
        key = self.sealed[member.name][1]
        path = folder / secrets.token_hex(4)
        ledger = Ledger.create(path, commitment=key.commitment, epsilon=100, delta=1e-5)
        return grant(member, job or self.job, self.appraised(), key, ledger=ledger)

    def load(self, folder: Path) -> None:
        """Everything up to the first step."""
        self.approve()
        for index, member in enumerate((A, B)):
            self.enclave.grant(self.grant(member, folder))
            self.enclave.load(index, BytesIO(self.sealed[member.name][0]))
        self.enclave.weights(self.built.weights.tobytes())

    def train(self, **changes: int) -> int:
        fields = self.job.privacy.to_fields()
        wanted = {name: fields[name] for name in ("steps", "sample_rate", "noise_multiplier")}
        return self.enclave.train(**wanted | changes)


def write_job(built: recipe.Build, **changes: Any) -> Job:
    fields: dict[str, Any] = {
        "image": built.image,
        "weights": built.weights_digest,
        "privacy": PRIVACY,
        "sends": {"records": {A.public: CAPACITY, B.public: CAPACITY}},
        "receives": {"weights": [RESEARCHER.public]},
    }
    return Job.draft(**fields | changes)


def zero_gradient_records(built: recipe.Build, count: int) -> tuple[Any, Any]:
    """Records at which the model is exactly right, so that every gradient is exactly zero."""
    bias = safetensors.numpy.load_file(built.weights_path)
    right = next(value for value in bias.values() if value.shape == (10,))
    return np.zeros((count, FEATURES), np.float32), np.tile(right, (count, 1))


@pytest.fixture
def stage(built: recipe.Build) -> Iterator[Callable[..., Stage]]:
    cells: list[Cell] = []

    def start(backend: Any = "process", **changes: Any) -> Stage:
        job = write_job(built, **changes)
        sealed = {}
        for member, count in ((A, 30), (B, 7)):
            file = BytesIO()
            features, labels = zero_gradient_records(built, count)
            key = seal.seal_records(features, labels, file, capacity=CAPACITY)
            sealed[member.name] = (file.getvalue(), key)
        description = built.image.description
        cell = Cell(
            built.image_path,
            backend=backend,
            threads=description["threads"],
            features=description["cpu"]["features"],
        )
        cells.append(cell)
        enclave = Enclave(cell)
        enclave.job(job.to_bytes())
        return Stage(built=built, job=job, enclave=enclave, sealed=sealed)

    yield start
    for cell in cells:
        cell.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_release_exactly_the_noise_that_was_promised(
    built: recipe.Build, tmp_path: Path, backend: Any
) -> None:
    job = write_job(built)
    records = {member: zero_gradient_records(built, count) for member, count in ((A, 30), (B, 7))}
    verified, before, after = weights_of_one_step(built, job, records, tmp_path, backend)
    assert verified.privacy.steps == 1
    assert verified.privacy.epsilon < PRIVACY.epsilon
    noise = np.concatenate([(after[name] - before[name]).ravel() for name in before])
    sigma = PRIVACY.noise_multiplier * PRIVACY.max_grad_norm / PRIVACY.expected_batch
    # 10,010 draws: the variance of their variance is 2 / n, so 5 standard errors are 7 %.
    assert len(noise) == 10 * FEATURES + 10
    assert abs(noise.mean()) < 5 * sigma / np.sqrt(len(noise))
    assert abs(noise.var() / sigma**2 - 1) < 5 * np.sqrt(2 / len(noise))
    # And it is on the promised grid: the largest power of two at most sigma / 32, before division.
    whole = PRIVACY.noise_multiplier * PRIVACY.max_grad_norm
    grid = 2.0 ** np.floor(np.log2(whole / 32))
    biased = (after[name] - before[name] for name in before if before[name].shape == (10,))
    steps = next(biased).astype(np.float64) * PRIVACY.expected_batch / grid
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_in_any_precision_is_the_same_outside_but_for_the_noise(
    precision: Precision, tmp_path: Path
) -> None:
    """Every record is sampled, and all are alike, so that their sum is far larger than the noise:
    anything a kernel does otherwise in the cell would stand out of it.
    """
    cpu = Cpu.native()
    if precision not in cpu.precisions:
        pytest.skip(f"{cpu.level} has no {precision}")
    count, shape, batch = 2048, (16, 8, 8), 64
    privacy = Privacy.for_records(
        count, noise_multiplier=0.5, max_grad_norm=0.5, sample_rate=1, steps=1, delta=1e-3
    )
    built = recipe.build(
        nn.Sequential(
            *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(144, 10)),
        ),
        np.zeros((1, *shape), np.float32),
        loss="cross-entropy",
        optimizer=SGD(lr=1.0),
        records=count,
        batch=batch,
        cpu=cpu.level,
        precision=precision,
        directory=tmp_path / "built",
    )
    assert built.image.description["cpu"]["precision"] == precision
    x = np.abs(np.random.default_rng(3).standard_normal((count, *shape), np.float32))
    y = np.full(count, 3, np.int32)
    job = write_job(built, privacy=privacy, sends={"records": {A.public: count}})
    _, before, after = weights_of_one_step(built, job, {A: (x, y)}, tmp_path)
    # docs/image.md, hyper[0]: the roundings of the sum are charged to the threshold.
    rounding = 2 * built.image.description["additions"] * 2.0**-24 * privacy.max_batch
    threshold = privacy.max_grad_norm * (1 - rounding)
    outside = Outside(recipe.plan(built.model_path.read_bytes()), cpu)
    total = sum(
        outside.gradient(
            x[at : at + batch], y[at : at + batch], np.ones(batch), before, threshold
        ).astype(np.float64)
        for at in range(0, count, batch)
    )
    summed = unpack(built.image.description["parameters"], np.float32(total))
    inside = {n: (before[n].astype(float) - after[n]) * privacy.expected_batch for n in before}
    noise = np.concatenate([(inside[name] - summed[name]).ravel() for name in before])
    gradient = np.concatenate([summed[name].ravel() for name in before])
    sigma = privacy.noise_multiplier * privacy.max_grad_norm
    assert gradient.std() > 20 * sigma
    assert abs(noise.mean()) < 5 * sigma / np.sqrt(len(noise))
    assert abs(noise.var() / sigma**2 - 1) < 5 * np.sqrt(2 / len(noise))


def weights_of_one_step(
    built: recipe.Build,
    job: Job,
    records: dict[Party, tuple[Any, Any]],
    folder: Path,
    backend: Any = "process",
) -> tuple[Receipt, dict[str, Any], dict[str, Any]]:
    """The receipt of one step, and the weights before it and after it."""
    with Service(
        job=job,
        image=built.image_path,
        weights=built.weights_path,
        attester=world(),
        backend=backend,
    ) as service:
        for member in (*records, RESEARCHER):
            service.approve(job.approve(member))
        for index, (member, (features, labels)) in enumerate(records.items()):
            file = BytesIO()
            capacity = job.sends[index].capacity
            key = seal.seal_records(features, labels, file, capacity=capacity)
            file.seek(0)
            nonce = secrets.token_bytes(32)
            fresh = appraise(
                service.evidence(nonce), service.endorsements(now=NOW), policy(job), nonce, NOW
            )
            ledger = Ledger.create(
                folder / member.name, commitment=key.commitment, epsilon=100, delta=1e-5
            )
            service.accept(index, grant(member, job, fresh, key, ledger=ledger), file)
        fields = job.privacy.to_fields()
        service._enclave.weights(built.weights.tobytes())
        service._enclave.train(
            steps=1,
            sample_rate=fields["sample_rate"],
            noise_multiplier=fields["noise_multiplier"],
        )
        finished = service.finish()
        (output,) = service.outputs()
        sealed = BytesIO(b"".join(output.sealed))
    verified = receipt.verify(finished, policy(job), world().endorsements(now=NOW), NOW)
    plaintext = seal.open_output(
        RESEARCHER,
        output.envelope,
        sealed,
        job=job,
        slot="weights",
        digest=verified.output("weights", RESEARCHER.name).digest,
    )
    places = built.image.description["parameters"]
    before = unpack(places, built.weights)
    after = unpack(places, np.frombuffer(plaintext, np.float32))
    return verified, before, after


def test_two_runs_release_different_noise(stage: Any, tmp_path: Path) -> None:
    digests = set()
    for _ in range(2):
        here = stage()
        here.load(tmp_path)
        here.train()
        digests.add(here.enclave.finish()[:400])
    assert len(digests) == 2


def refused(reason: str) -> Any:
    return pytest.raises(EnclaveRefused, match=f"refused: {reason} ")


def test_nothing_starts_without_all_approvals(stage: Any, tmp_path: Path) -> None:
    here = stage()
    for member in (A, B):
        with refused("approval-missing"):
            here.enclave.attest(bytes(32))
        here.enclave.approve(here.job.approve(member))
    with refused("approval-duplicate"):
        here.enclave.approve(here.job.approve(A))
    with refused("approval-missing"):
        here.enclave.attest(bytes(32))
    here.enclave.approve(here.job.approve(RESEARCHER))
    here.enclave.attest(bytes(32))


def test_approvals_of_another_job_or_a_stranger_are_refused(stage: Any, built: Any) -> None:
    here = stage()
    other = write_job(built, privacy=replace(PRIVACY, steps=5))
    with refused("job-wrong"):
        here.enclave.approve(other.approve(A))
    stranger = party("stranger")
    with refused("party-unknown"):
        here.enclave.approve(
            stranger.sign(
                "myelin/approval/1", {"job": here.job.digest, "sign": stranger.public.sign}
            )
        )


def test_every_damaged_approval_is_refused(stage: Any) -> None:
    here = stage()
    assert_refuses_damaged(here.job.approve(A), here.enclave.approve)
    here.enclave.approve(here.job.approve(A))


def test_a_damaged_job_is_refused_or_is_another_job(built: Any) -> None:
    description = built.image.description
    job = write_job(built)
    approval = job.approve(A)
    refusals = others = 0
    variants = list(damaged(job.to_bytes(), every=29))
    while variants:
        with Cell(
            built.image_path,
            threads=description["threads"],
            features=description["cpu"]["features"],
        ) as cell:
            enclave = Enclave(cell)
            while variants:
                what, changed = variants.pop()
                try:
                    enclave.job(changed)
                except EnclaveRefused:
                    refusals += 1
                    continue
                # A changed number makes another job, which nobody approved.
                with pytest.raises(EnclaveRefused) as info:
                    enclave.approve(approval)
                assert info.value.reason in {"job-wrong", "party-unknown"}, what
                others += 1
                break
    assert refusals > 100
    assert others > 10


def test_every_damaged_grant_is_refused(stage: Any, tmp_path: Path) -> None:
    here = stage()
    here.approve()
    good = here.grant(A, tmp_path)
    # A bad signature ends the input, by design: then every further form meets that, too.
    assert_refuses_damaged(good, here.enclave.grant, every=3)


def test_grants_fit_one_instance_one_job_one_use(stage: Any, tmp_path: Path) -> None:
    first, second = stage(), stage()
    first.approve()
    second.approve()
    with refused("hpke-failed"):
        second.enclave.grant(first.grant(A, tmp_path))
    third = stage(privacy=replace(PRIVACY, steps=5))
    third.approve()
    with refused("grant-wrong|job-wrong"):
        third.enclave.grant(first.grant(A, tmp_path))
    good = first.grant(A, tmp_path)
    first.enclave.grant(good)
    with refused("grant-duplicate"):
        first.enclave.grant(good)


def chunks(sealed: bytes) -> tuple[bytes, list[bytes]]:
    size = seal.CHUNK + seal.TAG
    body = sealed[seal.HEADER :]
    return sealed[: seal.HEADER], [body[at : at + size] for at in range(0, len(body), size)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: [parts[1], parts[0], *parts[2:]], "chunk-tag-wrong"),
        (lambda parts: [parts[0], parts[0], *parts[1:]], "chunk-tag-wrong"),
        (lambda parts: [parts[0], *parts[2:]], "chunk-tag-wrong|chunk-order"),
        (lambda parts: [bytes([parts[0][0] ^ 1]) + parts[0][1:], *parts[1:]], "chunk-tag-wrong"),
        (lambda parts: [*parts[:-1], parts[-1][:-1]], "chunk-tag-wrong|chunk-order"),
        (lambda parts: [*parts, parts[-1]], "chunk-tag-wrong"),
    ],
    ids=["reordered", "repeated", "dropped", "altered", "cut", "appended"],
)
def test_chunks_out_of_order_are_refused(
    stage: Any, tmp_path: Path, change: Any, reason: str
) -> None:
    here = stage()
    here.approve()
    here.enclave.grant(here.grant(A, tmp_path))
    header, parts = chunks(here.sealed[A.name][0])
    assert len(parts) > 2
    with refused(f"({reason})"):
        here.enclave.load(0, BytesIO(header + b"".join(change(parts))))
    with refused("(input-missing|grant-missing)"):
        here.enclave.weights(here.built.weights.tobytes())
        here.train()


def test_another_sealed_file_of_the_same_key_is_refused(stage: Any, tmp_path: Path) -> None:
    here = stage()
    here.approve()
    content, key = here.sealed[A.name]
    file = BytesIO()
    length = seal.RECORD_HEADER + CAPACITY * (4 * FEATURES + 40)
    seal.seal_stream([bytes(length)], length, file, key=key.key, salt=bytes(32))
    here.enclave.grant(here.grant(A, tmp_path))
    with refused("commitment-wrong"):
        here.enclave.load(0, BytesIO(file.getvalue()))
    assert len(file.getvalue()) == len(content)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 5}, "steps-exceeded"),
        ({"sample_rate": PRIVACY.to_fields()["sample_rate"] + 1}, "sample-rate-raised"),
        ({"noise_multiplier": PRIVACY.to_fields()["noise_multiplier"] - 1}, "noise-lowered"),
    ],
)
def test_an_image_asked_for_less_privacy_refuses(
    stage: Any, tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    here = stage()
    here.load(tmp_path)
    with refused(reason):
        here.train(**changes)
    assert here.train(steps=3) == 3
    with refused("steps-exceeded"):
        here.train(steps=2)
    assert here.train(steps=1) == 4


def test_other_initial_weights_are_refused(stage: Any, tmp_path: Path) -> None:
    here = stage()
    here.approve()
    other = here.built.weights + 1
    with refused("weights-digest-wrong"):
        here.enclave.weights(other.tobytes())


def test_training_waits_for_every_input(stage: Any, tmp_path: Path) -> None:
    here = stage()
    here.approve()
    here.enclave.weights(here.built.weights.tobytes())
    here.enclave.grant(here.grant(A, tmp_path))
    here.enclave.load(0, BytesIO(here.sealed[A.name][0]))
    with refused("input-missing"):
        here.train()


def test_a_finished_enclave_trains_no_more(stage: Any, tmp_path: Path) -> None:
    here = stage()
    here.load(tmp_path)
    here.train(steps=1)
    here.enclave.finish()
    with refused("wrong-state"):
        here.train(steps=1)


def test_another_image_file_is_refused_before_it_runs(built: Any, tmp_path: Path) -> None:
    content = bytearray(built.image_path.read_bytes())
    content[0x2000] ^= 1
    other = tmp_path / "image.elf"
    other.write_bytes(content)
    with pytest.raises(ImageMismatch, match="SHA-256"):
        Service(
            job=write_job(built),
            image=other,
            weights=built.weights_path,
            attester=world(),
        )


def test_unknown_operations_are_refused(stage: Any) -> None:
    here = stage()
    with refused("operation-unknown"):
        here.enclave._transport.request(99)


def assert_refuses_damaged(data: bytes, use: Callable[[bytes], None], **how: Any) -> None:
    for what, changed in damaged(data, **how):
        try:
            use(changed)
        except EnclaveRefused:
            continue
        pytest.fail(f"accepted with {what}")


@pytest.mark.slow
def test_every_value_of_every_byte_of_an_approval_is_refused(stage: Any) -> None:
    here = stage()
    approval = here.job.approve(A)
    assert_refuses_damaged(approval, here.enclave.approve, whole=True)
    here.enclave.approve(approval)


@pytest.mark.slow
def test_every_value_of_every_byte_of_a_grant_is_refused(stage: Any, tmp_path: Path) -> None:
    """Each on an instance whose input is still alive, so that the damage itself is refused."""
    here = stage()
    here.approve()
    good = here.grant(A, tmp_path)
    for what, changed in damaged(good, every=7):
        fresh = stage()
        fresh.approve()
        with pytest.raises(EnclaveRefused) as info:
            fresh.enclave.grant(changed)
        assert info.value.reason not in {"wrong-state", "grant-duplicate"}, what
        fresh.enclave._transport.close()  # type: ignore[attr-defined]
    assert_refuses_damaged(good, here.enclave.grant, whole=True)
