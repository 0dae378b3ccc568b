"""The enclave image as every party reads it: its digest, its measurement, its description.

Nothing here compiles or runs anything; `myelin.recipe` makes images. The format is docs/image.md.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from myelin import document
from myelin.document import label, listing, octets, record, text, unsigned
from myelin.errors import ImageInvalid
from myelin.features import MOST_UNIT, MOST_ZERO

BASE = 0x4000_0000
PAGE = 4096
MAX_BYTES = 64 << 20

# SECINFO flags of a page (Intel SDM vol. 3D, 38.11): R, W, X in bits 0-2, page type in bits 8-15.
_READ, _WRITE, _EXECUTE, _REGULAR = 1, 2, 4, 2 << 8
_SSA_FRAME_PAGES = 4


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One loadable part of the image: `data` is the file's bytes, `size` the bytes in memory."""

    address: int
    size: int
    data: bytes
    readable: bool
    writable: bool
    executable: bool


@dataclass(frozen=True, kw_only=True)
class Image:
    """An enclave image in memory; its properties raise `ImageInvalid` where the form is broken."""

    content: bytes

    @classmethod
    def read(cls, path: Path) -> Image:
        """Reads an image file; `ImageInvalid` when it is not one."""
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageInvalid(f"image {path}: {size} bytes, more than {MAX_BYTES}")
        return cls(content=path.read_bytes())

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the file, 32 bytes."""
        return hashlib.sha256(self.content).digest()

    @cached_property
    def description(self) -> dict[str, Any]:
        """The measured description (docs/image.md)."""
        offset, address, content = _section(self.content, b".description")
        # Section headers are not measured: what they call the description must be measured.
        if not any(
            segment.address <= address
            and address + len(content) <= segment.address + len(segment.data)
            and self.content[offset:][: len(content)]
            == segment.data[address - segment.address :][: len(content)]
            and not segment.writable
            for segment in self.segments[:-1]
        ):
            raise ImageInvalid("image: its description lies outside the measured read-only pages")
        fields: dict[str, Any] = document.decode(content, _DESCRIPTION, limit=_DESCRIPTION_LIMIT)
        return fields

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The loadable segments in address order."""
        _check_elf(self.content)
        (table,) = struct.unpack_from("<Q", self.content, 32)
        (entry_size, count) = struct.unpack_from("<HH", self.content, 54)
        if entry_size != 56 or table + 56 * count > len(self.content):
            raise ImageInvalid("image: the program header table lies outside the file")
        segments = []
        for index in range(count):
            kind, flags, offset, address, _, filled, size, _ = struct.unpack_from(
                "<IIQQQQQQ", self.content, table + 56 * index
            )
            if kind != 1:
                continue
            if offset + filled > len(self.content) or filled > size:
                raise ImageInvalid(f"image: segment {index} lies outside the file")
            if address % PAGE or address < BASE:
                raise ImageInvalid(f"image: segment {index} at {address:#x} is misplaced")
            if flags & 1 and flags & 2:
                raise ImageInvalid(f"image: segment {index} is writable and executable")
            segments.append(
                Segment(
                    address=address,
                    size=size,
                    data=self.content[offset : offset + filled],
                    readable=bool(flags & 4),
                    writable=bool(flags & 2),
                    executable=bool(flags & 1),
                )
            )
        return tuple(sorted(segments, key=lambda segment: segment.address))

    @cached_property
    def measurement(self) -> bytes:
        """MRENCLAVE of the image, 32 bytes (Intel SDM vol. 3D, 38.4.1.1).

        The heap, the last segment, is not measured: it holds no content and is zeroed at start.
        """
        heap = self.segments[-1]
        if heap.data or heap.size != self.description["heap"]:
            raise ImageInvalid(
                f"image: the last segment has {heap.size} bytes, not the heap of "
                f"{self.description['heap']} bytes that the description names"
            )
        size = 1 << (heap.address + heap.size - BASE - 1).bit_length()
        chain = hashlib.sha256(
            b"ECREATE\0" + struct.pack("<IQ", _SSA_FRAME_PAGES, size) + bytes(44)
        )
        for segment in self.segments[:-1]:
            flags = (
                _REGULAR
                | _READ * segment.readable
                | _WRITE * segment.writable
                | _EXECUTE * segment.executable
            )
            for start in range(0, segment.size, PAGE):
                offset = segment.address - BASE + start
                page = segment.data[start : start + PAGE].ljust(PAGE, b"\0")
                chain.update(b"EADD\0\0\0\0" + struct.pack("<QQ", offset, flags) + bytes(40))
                for part in range(0, PAGE, 256):
                    chain.update(b"EEXTEND\0" + struct.pack("<Q", offset + part) + bytes(48))
                    chain.update(page[part : part + 256])
        return chain.digest()


