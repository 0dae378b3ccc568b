"""Images: the same bytes anywhere, a measurement by the book, refusals that say what differs."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import multiprocessing
import struct
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from myelin import nn, recipe
from myelin.cpu import LEVELS, Cpu, Precision
from myelin.errors import ImageInvalid, ImageMismatch, UsageError
from myelin.image import Image
from myelin.kernels import layout
from myelin.kernels import object as kernel_object
from myelin.kernels.cache import Cache
from myelin.optimizer import SGD, Adam


def make(folder: Path, **changes: Any) -> recipe.Build:
    settings: dict[str, Any] = {
        "loss": "cross-entropy",
        "optimizer": SGD(lr=0.5),
        "records": 100,
        "batch": 16,
        "directory": folder,
    }
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    return recipe.build(net, np.zeros((1, 12), np.float32), **settings | changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> recipe.Build:
    return make(tmp_path_factory.mktemp("built"))


def test_two_folders_give_the_same_bytes(
    built: recipe.Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "a folder of another name"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = make(Path("out"))
    assert again.image_path.read_bytes() == built.image_path.read_bytes()
    assert again.model_path.read_bytes() == built.model_path.read_bytes()


def test_a_rebuild_from_the_model_file_gives_the_same_bytes(built: recipe.Build) -> None:
    again = recipe.rebuild(built.model_path.read_bytes())
    assert again.content == built.image.content
    recipe.compare(again, built.image)


def test_the_measurement_is_that_of_an_independent_reading(built: recipe.Build) -> None:
    """MRENCLAVE as a stream of 64-byte blocks, written from the manual a second time."""
    content = built.image_path.read_bytes()
    assert len(content) <= 2 << 20
    start, count = (
        struct.unpack_from("<Q", content, 32)[0],
        struct.unpack_from("<H", content, 56)[0],
    )
    headers = [struct.unpack_from("<IIQQQQQQ", content, start + 56 * i) for i in range(count)]
    loads = sorted((h for h in headers if h[0] == 1), key=lambda h: h[3])
    end = loads[-1][3] + loads[-1][6] - 0x4000_0000
    size = 4096
    while size < end:
        size *= 2
    blocks = [b"ECREATE".ljust(8, b"\0") + (4).to_bytes(4, "little") + size.to_bytes(8, "little")]
    for _, flags, offset, address, _, filled, total, _ in loads[:-1]:
        memory = content[offset : offset + filled] + bytes(total - filled)
        memory += bytes(-len(memory) % 4096)
        rights = (flags >> 2 & 1) | (flags & 2) | (flags & 1) << 2
        for page in range(0, len(memory), 4096):
            place = (address - 0x4000_0000 + page).to_bytes(8, "little")
            secinfo = (rights | 0x200).to_bytes(8, "little")
            blocks.append(b"EADD".ljust(8, b"\0") + place + secinfo)
            for part in range(page, page + 4096, 256):
                place = (address - 0x4000_0000 + part).to_bytes(8, "little")
                blocks.append(b"EEXTEND".ljust(8, b"\0") + place)
                blocks += [memory[at : at + 64] for at in range(part, part + 256, 64)]
    stream = b"".join(block.ljust(64, b"\0") for block in blocks)
    assert built.image.measurement == hashlib.sha256(stream).digest()


def test_every_measured_byte_counts(built: recipe.Build) -> None:
    content = bytearray(built.image.content)
    for segment_offset in (0x1000, 0x1800):
        content[segment_offset] ^= 1
        assert Image(content=bytes(content)).measurement != built.image.measurement
        content[segment_offset] ^= 1
    assert Image(content=bytes(content)).measurement == built.image.measurement


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"optimizer": Adam(lr=0.5)}, "description field optimizer"),
        ({"records": 101}, "description field capacity"),
        ({"loss": "mean-squared-error"}, "description field loss"),
        ({"threads": 1}, "description field threads"),
    ],
)
def test_a_mismatch_says_which_part_differs(
    built: recipe.Build, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    other = make(tmp_path, **changes).image
    with pytest.raises(ImageMismatch, match=part):
        recipe.compare(other, built.image, original=built.image)
    with pytest.raises(ImageMismatch, match="give the original image"):
        recipe.compare(other, built.image)


def test_another_runtime_is_named(
    built: recipe.Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "libmyelin_enclave-x86-64-v3.a"
    original = recipe.native_file(archive.name).read_bytes()
    # One word of a message in the runtime, of the same length.
    assert b"approval-missing" in original
    archive.write_bytes(original.replace(b"approval-missing", b"approval-mixxing"))
    real = recipe.native_file
    monkeypatch.setattr(
        recipe, "native_file", lambda name: archive if name == archive.name else real(name)
    )
    changed = recipe.rebuild(built.model_path.read_bytes())
    with pytest.raises(ImageMismatch, match="version of runtime"):
        recipe.compare(changed, built.image, original=built.image)


@pytest.mark.parametrize(
    ("level", "precision"), [(cpu.level, p) for cpu in LEVELS for p in cpu.precisions[:2]]
)
def test_the_same_model_builds_for_every_level(
    level: str, precision: Precision, tmp_path: Path
) -> None:
    made = make(tmp_path, cpu=level, precision=precision)
    named = made.image.description["cpu"]
    features = list(Cpu.named(level).of(precision).features)
    assert named == {"level": level, "features": features, "precision": precision}
    assert recipe.rebuild(made.model_path.read_bytes()).measurement == made.image.measurement


def test_precision_is_measured_and_rebuilt(tmp_path: Path) -> None:
    """Wherever this runs: only the CPU that trains needs the instruction."""
    plain, mixed = (
        make(tmp_path / precision, cpu="znver4", precision=precision)
        for precision in ("float32", "bf16")
    )
    assert mixed.image.description["cpu"]["precision"] == "bf16"
    assert mixed.image.measurement != plain.image.measurement
    assert recipe.rebuild(mixed.model_path.read_bytes()).digest == mixed.image.digest


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"loss": "hinge"}, "cross-entropy"),
        ({"batch": 0}, "batch = 0"),
        ({"records": 0}, "records = 0"),
        ({"threads": 17}, "threads = 17"),
        ({"precision": "float8"}, "precision 'float8': choose one of float32, bf16, bf16x3"),
        (
            {"precision": "bf16"},
            "x86-64-v3 has no instruction for it; choose sapphirerapids, znver4",
        ),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=word):
        make(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_file_is_refused(built: recipe.Build) -> None:
    good = json.loads(built.model_path.read_bytes())
    for change, word in (
        ({"type": "other"}, "its type"),
        ({"extra": 1}, "nothing else"),
        ({"recipe": {}}, "recipe must hold exactly"),
    ):
        with pytest.raises(UsageError, match=word):
            recipe.rebuild(json.dumps({**good, **change}).encode())
    with pytest.raises(UsageError, match="not JSON"):
        recipe.rebuild(b"{")


def test_what_is_no_image_is_refused(built: recipe.Build, tmp_path: Path) -> None:
    content = built.image.content
    for broken, word in (
        (b"", "not a 64-bit"),
        (b"MZ" + content[2:], "not a 64-bit"),
        (content[:16] + b"\x03" + content[17:], "ELF type 3"),
        (content[:200], "outside the file"),
    ):
        path = tmp_path / "broken"
        path.write_bytes(broken)
        with pytest.raises(ImageInvalid, match=word):
            _ = Image.read(path).measurement


def test_a_writable_and_executable_segment_is_refused(built: recipe.Build) -> None:
    content = bytearray(built.image.content)
    (start,) = struct.unpack_from("<Q", content, 32)
    struct.pack_into("<I", content, start + 4, 7)
    with pytest.raises(ImageInvalid, match="writable and executable"):
        _ = Image(content=bytes(content)).segments


def test_the_dump_holds_every_stage(built: recipe.Build, tmp_path: Path) -> None:
    make(tmp_path / "out", dump=tmp_path / "dump")
    names = [path.name for path in sorted((tmp_path / "dump").iterdir())]
    assert any("import" in name for name in names)
    assert any("plan" in name for name in names)


def test_recipes_are_values(built: recipe.Build) -> None:
    _, read = recipe._read_model_file(built.model_path.read_bytes())
    assert replace(read) == read


def test_a_cache_changes_no_byte_and_survives_damage(built: recipe.Build, tmp_path: Path) -> None:
    cache = Cache(folder=tmp_path / "cache")
    for _ in range(2):
        again = make(tmp_path / "out", cache=cache)
        assert again.image.content == built.image.content
        entries = sorted(cache.folder.iterdir())
        assert len(entries) == len(built.image.description["kernels"])
        # What is damaged, cut or empty is compiled again.
        entries[0].write_bytes(entries[0].read_bytes()[:-1] + b"?")
        entries[1].write_bytes(b"")
        entries[2].unlink()
    assert make(tmp_path / "out", cache=cache).image.content == built.image.content


def test_a_cached_kernel_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(folder=tmp_path / "cache")
    make(tmp_path / "first", cache=cache)
    monkeypatch.setattr(kernel_object, "build", lambda *_: pytest.fail("compiled again"))
    make(tmp_path / "second", cache=cache)


def imported_by_the_lowering() -> list[str]:
    """Of the kernels' modules: what it does depends on their sources."""
    tree = ast.parse(Path(kernel_object.__file__).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert "myelin.kernels" not in {node.module for node in found}, "would not be seen here"
    return [str(node.module) for node in found if str(node.module).startswith("myelin.kernels.")]


@pytest.mark.parametrize("name", [kernel_object.__name__, *imported_by_the_lowering()])
def test_a_kernel_is_compiled_again_where_a_source_of_its_lowering_changed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = Cpu.named("x86-64-v3")
    cache, kernel = Cache(folder=tmp_path / "cache"), layout.permute(cpu, (2, 3), (1, 0))
    code = cache.object("kernel", kernel, cpu)
    assert cache.object("kernel", kernel, cpu) == code
    (first,) = cache.folder.iterdir()
    module = importlib.import_module(name)
    changed = tmp_path / "changed.py"
    changed.write_text(Path(module.__file__ or "").read_text() + "\n# Another source.\n")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert cache.object("kernel", kernel, cpu) == code
    assert len(set(cache.folder.iterdir()) - {first}) == 1


def build_at_once(folder: Path, number: int, start: Barrier) -> None:
    cache = Cache(folder=folder / "cache")
    start.wait()
    made = make(folder / "built", cache=cache)
    (folder / str(number)).write_bytes(made.image.content)


def test_two_processes_build_at_once_in_one_folder(built: recipe.Build, tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    start = processes.Barrier(2, timeout=60)
    both = [
        processes.Process(target=build_at_once, args=(tmp_path, number, start))
        for number in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    for path in (tmp_path / "0", tmp_path / "1", tmp_path / "built" / "image.elf"):
        assert path.read_bytes() == built.image.content
    entries = list((tmp_path / "cache").iterdir())
    assert len(entries) == len(built.image.description["kernels"])


def test_progress_names_every_kernel(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    made = make(tmp_path, progress=lambda *stage: told.append(stage))
    names = [kernel["name"] for kernel in made.image.description["kernels"]]
    compiled = [stage for stage in told if stage[0].startswith("compile")]
    assert compiled == [(f"compile kernel {k}", i, len(names)) for i, k in enumerate(names)]


def test_a_cache_that_cannot_be_written_stops_no_build(built: recipe.Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    cache = Cache(folder=tmp_path / "file" / "cache")
    assert make(tmp_path / "out", cache=cache).image.content == built.image.content


def test_a_description_outside_the_measured_pages_is_refused(built: recipe.Build) -> None:
    """Section headers are not measured: an author could point them at something friendlier."""
    content = bytearray(built.image.content)
    (table,) = struct.unpack_from("<Q", content, 40)
    count, names = struct.unpack_from("<HH", content, 60)
    (names_offset,) = struct.unpack_from("<Q", content, table + 64 * names + 24)
    for index in range(count):
        (title,) = struct.unpack_from("<I", content, table + 64 * index)
        if content[names_offset + title :][:13] == b".description\0":
            offset, size = struct.unpack_from("<QQ", content, table + 64 * index + 24)
            friendlier = content[offset : offset + size].replace(b"train", b"trend")
            struct.pack_into("<Q", content, table + 64 * index + 24, len(content))
            content += friendlier
            break
    decoy = Image(content=bytes(content))
    with pytest.raises(ImageInvalid, match="outside the measured read-only pages"):
        _ = decoy.description


def test_a_file_that_differs_outside_the_measured_pages_is_named(built: recipe.Build) -> None:
    other = Image(content=built.image.content + b"more")
    assert other.measurement == built.image.measurement
    with pytest.raises(ImageMismatch, match="outside the measured pages"):
        recipe.compare(other, built.image)
