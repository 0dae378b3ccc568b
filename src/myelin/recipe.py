"""From a model to an enclave image, and the same again by anyone who wants to check it.

A build folder holds `image.elf`, `model.json` (all that is needed to rebuild it, no weights) and
`weights.safetensors` (the public initial weights).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from myelin.cpu import LEVELS, PRECISIONS, Cpu, Precision
from myelin.document import encode
from myelin.errors import BuildFailed, ImageMismatch, UsageError
from myelin.exchange import place
from myelin.features import Features
from myelin.graph import LOSSES
from myelin.image import Image
from myelin.importers import load
from myelin.job import Reference
from myelin.kernels import object as kernel_object
from myelin.kernels.cache import Cache
from myelin.model import Model
from myelin.native import native_file
from myelin.optimizer import Optimizer, optimizer_from_dict, optimizer_to_dict
from myelin.plan import Program, compile_training
from myelin.planner import STORED_BYTES
from myelin.weights import pack

_INPUTS = 16
MOST_HEAP = 60 << 30
"""Between the image and the mailbox (docs/image.md)."""
FLOAT32 = Features()

Progress = Callable[[str, int, int], None]
"""Told what is done now, and that it is number `done` (from 0) of `total` like it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything but the model's graph that decides the image's bytes.

    `batch` is the number of examples of a physical batch, `records` and `test` the number of
    records that fit, over all senders; `features` how records keep their features; `stored_bytes`
    the memory for stored per-example gradients; `threads` the thread slots; `cpu` a level of `Cpu`;
    `precision` that of products, float32 on any level.
    """

    loss: str
    optimizer: Optimizer
    batch: int = 64
    records: int
    test: int = 0
    features: Features = FLOAT32
    stored_bytes: int = STORED_BYTES
    cpu: str = "x86-64-v3"
    precision: Precision = "float32"
    threads: int = 2

    def __post_init__(self) -> None:
        """Refuses what no image can have."""
        if self.loss not in LOSSES:
            raise UsageError(f"loss {self.loss!r}: choose one of {', '.join(LOSSES)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.precision not in Cpu.named(self.cpu).precisions:
            able = ", ".join(c.level for c in LEVELS if self.precision in c.precisions)
            raise UsageError(
                f"precision {self.precision!r}: CPU level {self.cpu} has no instruction for it; "
                f"choose {able}"
            )
        for name, low, high in (
            ("batch", 1, 65_536),
            ("records", 1, 1 << 30),
            ("test", 0, 1 << 30),
            ("stored_bytes", 0, 1 << 32),
            ("threads", 1, 16),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} = {value}: it must lie between {low} and {high}")


@dataclass(frozen=True, kw_only=True)
class Build:
    """A finished build in its folder."""

    directory: Path
    image: Image

    @property
    def image_path(self) -> Path:
        """The image's ELF file."""
        return self.directory / "image.elf"

    @property
    def model_path(self) -> Path:
        """The model file, from which anyone can rebuild the image."""
        return self.directory / "model.json"

    @property
    def weights_path(self) -> Path:
        """The public initial weights."""
        return self.directory / "weights.safetensors"

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """The initial weights as the enclave takes them, flat float32 [D]."""
        values = safetensors.numpy.load_file(self.weights_path)
        return pack(self.image.description["parameters"], values)

    @property
    def weights_digest(self) -> bytes:
        """What a job names the initial weights by: SHA-256 of the flat weights."""
        return hashlib.sha256(self.weights.tobytes()).digest()

    @classmethod
    def open(cls, directory: Path) -> Build:
        """Reads a build folder; the image is checked for form."""
        return cls(directory=directory, image=Image.read(directory / "image.elf"))


