"""The wheel in empty environments: with the compiler it trains, alone it verifies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(*command: object, **changes: str) -> str:
    # Neither this source folder nor a Rust toolchain is within reach.
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PATH"}
    }
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=environment | {"PATH": "/usr/bin:/bin"} | changes,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *(sys.executable, "-m", "build", "--wheel", "--outdir", folder),
            *("-C--build-option=--plat-name=manylinux2014_x86_64", "."),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (made,) = folder.glob("*.whl")
    return made


def environment(folder: Path, wheel: Path, extras: str) -> Path:
    venv.create(folder, with_pip=True)
    lock = ROOT / "requirements.lock"
    pip = (folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "-c", lock, f"{wheel}{extras}")
    return folder / "bin"


@pytest.fixture(scope="module")
def trained(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("with-compiler")
    binaries = environment(folder / "venv", wheel, "[compile,demo]")
    facts = json.loads(run(binaries / "myelin", "demo", "--json", "--folder", folder / "demo"))
    assert facts["test_accuracy"] >= 0.92
    assert facts["epsilon"] <= 2
    return folder / "demo"


def test_the_wheel_trains_without_rust(trained: Path) -> None:
    assert (trained / "weights.safetensors").exists()


def test_the_wheel_alone_verifies_a_receipt(trained: Path, wheel: Path, tmp_path: Path) -> None:
    binaries = environment(tmp_path / "venv", wheel, "")
    policy = tmp_path / "policy.toml"
    root = trained / "simulator" / "root.pem"
    policy.write_text(f'type = "myelin/policy/1"\ndanger_simulator_root = "{root}"\n')
    answer = json.loads(
        run(
            *(binaries / "myelin", "verify", trained / "receipt.cbor", "--policy", policy),
            *("--job", trained / "job.cbor", "--json"),
        )
    )
    assert answer["simulated"] is True
    assert answer["steps"] == 200
    listed = run(binaries / "pip", "list", "--format", "freeze")
    assert "apache-tvm" not in listed
    assert "torch" not in listed
