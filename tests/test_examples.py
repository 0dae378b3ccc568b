"""The examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FASHION = Path("/usr/share/datasets/fashion-mnist")


def run(name: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def accuracy(said: str) -> float:
    found = re.search(r"test accuracy (0\.\d+)", said)
    assert found, said
    return float(found[1])


def test_hospitals() -> None:
    done = run("hospitals.py")
    assert accuracy(done.stdout) >= 0.92
    assert "simulated" in done.stdout
    assert len((EXAMPLES / "hospitals.py").read_text().splitlines()) <= 60


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.exists(), reason=f"{FASHION} is missing: dataset-fashion-mnist")
def test_fashion() -> None:
    done = run("fashion.py", "--epsilon", "3", "--steps", "200")
    # A guess is right in 0.1 of the cases; 400 steps reach about 0.83.
    assert accuracy(done.stdout) >= 0.75
    assert "simulated" in done.stdout


def test_fashion_says_what_is_missing(tmp_path: Path) -> None:
    done = run("fashion.py", "--data", str(tmp_path), code=1)
    assert "dataset-fashion-mnist" in done.stderr
    assert str(tmp_path / "train-images-idx3-ubyte.gz") in done.stderr