def build(
    source: Any,
    example: Any,
    *,
    loss: str,
    optimizer: Optimizer,
    records: int,
    directory: Path,
    test: int = 0,
    batch: int = 64,
    features: Features = FLOAT32,
    stored_bytes: int = STORED_BYTES,
    cpu: str = "x86-64-v3",
    precision: Precision = "float32",
    threads: int = 2,
    cache: Cache | None = None,
    dump: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Build:
    """Compiles a model into an image under `directory`.

    `source` is a `torch.nn.Module`, the path of an ONNX file, a layer of `myelin.nn`, or a Relax
    module; `example` one input with a leading batch axis, float32. `cache` keeps
    compiled kernels between builds; `dump` receives the IR after each pass; `progress` is told each
    stage, and each kernel's name.

    Raises `UsageError` for settings out of range, `ModelRefused` and `UnsupportedLayer` for a model
    that cannot be trained privately, `BuildFailed` when the linker refuses.
    """
    recipe = Recipe(
        loss=loss,
        optimizer=optimizer,
        batch=batch,
        records=records,
        test=test,
        features=features,
        stored_bytes=stored_bytes,
        cpu=cpu,
        precision=precision,
        threads=threads,
    )
    progress("import the model", 0, 1)
    model = load(source, example)
    document = _model_file(model, recipe)
    image = _compile(model, recipe, document, cache=cache, dump=dump, progress=progress)
    result = Build(directory=directory, image=image)
    place(result.image_path, image.content)
    place(result.model_path, document)
    place(result.weights_path, safetensors.numpy.save(dict(model.parameters)))
    return result


def rebuild(document: bytes, *, progress: Progress = lambda stage, done, total: None) -> Image:
    """Builds the image again from the bytes of a model file, with nothing from an earlier build.

    Raises `UsageError` and `ModelRefused` for a file that is not one, and what `build` raises.
    """
    model, recipe = _read_model_file(document)
    return _compile(model, recipe, document, cache=None, dump=None, progress=progress)


def plan(document: bytes) -> Program:
    """The plan of a model file: its kernels and `decisions`, without compiling or linking."""
    model, recipe = _read_model_file(document)
    return compile_training(
        model,
        loss=recipe.loss,
        optimizer=recipe.optimizer,
        batch=recipe.batch,
        cpu=Cpu.named(recipe.cpu).of(recipe.precision),
        precision=recipe.precision,
        stored_bytes=recipe.stored_bytes,
        threads=recipe.threads,
    )


def compare(rebuilt: Image, reference: Reference, *, original: Image | None = None) -> None:
    """Raises `ImageMismatch`, naming the parts that differ, unless the rebuilt image is the same.

    `reference` is the job's image, or an image; `original` the file to look for differences in.
    """
    measurement = reference.measurement
    if rebuilt.measurement == measurement:
        if rebuilt.digest == reference.digest:
            return
        raise ImageMismatch(
            f"measurement {measurement.hex()} is the same, but the file differs outside the "
            f"measured pages: SHA-256 {rebuilt.digest.hex()}, the job names "
            f"{reference.digest.hex()}; do not believe the job's file, use the rebuilt one"
        )
    found = f"measurement {rebuilt.measurement.hex()}, the job names {measurement.hex()}"
    if original is None:
        raise ImageMismatch(f"{found}; give the original image to see which part differs")
    if original.measurement != measurement:
        raise ImageMismatch(
            f"{found}; the original image given here measures {original.measurement.hex()}: "
            "it is not the job's image either"
        )
    raise ImageMismatch(f"{found}; different: {', '.join(_differences(rebuilt, original))}")


def _differences(rebuilt: Image, original: Image) -> list[str]:
    ours, theirs = rebuilt.description, original.description
    parts = [
        f"version of {name} ({ours['versions'].get(name)}, there {theirs['versions'].get(name)})"
        for name in sorted({*ours["versions"], *theirs["versions"]})
        if ours["versions"].get(name) != theirs["versions"].get(name)
    ]
    parts += [
        f"description field {name}"
        for name in sorted({*ours, *theirs} - {"versions"})
        if ours.get(name) != theirs.get(name)
    ]
    return parts or ["the linked code, with equal descriptions (another linker?)"]


def _compile(
    model: Model,
    recipe: Recipe,
    document: bytes,
    *,
    cache: Cache | None,
    dump: Path | None,
    progress: Progress,
) -> Image:
    cpu = Cpu.named(recipe.cpu).of(recipe.precision)
    progress("derive the private training graph", 0, 1)
    program = compile_training(
        model,
        loss=recipe.loss,
        optimizer=recipe.optimizer,
        batch=recipe.batch,
        cpu=cpu,
        precision=recipe.precision,
        stored_bytes=recipe.stored_bytes,
        dump=dump,
    )
    workspace = kernel_object.workspace_bytes(program.kernels, cpu)
    heap = _heap(program, recipe, workspace)
    if heap > MOST_HEAP:
        raise UsageError(
            f"the image would need {heap / 2**30:.1f} GiB of heap, at most {MOST_HEAP >> 30} fit: "
            "state fewer records or a smaller batch, or keep features as uint8"
        )
    kernels = _objects(program, cpu, cache, progress)
    runtime = native_file(f"libmyelin_enclave-{cpu.runtime}.a").read_bytes()
    sizes = {"heap": heap, "workspace": workspace}
    description = encode(_describe(program, recipe, cpu, document, kernels, runtime, sizes))
    progress("link the image", 0, 1)
    return Image(content=_link(program, recipe, kernels, runtime, description, heap))


def _objects(program: Program, cpu: Cpu, cache: Cache | None, progress: Progress) -> list[bytes]:
    """An object file of each kernel, in the order of the description."""
    objects = []
    for number, (name, kernel) in enumerate(program.kernels.items()):
        progress(f"compile kernel {name}", number, len(program.kernels))
        if cache is None:
            objects.append(kernel_object.build({name: kernel}, cpu))
        else:
            objects.append(cache.object(name, kernel, cpu))
    return objects


def _describe(
    program: Program,
    recipe: Recipe,
    cpu: Cpu,
    document: bytes,
    kernels: list[bytes],
    runtime: bytes,
    sizes: dict[str, int],
) -> dict[str, Any]:
    return {
        "type": "myelin/image/1",
        "task": "train",
        "loss": recipe.loss,
        "optimizer": optimizer_to_dict(recipe.optimizer, text=True),
        "cpu": {"level": cpu.level, "features": list(cpu.features), "precision": recipe.precision},
        "batch": recipe.batch,
        "threads": recipe.threads,
        "capacity": {"records": recipe.records, "test": recipe.test},
        "record": {
            **recipe.features.document(),
            "features": recipe.features.bytes * program.features,
            "label": program.label_bytes,
        },
        "outputs": program.outputs,
        "arena": program.arena,
        **sizes,
        "model": hashlib.sha256(document).digest(),
        "versions": {
            "myelin": version("myelin"),
            "tvm": version("apache-tvm"),
            "ziglang": version("ziglang"),
            "kernels": hashlib.sha256(b"".join(kernels)).hexdigest(),
            "runtime": hashlib.sha256(runtime).hexdigest(),
        },
        "additions": program.additions,
        **program.description(),
    }


def _heap(program: Program, recipe: Recipe, workspace: int) -> int:
    record = recipe.features.bytes * program.features + program.label_bytes
    weights = program.buffers["weights"][1] // 4
    capacity = recipe.records + recipe.test
    parts = (
        program.arena,
        8 * weights,
        workspace * recipe.threads,
        4 * recipe.records,
        capacity * record + _INPUTS * 128,
    )
    return _round_up(sum(_round_up(part, 64) for part in parts), 4096)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _link(
    program: Program,
    recipe: Recipe,
    kernels: list[bytes],
    runtime: bytes,
    description: bytes,
    heap: int,
) -> bytes:
    slots = range(recipe.threads)
    script = native_file("image.ld").read_text()
    for word, lines in (
        ("KERNELS", [f"QUAD({name})" for name in program.kernels]),
        ("STACK_HEADERS", [f"stack{slot} PT_LOAD FLAGS(6);" for slot in slots]),
        ("STACK_TOPS", [f"QUAD(__stack{slot}_top)" for slot in slots]),
        (
            "STACKS",
            [
                f". += 0x10000; .stack{slot} (NOLOAD) : "
                f"{{ . += 0x40000; __stack{slot}_top = .; }} :stack{slot}"
                for slot in slots
            ],
        ),
        ("HEAP", [str(heap)]),
    ):
        script = script.replace(f"@{word}@", "\n".join(lines))
    objects = [f"kernel{number}.o" for number in range(len(kernels))]
    with tempfile.TemporaryDirectory() as folder:
        # Bare file names: no path of this machine can reach the image.
        for name, content in (
            ("image.ld", script.encode()),
            *zip(objects, kernels, strict=True),
            ("libmyelin_enclave.a", runtime),
            ("description.cbor", description),
        ):
            Path(folder, name).write_bytes(content)
        command = [sys.executable, "-m", "ziglang", "ld.lld", *_LINK, *objects, *_LAST]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildFailed(f"linking the image failed:\n{done.stderr.strip()}")
        return Path(folder, "image.elf").read_bytes()


_LINK = (
    *("-T", "image.ld", "--static", "--no-pie", "-z", "noexecstack", "-z", "max-page-size=4096"),
    *("--gc-sections", "--build-id=none", "--fatal-warnings", "--no-undefined", "--strip-all"),
    *("-o", "image.elf"),
)
_LAST = ("libmyelin_enclave.a", "--format=binary", "description.cbor")


def _model_file(model: Model, recipe: Recipe) -> bytes:
    options = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    options["optimizer"] = optimizer_to_dict(recipe.optimizer)
    options["features"] = recipe.features.document()
    content = {
        "type": "myelin/model-file/1",
        "model": json.loads(model.document()),
        "recipe": options,
    }
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _read_model_file(document: bytes) -> tuple[Model, Recipe]:
    try:
        content = json.loads(document)
    except ValueError as error:
        raise UsageError(f"model file: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("type") != "myelin/model-file/1":
        raise UsageError("model file: its type is not myelin/model-file/1")
    if set(content) != {"type", "model", "recipe"} or not isinstance(content["recipe"], dict):
        raise UsageError("model file: it must hold type, model and recipe, nothing else")
    options = dict(content["recipe"])
    wanted = {field.name for field in fields(Recipe)}
    if set(options) != wanted:
        odd = ", ".join(sorted(set(options) ^ wanted))
        raise UsageError(
            f"model file: the recipe must hold exactly {', '.join(sorted(wanted))}; it differs in "
            f"{odd}, as one made by another version of Myelin would"
        )
    options["optimizer"] = optimizer_from_dict(options["optimizer"])
    try:
        options["features"] = Features.from_document(options["features"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"model file: features are malformed ({error})") from None
    graph = json.dumps(content["model"], sort_keys=True, separators=(",", ":")).encode()
    return Model.from_document(graph), Recipe(**options)
