"""What a linked image may hold, read from its bytes and its disassembly, for every CPU level."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from myelin import nn
from myelin.cpu import LEVELS, Cpu
from myelin.importers import load
from myelin.kernels import object as kernel_object
from myelin.native import native_file
from myelin.optimizer import SGD
from myelin.plan import compile_training

SOURCES = Path(__file__).parent / "gate"
RUNTIMES = sorted({cpu.runtime for cpu in LEVELS})
BASE, MAILBOX = 0x4000_0000, 0x10_0000_0000
STACK, GUARD, HEAP = 0x4_0000, 0x1_0000, 1 << 20
READ, WRITE, EXECUTE, LOAD = 4, 2, 1, 1
# Ways out of ring 3, and instructions that a host could answer falsely or that SGX forbids.
FORBIDDEN = re.compile(
    r"syscall|sysenter|sysexit|sysret|int|into|cpuid|rdtscp?|rdpmc|xgetbv|xsetbv|wrpkru|rdpkru"
    r"|in|ins|insb|insl|outs|outsb|outsl|hlt|cli|sti|vmcall|vmmcall|rdfsbase|wrfsbase|wrgsbase"
)
GATE_ONLY = re.compile(r"out|enclu|iretq?")
# Of RDSEED only the 64-bit form: on some processors the others give too many zeros.
RDSEED = re.compile(r"%r([a-d]x|[sd]i|bp|\d+)")
PREFIXES = {"rep", "repz", "repnz", "lock", "notrack", "data16", "cs", "{evex}", "{vex}"}
AVX512 = re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Image:
    """A linked image with its symbols kept."""

    path: Path
    level: str
    kernels: Sequence[str] = ("first", "second")
    precision: str = "float32"

    @cached_property
    def segments(self) -> list[tuple[int, ...]]:
        """Program headers: type, flags, offset, address, physical, file size, memory size."""
        elf = self.path.read_bytes()
        start, size, count = struct.unpack_from("<Q14xHH", elf, 32)
        return [struct.unpack_from("<IIQQQQQ", elf, start + i * size) for i in range(count)]

    @cached_property
    def symbols(self) -> dict[str, int]:
        names = subprocess.check_output(["nm", self.path], text=True).splitlines()
        rows = [line.split() for line in names]
        return {row[2]: int(row[0], 16) for row in rows if len(row) == 3}

    @cached_property
    def functions(self) -> dict[str, list[Instruction]]:
        command = ["objdump", "-d", "--no-show-raw-insn", "-M", "att", self.path]
        found: dict[str, list[Instruction]] = {}
        body: list[Instruction] = []
        for line in subprocess.check_output(command, text=True).splitlines():
            if head := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
                body = found.setdefault(head[1], [])
            elif row := re.match(r"\s*([0-9a-f]+):\t(.*)", line):
                words = row[2].split()
                # Prefixes stand before the mnemonic.
                while len(words) > 1 and words[0] in PREFIXES:
                    words = words[1:]
                name = words[0] if words else ""
                body.append(Instruction(int(row[1], 16), name, " ".join(words[1:])))
        return found

    def read(self, symbol: str, end: str) -> bytes:
        """What the file holds between two symbols."""
        start, stop = self.symbols[symbol], self.symbols[end]
        for _, _, offset, address, _, size, _ in self.segments:
            if address <= start <= stop <= address + size:
                content = self.path.read_bytes()[offset:]
                return content[start - address : stop - address]
        raise AssertionError(f"{symbol} is in no segment of the file")


def network(level: str, precision: Any) -> tuple[bytes, list[str]]:
    """The object file of a small network's kernels, and their names."""
    model = load(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 10),
        ),
        np.zeros((1, 3, 16, 16), np.float32),
    )
    cpu = Cpu.named(level)
    program = compile_training(
        model,
        loss="cross-entropy",
        optimizer=SGD(lr=0.1, momentum=0.9),
        batch=16,
        cpu=cpu,
        precision=precision,
    )
    return kernel_object.build(program.kernels, cpu), list(program.kernels)


