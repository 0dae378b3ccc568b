"""Compiled kernels kept between builds, so that an unchanged kernel is compiled once.

An entry's name is the digest of everything that decides its bytes; its content starts with its own
digest, so a damaged entry is compiled again. Entries appear whole or not at all, which makes builds
at the same time safe. Whoever can write the folder can change what is built from it: `rebuild` uses
no cache, and a comparison of measurements shows the difference.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from myelin.cpu import Cpu
from myelin.exchange import place
from myelin.kernels import object as kernel_object
from myelin.kernels import tir


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A folder of object files."""

    folder: Path

    @classmethod
    def default(cls) -> Cache:
        """`myelin/kernels` under $XDG_CACHE_HOME, or under ~/.cache."""
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(folder=Path(base) / "myelin" / "kernels")

    def object(self, name: str, kernel: Any, cpu: Cpu) -> bytes:
        """The object file of one kernel, compiled now if it is not here."""
        path = self.folder / _key(name, kernel, cpu)
        try:
            digest, content = (found := path.read_bytes())[:32], found[32:]
        except OSError:
            digest, content = b"", b""
        if hashlib.sha256(content).digest() == digest:
            return content
        content = kernel_object.build({name: kernel}, cpu)
        try:
            place(path, hashlib.sha256(content).digest() + content)
        except OSError:
            return content  # A cache that cannot be written costs time, nothing else.
        return content


def _key(name: str, kernel: Any, cpu: Cpu) -> str:
    parts = (
        version("apache-tvm"),
        *(Path(source).read_bytes() for source in (kernel_object.__file__, tir.__file__)),
        str(cpu.target).encode(),
        name,
        kernel.script(show_meta=True),
    )
    key = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        key.update(len(data).to_bytes(8, "little") + data)
    return key.hexdigest()
