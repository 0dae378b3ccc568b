"""The cell against images that obey, lie, fault and attack (tests/cell_image)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from myelin.cell import MESSAGE_BYTES, Cell, backends
from myelin.cpu import machine_features
from myelin.errors import CellDied, EnclaveRefused, UsageError
from myelin.native import native_file

SOURCES = Path(__file__).parent / "cell_image"
ECHO, REFUSE, SPIN, GATHER, HEAP_ENDS, AVX2, AVX512, ALONE, TILES = range(9)
WRITE, READ = 10, 11
BASE, MAILBOX = 0x4000_0000, 0x10_0000_0000
PROGRAM_HEADERS, HEADER_BYTES = 64, 56
WAIT = 20.0

Link = Callable[..., Path]


@pytest.fixture(scope="session")
def link(tmp_path_factory: pytest.TempPathFactory) -> Link:
    """Links the probe image with a heap of so many bytes."""
    if shutil.which("rustc") is None:
        pytest.skip("rustc is needed to build the probe image")
    folder = tmp_path_factory.mktemp("probe")
    compile_object = ["rustc", "--edition", "2024", "--crate-type", "lib", "--emit", "obj"]
    for option in ("panic=abort", "opt-level=1", "relocation-model=static", "codegen-units=1"):
        compile_object += ["-C", option]
    compile_object += ["-o", str(folder / "probe.o"), str(SOURCES / "probe.rs")]
    subprocess.run(compile_object, check=True)

    def build(heap: int = 4 << 20) -> Path:
        image = folder / f"probe-{heap}.elf"
        linker = [sys.executable, "-m", "ziglang", "ld.lld", "--static", "--no-pie"]
        linker += ["-T", str(SOURCES / "probe.ld"), "-z", "max-page-size=4096", "--no-undefined"]
        linker += ["--build-id=none", "--fatal-warnings", f"--defsym=__heap_bytes={heap}"]
        subprocess.run([*linker, "-o", str(image), str(folder / "probe.o")], check=True)
        return image

    return build


@pytest.fixture(scope="session")
def image(link: Link) -> Path:
    return link()


@pytest.fixture(params=["process", "kvm"])
def start(request: pytest.FixtureRequest, image: Path) -> Iterator[Callable[..., Cell]]:
    """Starts cells on one backend, and shows afterwards that none is left, not even as a zombie."""
    problem = backends()[request.param]
    if problem is not None:
        pytest.skip(f"backend {request.param}: {problem}")
    cells: list[Cell] = []

    def begin(path: Path = image, *, threads: int = 2) -> Cell:
        cell = Cell(path, backend=request.param, threads=threads, features=["sse2"])
        cells.append(cell)
        return cell

    yield begin
    for cell in cells:
        cell.close()
        assert gone(cell.pid)


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def ask(cell: Cell, operation: int, argument: int = 0) -> bytes:
    return cell.request(operation, struct.pack("<Q", argument), timeout=WAIT)


# What a good image does


def test_a_request_comes_back(start: Callable[..., Cell]) -> None:
    cell = start()
    for body in (b"", b"x", os.urandom(4093), os.urandom(MESSAGE_BYTES - 4)):
        assert cell.request(ECHO, body, timeout=WAIT) == body


def test_many_requests_of_changing_length(start: Callable[..., Cell]) -> None:
    cell = start()
    for length in (*range(300), 65_536, 1, 300_000, 0):
        assert cell.request(ECHO, bytes([length % 251]) * length) == bytes([length % 251]) * length


def test_a_request_that_is_too_long_never_leaves(start: Callable[..., Cell]) -> None:
    cell = start()
    with pytest.raises(UsageError, match="1048577 bytes is too long"):
        cell.request(ECHO, bytes(MESSAGE_BYTES - 3))
    assert ask(cell, ECHO, 1) == struct.pack("<Q", 1)


def test_a_refusal_has_its_reason_and_the_cell_goes_on(start: Callable[..., Cell]) -> None:
    cell = start()
    with pytest.raises(EnclaveRefused) as refusal:
        cell.request(REFUSE)
    assert refusal.value.reason == "operation-unknown"
    assert cell.request(ECHO, b"still here") == b"still here"


def test_a_stream_keeps_requests_and_replies_in_step(start: Callable[..., Cell]) -> None:
    cell = start()
    cell.stream(ECHO, ([bytes([n]), bytes(10_000 * n)] for n in range(90)))
    cell.stream(ECHO, [])
    assert cell.request(ECHO, b"after") == b"after"


def test_a_refusal_ends_a_stream_and_the_cell_goes_on(start: Callable[..., Cell]) -> None:
    cell = start()
    sent: list[int] = []

    def bodies() -> Iterator[list[bytes]]:
        for number in range(10):
            sent.append(number)
            yield [b"x"]

    with pytest.raises(EnclaveRefused) as refusal:
        cell.stream(REFUSE, bodies())
    assert refusal.value.reason == "operation-unknown"
    assert sent == [0, 1]
    assert cell.request(ECHO, b"still here") == b"still here"
    with pytest.raises(EnclaveRefused):  # the last reply counts as well
        cell.stream(REFUSE, [[b"x"]])


def test_an_error_of_what_is_streamed_ends_the_cell(start: Callable[..., Cell]) -> None:
    cell = start()

    def bodies() -> Iterator[list[bytes]]:
        yield [b"x"]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        cell.stream(ECHO, bodies())
    with pytest.raises(CellDied, match="a request was interrupted"):
        cell.request(ECHO)


def test_a_helping_thread_without_work_leaves_its_core(start: Callable[..., Cell]) -> None:
    cell = start(threads=2)

    def ticks() -> list[int]:
        """Of processor time of each thread, by number; the first is the one that works."""
        fields = [(t / "stat").read_text().rpartition(")")[2].split() for t in tasks(cell)]
        return [int(field[11]) + int(field[12]) for field in fields]

    ask(cell, ECHO)
    before = ticks()

    def work() -> None:
        with contextlib.suppress(CellDied):
            cell.request(ALONE)

    client = threading.Thread(target=work)
    client.start()
    while ticks()[0] - before[0] < 50:
        time.sleep(0.02)
    first, second, *_ = (after - earlier for after, earlier in zip(ticks(), before, strict=True))
    cell.close()
    client.join()
    assert second < first / 2


def test_helping_threads_come_inside(start: Callable[..., Cell]) -> None:
    cell = start(threads=2)
    for _ in range(20):
        ask(cell, GATHER)


def test_a_heap_of_gigabytes_is_there_and_zero(start: Callable[..., Cell], link: Link) -> None:
    cell = start(link(6 << 30))
    ask(cell, HEAP_ENDS)
    with pytest.raises(EnclaveRefused):  # the image finds what it wrote
        ask(cell, HEAP_ENDS)


@pytest.mark.parametrize(
    ("operation", "feature", "lanes"), [(AVX2, "avx2", 4), (AVX512, "avx512f", 8)]
)
def test_wide_vectors_work(
    start: Callable[..., Cell], operation: int, feature: str, lanes: int
) -> None:
    if feature not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this CPU has no {feature}")
    lane = b"8 bytes."
    assert start().request(operation, lane + bytes(56))[: 8 * lanes] == lane * lanes


def test_threads_share_a_cell_by_turns(start: Callable[..., Cell]) -> None:
    cell = start()
    wrong: list[int] = []

    def client(number: int) -> None:
        body = bytes([number]) * 50_000
        for _ in range(20):
            if cell.request(ECHO, body) != body:
                wrong.append(number)

    clients = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert wrong == []


def test_stopping_and_continuing_the_cell_loses_nothing(start: Callable[..., Cell]) -> None:
    cell = start()
    os.kill(cell.pid, signal.SIGSTOP)
    time.sleep(0.05)
    os.kill(cell.pid, signal.SIGCONT)
    assert ask(cell, ECHO, 5) == struct.pack("<Q", 5)


# What hostile images do: operation and argument (probe.rs), and what the caller is told

FAULT = "memory fault|the enclave faulted"
HOSTILE = {
    "null pointer": (WRITE, 0, FAULT),
    "page tables of the machine": (WRITE, 0x1000, FAULT),
    "below the image": (READ, BASE - 1, FAULT),
    "below the mailbox": (READ, MAILBOX - 1, FAULT),
    "above the mailbox": (READ, MAILBOX + 4096 + MESSAGE_BYTES, FAULT),
    "kernel address": (WRITE, 1 << 63, FAULT),
    "write to text": (12, 0, FAULT),
    "write to read-only data": (13, 0, FAULT),
    "execute the heap": (14, 0, FAULT),
    "execute the mailbox": (15, 0, FAULT),
    "stack overflow": (16, 0, FAULT),
    "undefined instruction": (17, 0, "does not have|the enclave faulted"),
    "halt": (18, 0, "privileged instruction|the enclave faulted"),
    "port input": (19, 0, "privileged instruction|port input"),
    "port output": (20, 0, "privileged instruction|port input"),
    "breakpoint": (21, 0, "breakpoint|the enclave faulted"),
    "system call": (30, 0, "attempted a system call"),
    "permitted system call": (31, 0, "attempted a system call"),
    "32-bit system call": (32, 0, "attempted a system call|memory fault"),
    # Processors differ: it does not exist in 64-bit code, or its way back leads nowhere.
    "sysenter": (33, 0, "attempted a system call|does not have|memory fault"),
    "panic": (40, 0, "panicked in thread slot 0"),
    "unknown exit code": (41, 0, "unknown code 0x77"),
    "reply beyond the mailbox": (42, 0, "reply of 1048577 bytes, more than 1048576"),
    "reply of all there is": (43, 0, "reply of 18446744073709551615 bytes"),
    "reply without status": (44, 0, "reply without status or reason"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_image_ends_its_cell_only(start: Callable[..., Cell], attack: str) -> None:
    operation, argument, told = HOSTILE[attack]
    bystander, cell = start(), start()
    with pytest.raises(CellDied, match=told):
        ask(cell, operation, argument)
    assert gone(cell.pid)
    with pytest.raises(CellDied, match=told):  # it stays dead, for the same reason
        ask(cell, ECHO)
    assert ask(bystander, ECHO, 9) == struct.pack("<Q", 9)


def test_an_endless_computation_is_ended(start: Callable[..., Cell]) -> None:
    cell = start()
    with pytest.raises(CellDied, match="no reply in time"):
        cell.request(SPIN, timeout=0.2)
    assert gone(cell.pid)


def test_closing_ends_a_request_of_another_thread(start: Callable[..., Cell]) -> None:
    cell = start()
    told: list[str] = []

    def client() -> None:
        with pytest.raises(CellDied) as death:
            cell.request(SPIN)
        told.append(str(death.value))

    thread = threading.Thread(target=client)
    thread.start()
    time.sleep(0.1)
    cell.close()
    thread.join(WAIT)
    assert told == ["the cell has ended: it was closed"]
    with pytest.raises(CellDied, match="it was closed"):
        cell.request(ECHO)


def test_a_cell_killed_from_outside_says_so(start: Callable[..., Cell]) -> None:
    cell = start()
    os.kill(cell.pid, signal.SIGKILL)
    with pytest.raises(CellDied, match="killed from outside"):
        ask(cell, ECHO)


def test_too_few_slots_in_the_image(start: Callable[..., Cell]) -> None:
    cell = start(threads=3)

    def ask_until_the_third_thread_has_come() -> None:
        for _ in range(10_000):
            ask(cell, GATHER)

    with pytest.raises(CellDied, match="refused thread slot 2"):
        ask_until_the_third_thread_has_come()


# An image in the process backend that has found the cell's own system-call instruction

BORROWED = {
    "getpid": (34, 39, "attempted a system call"),
    "openat": (34, 257, "attempted a system call"),
    "mprotect": (34, 10, "attempted a system call"),
    "mmap": (34, 9, "attempted a system call"),
    "execve": (34, 59, "attempted a system call"),
    "clone": (34, 56, "attempted a system call"),
    "ptrace": (34, 101, "attempted a system call"),
    "futex, not private": (34, 202, "attempted a system call"),
    "exit": (35, 7, "left with exit status 7"),
    "frame of an absurd length": (45, 0, "frame of 4294967280 bytes, more than 1 MiB"),
    "forged last words": (46, 0, r"has ended: l \[2J$"),
}


@pytest.mark.parametrize("call", BORROWED)
def test_number_and_argument_confine_an_image(image: Path, call: str) -> None:
    operation, argument, told = BORROWED[call]
    with (
        Cell(image, threads=2, features=[]) as cell,
        pytest.raises(CellDied, match=told),
    ):
        ask(cell, operation, argument)
    assert gone(cell.pid)


# What the cell refuses before anything runs


@pytest.mark.parametrize("backend", [b for b, problem in backends().items() if problem is None])
def test_a_missing_cpu_feature(image: Path, backend: str) -> None:
    with pytest.raises(CellDied, match="this CPU lacks nosuch, neither, which the image needs"):
        Cell(image, backend=backend, threads=1, features=["sse2", "nosuch", "neither"])


@pytest.mark.parametrize("backend", [b for b, problem in backends().items() if problem is None])
def test_tile_registers_are_had_before_the_cell_is_locked(image: Path, backend: str) -> None:
    missing = {"amx_tile"} - machine_features()
    if missing:
        with pytest.raises(CellDied, match="this CPU lacks amx_tile, which the image needs"):
            Cell(image, backend=backend, threads=2, features=["amx_tile"])
        pytest.skip("this machine has no AMX: only the refusal was tested")
    try:
        with Cell(image, backend=backend, threads=2, features=["amx_tile"]) as cell:
            number = os.urandom(8)
            assert cell.request(TILES, number + bytes(8), timeout=WAIT) == 2 * number
    except CellDied as refusal:
        if backend != "kvm" or "KVM gives virtual machines no AMX tile" not in str(refusal):
            raise
        pytest.skip("KVM gives virtual machines no AMX here: only the refusal was tested")


def test_a_host_that_ignores_how_its_children_end(image: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Cell(image, threads=1, features=[]) as cell:
            assert cell.request(ECHO, b"here", timeout=WAIT) == b"here"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_an_unknown_backend(image: Path) -> None:
    with pytest.raises(UsageError, match="'sgx' is not available: no such backend"):
        Cell(image, backend="sgx", threads=1, features=[])


def test_no_threads(image: Path) -> None:
    with pytest.raises(CellDied, match="usage: cell --backend"):
        Cell(image, threads=0, features=[])


def test_a_missing_image(tmp_path: Path) -> None:
    with pytest.raises(CellDied, match=r"nothing\.elf cannot be read: No such file"):
        Cell(tmp_path / "nothing.elf", threads=1, features=[])


def field(segment: int, offset: int) -> int:
    return PROGRAM_HEADERS + HEADER_BYTES * segment + offset


FLAGS, OFFSET, ADDRESS, FILE_BYTES, MEMORY_BYTES = 4, 8, 16, 32, 40
ODD = {
    "writable and executable": (field(0, FLAGS), "<I", 7, "0 is writable and executable"),
    "writable only": (field(2, FLAGS), "<I", 2, "has rights 0x2"),
    "no rights": (field(2, FLAGS), "<I", 0, "has rights 0x0"),
    "text not executable": (field(0, FLAGS), "<I", 4, "no executable segment holds the entry"),
    "overlap": (field(1, ADDRESS), "<Q", BASE, "segment 1 at 0x40000000 overlaps"),
    "overlap within a page": (field(2, MEMORY_BYTES), "<Q", 0x12000, "segment 3 .* overlaps"),
    "not on a page": (field(2, ADDRESS), "<Q", BASE + 0x2010, "does not start on a page"),
    "below the base": (field(1, ADDRESS), "<Q", 0x1000, "segment 1 .* lies outside"),
    "over the mailbox": (field(5, ADDRESS), "<Q", MAILBOX - 4096, "segment 5 .* lies outside"),
    "beyond all memory": (field(5, MEMORY_BYTES), "<Q", 1 << 62, "segment 5 .* lies outside"),
    "wrapping around": (field(5, MEMORY_BYTES), "<Q", 2**64 - 1, "segment 5 .* lies outside"),
    "file overrun": (field(0, OFFSET), "<Q", 1 << 40, "segment 0 reaches beyond the file"),
    "file wrap": (field(0, OFFSET), "<Q", 2**64 - 8, "segment 0 reaches beyond the file"),
    "more file than memory": (field(0, MEMORY_BYTES), "<Q", 16, "more bytes in the file than"),
    "dynamic segment": (field(5, 0), "<I", 2, "segment 5 is of type 0x2, not loadable"),
    "interpreter": (field(5, 0), "<I", 3, "segment 5 is of type 0x3, not loadable"),
    "executable stack": (field(5, 0), "<II", (0x6474E551, 7), "asks for an executable stack"),
    "other entry": (24, "<Q", BASE + 16, "entry at 0x40000010, not at 0x40000000"),
    "position independent": (16, "<H", 3, "not a static x86-64 executable"),
    "other machine": (18, "<H", 183, "not a static x86-64 executable"),
    "32 bits": (4, "<B", 1, "not a 64-bit little-endian ELF file"),
    "no segments": (56, "<H", 0, "0 program headers"),
    "headers outside": (32, "<Q", 1 << 50, "its headers are cut short"),
    "headers wrap": (32, "<Q", 2**64 - 64, "headers are cut short|headers lie outside"),
}


@pytest.mark.parametrize("oddity", ODD)
def test_an_odd_image_is_refused(image: Path, tmp_path: Path, oddity: str) -> None:
    at, layout, value, reason = ODD[oddity]
    content = bytearray(image.read_bytes())
    values = value if isinstance(value, tuple) else (value,)
    struct.pack_into(layout, content, at, *values)
    odd = tmp_path / "odd.elf"
    odd.write_bytes(content)
    with pytest.raises(CellDied, match=f"it did not start: image refused: .*{reason}"):
        Cell(odd, threads=1, features=[])


def test_no_change_of_a_header_byte_crashes_the_loader(image: Path, tmp_path: Path) -> None:
    original = image.read_bytes()
    odd = tmp_path / "odd.elf"
    told: set[str] = set()
    for at in range(field(6, 0)):
        content = bytearray(original)
        content[at] ^= 1 << at % 8
        odd.write_bytes(content)
        try:
            Cell(odd, threads=1, features=[]).close()
        except CellDied as death:
            told.add(str(death))
    assert len(told) > 50
    assert [t for t in told if "it did not start: image refused" not in t] == []


@pytest.mark.parametrize("length", [0, 3, 63, 64, 100, field(6, 0) - 1, 4096])
def test_a_truncated_image_is_refused(image: Path, tmp_path: Path, length: int) -> None:
    short = tmp_path / "short.elf"
    short.write_bytes(image.read_bytes()[:length])
    with pytest.raises(CellDied, match="image refused"):
        Cell(short, threads=1, features=[])


# How the process is set up


def test_threads_are_pinned_to_distinct_cores_or_it_says_why_not(image: Path) -> None:
    allowed = os.sched_getaffinity(0)
    with Cell(image, threads=1, features=[]) as cell:
        assert cell.unpinned is None
        assert set(cell.cores) <= allowed
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with Cell(image, threads=2, features=[]) as cell:
            assert cell.cores == ()
            told = "2 threads, but this process may use only 1 of the cores"
            assert cell.unpinned == told
    finally:
        os.sched_setaffinity(0, allowed)
    if len(allowed) < 2:
        pytest.skip("pinning two threads takes two cores")
    with Cell(image, threads=2, features=[]) as cell:
        assert len(set(cell.cores)) == 2
        actual = [os.sched_getaffinity(int(t.name)) for t in tasks(cell)]
        assert actual == [{core} for core in cell.cores]


def tasks(cell: Cell) -> list[Path]:
    return sorted(Path(f"/proc/{cell.pid}/task").iterdir(), key=lambda task: int(task.name))


def test_every_thread_is_locked(start: Callable[..., Cell]) -> None:
    cell = start()
    status = [(task / "status").read_text() for task in tasks(cell)]
    assert len(status) == 2
    for text in status:
        assert "NoNewPrivs:\t1\n" in text
        assert "Seccomp:\t2\n" in text


def test_core_dumps_are_off(start: Callable[..., Cell]) -> None:
    limits = Path(f"/proc/{start().pid}/limits").read_text().splitlines()
    core = next(line for line in limits if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


def test_memory_is_never_writable_and_executable(start: Callable[..., Cell]) -> None:
    cell = start()
    try:
        maps = Path(f"/proc/{cell.pid}/maps").read_text()
    except PermissionError:
        pytest.skip("only root may read the map of a cell, which is as it should be")
    mapped = {line.split()[0]: line.split()[1] for line in maps.splitlines()}
    assert not [where for where, rights in mapped.items() if "w" in rights and "x" in rights]
    assert mapped["1000000000-1000101000"] == "rw-p"
    assert mapped["1000101000-1000111000"] == "---p"
    assert mapped["40000000-40001000"] == "r-xp"
    assert mapped["3fff0000-40000000"] == "---p"


def test_no_file_is_inherited(image: Path) -> None:
    with open(image, "rb") as file, Cell(image, threads=1, features=[]) as cell:
        os.set_inheritable(file.fileno(), True)
        try:
            descriptors = {entry.name for entry in Path(f"/proc/{cell.pid}/fd").iterdir()}
        except PermissionError:
            pytest.skip("only root may list the files of a cell, which is as it should be")
        assert descriptors == {"0", "1", "2"}


TRACE = """
import ctypes, os, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def attach(pid):
    if libc.ptrace(16, pid, None, None) == 0:
        return "attached"
    return f"errno {ctypes.get_errno()}"
