"""Three owners train a small CNN on FashionMNIST inside an enclave, at any epsilon asked for.

python examples/fashion.py --epsilon 3 --steps 400 [--data FOLDER]

The data are Debian's package `dataset-fashion-mnist`. The TEE is simulated here.
"""

import argparse
import gzip
import secrets
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

import myelin
from myelin import nn, receipt, seal
from myelin.cpu import Cpu
from myelin.grant import grant

FOLDER = Path("/usr/share/datasets/fashion-mnist")
OWNERS = ("Shop", "Archive", "Studio")
BATCH = 256
# Pixels stay bytes, in sealed files and inside; the network sees them from -1 to 1.
PIXELS = myelin.Features(type="uint8", unit=127.5, zero=127.5)


def network() -> nn.Sequential:
    """26,010 parameters: two tanh convolutions with pooling, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def images(folder: Path, part: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [n, 1, 28, 28] and classes int32 [n]."""
    files = [folder / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        sys.exit(
            f"{', '.join(missing)} not found: install Debian's package dataset-fashion-mnist, "
            "or name the folder of the four .gz files with --data"
        )
    pixels = np.frombuffer(gzip.decompress(files[0].read_bytes()), np.uint8, offset=16)
    classes = np.frombuffer(gzip.decompress(files[1].read_bytes()), np.uint8, offset=8)
    return pixels.reshape(-1, 1, 28, 28)[:most], classes[:most].astype(np.int32)


def main() -> None:
    """Train, verify, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--records", type=int, default=60_000, help="training records to use")
    parser.add_argument("--data", type=Path, default=FOLDER)
    asked = parser.parse_args()

    pixels, classes = images(asked.data, "train", asked.records)
    test_pixels, test_classes = images(asked.data, "t10k", 10_000)
    folder, now = Path(mkdtemp(prefix="fashion-")), int(time.time())
    owners = [myelin.Party.generate(name) for name in OWNERS]
    registry, studio = myelin.Party.generate("Registry"), myelin.Party.generate("Researcher")
    shares = np.array_split(np.arange(len(pixels)), len(owners))
    room = max(map(len, shares))
    privacy = myelin.Privacy.for_epsilon(
        asked.epsilon,
        delta=1e-5,
        max_grad_norm=0.1,
        sample_rate=min(1.0, 2 * BATCH / len(pixels)),
        steps=asked.steps,
        records=room * len(owners),
    )
    built = myelin.build(
        network(),
        np.zeros((1, 1, 28, 28)),
        loss="cross-entropy",
        optimizer=myelin.SGD(lr=4.0, momentum=0.9),
        batch=BATCH,
        features=PIXELS,
        records=room * len(owners),
        test=len(test_pixels),
        cpu=Cpu.native().level,
        directory=folder,
    )
    job = myelin.Job.draft(
        image=built.image,
        weights=built.weights_digest,
        privacy=privacy,
        sends={
            "records": {owner.public: room for owner in owners},
            "test": {registry.public: len(test_pixels)},
        },
        receives={"weights": [studio.public], "score": [None]},
    )
    world = myelin.World.create(folder / "simulator", now=now)
    policy = myelin.Policy.dangerous_simulation(world.root).for_job(job)
    parts = {"image": built.image_path, "weights": built.weights_path, "attester": world}
    with myelin.Service(job=job, **parts) as service:
        for party in (*owners, registry, studio):
            service.approve(job.approve(party))
        collateral = service.endorsements(now=now)
        for index, send in enumerate(job.sends):
            test = send.slot == "test"
            owner = registry if test else owners[index]
            x, y = (test_pixels, test_classes) if test else (pixels, classes)
            own = slice(None) if test else shares[index]
            sealed, nonce = folder / f"{owner.name}.sealed", secrets.token_bytes(32)
            key = seal.seal_records(x[own], y[own], sealed, capacity=send.capacity)
            proven = service.evidence(nonce)
            fresh = myelin.appraise(proven, collateral, policy, nonce, now)
            ledger = None
            if not test:
                ledger = myelin.Ledger.create(
                    folder / f"{owner.name}.ledger",
                    commitment=key.commitment,
                    epsilon=asked.epsilon,
                    delta=1e-5,
                )
            granted = grant(owner, job, fresh, key, slot=send.slot, ledger=ledger)
            service.accept(index, granted, sealed)
        start = time.perf_counter()
        service.train(
            lambda done: print(f"\rstep {done} of {asked.steps}", end="", file=sys.stderr)
        )
        seconds = time.perf_counter() - start
        print(file=sys.stderr)
        proof = receipt.verify(service.finish(), policy, collateral, now)
    assert proof.score is not None
    print(
        f"test accuracy {proof.score.accuracy:.4f} at epsilon {proof.privacy.epsilon:.3f}, delta "
        f"1e-05 (add-or-remove-one), {proof.privacy.steps} steps in {seconds:.1f} s, TEE simulated"
    )


if __name__ == "__main__":
    main()