def link(
    folder: Path, level: str, *, slots: int = 2, kernels: tuple[bytes, list[str]] | None = None
) -> Path:
    """Links an image by the template, symbols kept: of two C kernels, or of those given."""
    for tool in ("cc", "objdump", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is needed to look into an image; install a C toolchain")
    script = native_file("image.ld").read_text()
    number = range(slots)
    names = ["first", "second"] if kernels is None else kernels[1]
    for word, text in {
        "KERNELS": " ".join(f"QUAD({name})" for name in names),
        "STACK_HEADERS": " ".join(f"stack{i} PT_LOAD FLAGS(6);" for i in number),
        "STACK_TOPS": " ".join(f"QUAD(__stack{i}_top)" for i in number),
        "STACKS": " ".join(
            f". += {GUARD}; .stack{i} (NOLOAD) : {{ . += {STACK}; __stack{i}_top = .; }} :stack{i}"
            for i in number
        ),
        "HEAP": str(HEAP),
    }.items():
        script = script.replace(f"@{word}@", text)
    (folder / "image.ld").write_text(script)
    (folder / "description.cbor").write_bytes(b"not a description")
    runtime = Cpu.named(level).runtime
    shutil.copy(native_file(f"libmyelin_enclave-{runtime}.a"), folder / "libmyelin_enclave.a")
    if kernels is None:
        compiler = ["cc", "-c", "-O2", "-fno-pic", "-fcf-protection=none", "-o", "kernels.o"]
        subprocess.run([*compiler, SOURCES / "kernels.c"], cwd=folder, check=True)
    else:
        (folder / "kernels.o").write_bytes(kernels[0])
    linker = [sys.executable, "-m", "ziglang", "ld.lld", "-T", "image.ld", "--static", "--no-pie"]
    linker += ["-z", "noexecstack", "-z", "max-page-size=4096", "--gc-sections", "--build-id=none"]
    linker += ["--fatal-warnings", "--no-undefined", "-o", "image.elf", "kernels.o"]
    linker += ["libmyelin_enclave.a", "--format=binary", "description.cbor"]
    subprocess.run(linker, cwd=folder, check=True)
    return folder / "image.elf"


CASES = [
    *product(RUNTIMES, ["C"]),
    *((cpu.level, precision) for cpu in LEVELS for precision in cpu.precisions),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    level, compiler = request.param
    folder = tmp_path_factory.mktemp("image")
    if compiler == "C":
        return Image(link(folder, level), level)
    kernels = network(level, compiler)
    return Image(link(folder, level, kernels=kernels), level, kernels[1], compiler)


def test_segments_are_static_apart_and_never_writable_and_executable(image: Image) -> None:
    loads = [row for row in image.segments if row[0] == LOAD]
    assert loads == image.segments, "nothing dynamic: load segments only"
    assert [flags for _, flags, *_ in loads[:3]] == [READ | EXECUTE, READ, READ | WRITE]
    assert all(flags == READ | WRITE for _, flags, *_ in loads[2:])
    assert loads[0][3] == BASE
    ends = [row[3] + row[6] for row in loads]
    assert all(end <= following[3] for end, following in zip(ends, loads[1:], strict=False)), (
        "segments overlap"
    )
    stacks = loads[3:-1]
    assert [row[6] for row in stacks] == [STACK] * 2
    assert all(row[3] - end >= GUARD for row, end in zip(stacks, ends[2:], strict=False))
    heap = loads[-1]
    assert (heap[5], heap[6], heap[3] % (2 << 20)) == (0, HEAP, 0)
    assert heap[3] - ends[-2] >= GUARD
    assert ends[-1] <= MAILBOX


def test_the_gate_comes_first(image: Image) -> None:
    names = ("_enter", "_enter_kvm", "_enter_sgx")
    assert [image.symbols[name] - BASE for name in names] == [0, 0x10, 0x20]
    assert struct.unpack_from("<Q", image.path.read_bytes(), 24) == (BASE,)


def test_tables_hold_what_the_script_says(image: Image) -> None:
    symbols = image.symbols
    table = image.read("__kernels", "__kernels_end")
    assert [at for (at,) in struct.iter_unpack("<Q", table)] == [symbols[k] for k in image.kernels]
    tops = struct.unpack("<2Q", image.read("__stack_tops", "__stack_tops_end"))
    assert tops == (symbols["__stack0_top"], symbols["__stack1_top"])
    heap = struct.unpack_from("<2Q", image.read("__heap", "__description"))
    assert heap == (symbols["__heap_start"], symbols["__heap_end"])
    assert image.read("__description", "__description_end") == b"not a description"


def test_the_kernels_cells_are_filled_and_read_only(image: Image) -> None:
    read_only = next(row for row in image.segments if row[1] == READ)
    for cell in ("ParallelLaunch", "AllocWorkspace", "FreeWorkspace"):
        address = image.symbols[f"__TVMBackend{cell}"]
        assert read_only[3] <= address < read_only[3] + read_only[6], cell


def test_no_instruction_asks_the_system_or_the_processor(image: Image) -> None:
    end = image.symbols["_gate_end"]
    everything = [row for body in image.functions.values() for row in body]
    assert len(everything) > 10_000
    assert not [row for row in everything if FORBIDDEN.fullmatch(row.name)]
    assert not [row for row in everything if "(bad)" in row.name]
    outside = [row for row in everything if row.address >= end]
    assert not [row for row in outside if GATE_ONLY.fullmatch(row.name)]
    gate = {row.name for row in everything if row.address < end}
    assert {"out", "enclu", "xchg"} <= gate, "the check above sees what the gate holds"
    # No thread-local storage: the segment registers are the host's.
    assert not [row for row in everything if "%fs:" in row.operands or "%gs:" in row.operands]


def test_seeds_are_of_64_bits(image: Image) -> None:
    operands = [
        row.operands for body in image.functions.values() for row in body if row.name == "rdseed"
    ]
    assert operands
    assert not [operand for operand in operands if not RDSEED.fullmatch(operand)]


def test_the_disassembly_shows_what_is_forbidden(tmp_path: Path) -> None:
    bad = ("syscall", "sysenter", "int $0x80", "cpuid", "rdtsc", "rdtscp", "xgetbv", "wrpkru")
    seeds = [f"rdseed %{register}" for register in ("rax", "r9", "eax", "r9d", "ax")]
    others = ["rep insb", "vpxorq %zmm1,%zmm1,%zmm1"]
    source = "\n".join((".text", ".global bad", "bad:", *seeds, *bad, *others))
    (tmp_path / "bad.s").write_text(source + "\n")
    subprocess.run(["cc", "-c", "bad.s", "-o", "bad.o"], cwd=tmp_path, check=True)
    (body,) = Image(tmp_path / "bad.o", "none").functions.values()
    drawn, body = body[:5], body[5:]
    assert [bool(RDSEED.fullmatch(row.operands)) for row in drawn] == [True] * 2 + [False] * 3
    assert [bool(FORBIDDEN.fullmatch(row.name)) for row in body] == [True] * 9 + [False]
    assert AVX512.search(body[-1].operands)


def test_noise_uses_no_instruction_whose_time_depends_on_data(image: Image) -> None:
    release = [body for name, body in image.functions.items() if "gaussian5Noise7release" in name]
    names = {row.name for body in release for row in body}
    assert any(name.startswith("vblend") for name in names), "the sampler is in these functions"
    assert not [name for name in names if re.search(r"div|sqrt|rcp|gather|scatter", name)]


def test_avx512_is_used_at_its_level_only(image: Image) -> None:
    users = [
        row for body in image.functions.values() for row in body if AVX512.search(row.operands)
    ]
    assert bool(users) == (Cpu.named(image.level).lanes == 16), users[:3]


def test_bfloat16_is_used_at_its_precision_only(image: Image) -> None:
    names = {row.name for body in image.functions.values() for row in body}
    assert bool({"vdpbf16ps", "tdpbf16ps"} & names) == (image.precision != "float32")
    assert "tdpbf16ps" not in names or image.level == "sapphirerapids"


def test_the_deepest_chain_of_calls_leaves_stack_to_spare(image: Image) -> None:
    """Frames summed along direct calls, from the first function on a slot's stack.

    Calls through pointers come on top: a kernel, the start of its loop, and the loop's task.
    """
    frames: dict[str, int] = {}
    calls: dict[str, set[str]] = defaultdict(set)
    for name, body in image.functions.items():
        size = probed = 0
        for row in body:
            if row.name.startswith("push"):
                size += 8
            elif took := re.fullmatch(r"\$0x([0-9a-f]+),%(rsp|r11)", row.operands):
                # A probed frame: r11 holds its end, and a loop of pages comes before the rest.
                bytes_ = int(took[1], 16)
                # 128 bytes are given back by taking -128: that is a byte shorter.
                taken = row.name.startswith("sub") and bytes_ < 1 << 63
                if taken and not (probed and took[2] == "rsp"):
                    size += bytes_
                probed = took[2] == "r11"
            elif row.name.startswith(("call", "j")) and (
                goal := re.match(r"[0-9a-f]+ <([^>+]+)>", row.operands)
            ):
                calls[name] |= {goal[1]} - {name}
        frames[name] = size + 8
    assert max(frames.values()) > 8192, "frames were read"

    known: dict[str, int] = {}

    def depth(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, f"recursion: {' > '.join((*path, name))}"
        if name not in known:
            below = [depth(callee, (*path, name)) for callee in calls[name] if callee in frames]
            known[name] = frames[name] + max(below, default=0)
        return known[name]

    assert max(frames.values()) < GUARD, "no frame jumps over the guard below a stack"
    (run,) = (name for name in frames if "entry3run" in name)
    (launch,) = (name for name in frames if "threads6launch" in name)
    # Rust's names are mangled; what else has none of an underscore are kernels and tasks.
    kernel = max(depth(name) for name in frames if not name.startswith("_"))
    assert depth(run) + kernel + depth(launch) + kernel < STACK // 2


@pytest.mark.slow
def test_the_runtime_is_the_same_in_any_folder(tmp_path: Path) -> None:
    if shutil.which("cargo") is None:
        pytest.skip("cargo is needed to build the runtime")
    built = []
    for name in ("one", "another folder"):
        folder = tmp_path / name / "enclave"
        ignore = shutil.ignore_patterns("target")
        shutil.copytree(Path(__file__).parents[1] / "enclave", folder, ignore=ignore)
        shutil.copy(Path(__file__).parents[1] / "rust-toolchain.toml", folder)
        subprocess.run([folder / "build.sh", RUNTIMES[0], tmp_path / name / "out"], check=True)
        built.append((tmp_path / name / "out" / "libmyelin_enclave.a").read_bytes())
    assert built[0] == built[1]
    assert str(tmp_path).encode() not in built[0]