ours, theirs = socket.socketpair()
cell = subprocess.Popen([sys.argv[1], "--backend", "process", "--threads", "1", sys.argv[2]],
                        stdin=theirs.fileno(), stdout=theirs.fileno())
assert b"threads" in ours.recv(1000)
plain = subprocess.Popen(["sleep", "60"])
def memory(pid):
    try:
        open(f"/proc/{pid}/mem", "rb").close()
        return "opened"
    except OSError as error:
        return f"errno {error.errno}"
print(attach(plain.pid), memory(plain.pid), attach(cell.pid), memory(cell.pid), sep=",")
for child in (plain, cell):
    os.kill(child.pid, 9)  # not child.kill(), which takes a traced and stopped child for a dead one
"""


def test_nobody_traces_a_cell(image: Path) -> None:
    """By an unprivileged user who owns it: root may trace anything."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    user = 65534 if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        files = [shutil.copy(path, folder) for path in (native_file("cell"), image)]
        for file in files:
            Path(file).chmod(0o555)
        done = subprocess.run(
            [python, "-I", "-c", TRACE, *files],
            capture_output=True,
            text=True,
            check=False,
            user=user,
            cwd="/",
            timeout=WAIT,
        )
    assert done.returncode == 0, done.stderr
    plain_trace, plain_memory, cell_trace, cell_memory = done.stdout.strip().split(",")
    if (plain_trace, plain_memory) != ("attached", "opened"):
        pytest.skip(f"this system lets nobody trace at all: {plain_trace}, {plain_memory}")
    assert cell_trace == "errno 1"  # EPERM
    assert cell_memory == "errno 13"  # EACCES


# How it lives and ends with the host


def test_a_cell_outlives_the_thread_that_started_it(image: Path) -> None:
    cells: list[Cell] = []
    thread = threading.Thread(
        target=lambda: cells.append(Cell(image, threads=1, features=[])),
    )
    thread.start()
    thread.join()
    time.sleep(0.05)
    with cells[0] as cell:
        assert ask(cell, ECHO, 3) == struct.pack("<Q", 3)


HOST = """
import sys, threading, time
from pathlib import Path
from myelin.cell import Cell
cell = Cell(Path(sys.argv[1]), threads=1, features=[])
threading.Thread(target=cell.request, args=(2,), daemon=True).start()
time.sleep(0.2)
print(cell.pid, flush=True)
time.sleep(60)
"""


def test_a_cell_ends_with_its_host_even_while_it_computes(image: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOST, str(image)], stdout=subprocess.PIPE, text=True
    ) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        assert not gone(pid)
        host.kill()
    deadline = time.monotonic() + WAIT
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    # Where nobody reaps orphans it may stay as a zombie, which runs no more.
    assert gone(pid) or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text()