def _check_elf(content: bytes) -> None:
    if len(content) < 64 or content[:6] != b"\x7fELF\x02\x01":
        raise ImageInvalid("image: not a 64-bit little-endian ELF file")
    kind, machine = struct.unpack_from("<HH", content, 16)
    if kind != 2 or machine != 62:
        raise ImageInvalid(
            f"image: ELF type {kind}, machine {machine}; a static x86-64 file it is not"
        )


def _section(content: bytes, name: bytes) -> tuple[int, int, bytes]:
    """Place in the file, address and bytes of one named section."""
    _check_elf(content)
    (table,) = struct.unpack_from("<Q", content, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", content, 58)
    if entry_size != 64 or names_index >= count or table + 64 * count > len(content):
        raise ImageInvalid("image: the section table lies outside the file")

    def place(index: int) -> tuple[int, int, int, int]:
        title, _, _, address, offset, size = struct.unpack_from(
            "<IIQQQQ", content, table + 64 * index
        )
        return title, address, offset, size

    _, _, names_offset, names_size = place(names_index)
    names = content[names_offset : names_offset + names_size]
    for index in range(count):
        title, address, offset, size = place(index)
        if names[title : title + len(name) + 1] == name + b"\0":
            if offset + size > len(content):
                break
            return offset, address, content[offset : offset + size]
    raise ImageInvalid(f"image: no section {name.decode()} inside the file")


def _free_map(value: Any, where: str) -> None:
    """A map of facts for people: its keys are not fixed."""
    record(dict.fromkeys(value, _fact) if isinstance(value, dict) else {})(value, where)


def _fact(value: Any, where: str) -> None:
    if not isinstance(value, int):
        text()(value, where)


_DESCRIPTION_LIMIT = 1 << 20
_SIZE = unsigned(1 << 36)
_CALLS = listing(listing(_SIZE, 15), 65_536)
_BUFFERS = ("x", "y", "mask", "hyper", "state", "output", "weights", "gradient")
_DESCRIPTION = record(
    {
        "type": label("myelin/image/1"),
        "task": text("train"),
        "loss": text("cross-entropy", "binary-cross-entropy", "mean-squared-error"),
        "optimizer": _free_map,
        "cpu": record(
            {
                "level": text(),
                "features": listing(text(), 64),
                "precision": text("float32", "bf16", "bf16x3"),
            }
        ),
        "batch": _SIZE,
        "threads": unsigned(16, least=1),
        "capacity": record({"records": _SIZE, "test": _SIZE}),
        "record": record(
            {
                "type": text("float32", "float16", "uint8"),
                "unit": unsigned(MOST_UNIT),
                "zero": unsigned(MOST_ZERO),
                "features": _SIZE,
                "label": _SIZE,
            }
        ),
        "outputs": _SIZE,
        "arena": _SIZE,
        "heap": _SIZE,
        "workspace": _SIZE,
        "model": octets(32),
        "versions": _free_map,
        "additions": _SIZE,
        "clipping": listing(record({"layer": text(), "norm": text()}), 65_536),
        "buffers": record(dict.fromkeys(_BUFFERS, listing(_SIZE, 2))),
        "kernels": listing(record({"name": text(), "args": listing(_SIZE, 14)}), 65_536),
        "gradient": _CALLS,
        "predict": _CALLS,
        "update": _CALLS,
        "parameters": listing(
            record(
                {
                    "name": text(),
                    "shape": listing(_SIZE, 8),
                    "layout": listing(unsigned(7), 8),
                    "offset": _SIZE,
                }
            ),
            65_536,
        ),
    }
)
