"""Where the prebuilt parts in Rust lie: the cell, the enclave runtime of each generic CPU level."""

from __future__ import annotations

from pathlib import Path

from myelin.errors import UsageError

_FOLDER = Path(__file__).parent / "native"


def native_file(name: str) -> Path:
    """The path of a prebuilt file; `UsageError` when it was not built."""
    path = _FOLDER / name
    if not path.exists():
        raise UsageError(f"{path} is missing: run `make setup` in the source folder")
    return path
