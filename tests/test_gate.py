"""The gate of a linked image, entered by a C program as a hostile host would (tests/gate)."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from test_image_rules import RUNTIMES, SOURCES, Image, link

DONE, REFUSED, DEAD = 0, 2, 0xFF
TOO_LONG, UNKNOWN = "1 message-too-long", "2 operation-unknown"

Try = Callable[..., list[str]]


@pytest.fixture(scope="module", params=RUNTIMES)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    level = request.param
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    if level == "x86-64-v4" and "vaes" not in flags.split():
        pytest.skip("this processor lacks AVX-512 and VAES")
    return Image(link(tmp_path_factory.mktemp("gate"), level), level)


@pytest.fixture(scope="module")
def attempt(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Try:
    """Runs one trial in a process of its own; gives the lines it prints."""
    harness = tmp_path_factory.mktemp("harness") / "harness"
    command = [
        "cc",
        "-O1",
        "-mavx2",
        "-Wall",
        "-Werror",
        "-pthread",
        "-o",
        harness,
        SOURCES / "harness.c",
    ]
    subprocess.run(command, check=True)

    def run(trial: str, *symbols: str) -> list[str]:
        found = [
            next(hex(at) for name, at in image.symbols.items() if symbol in name)
            for symbol in symbols
        ]
        command = [harness, image.path, trial, *found]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout.splitlines()

    return run


def test_an_image_at_another_address_refuses(attempt: Try) -> None:
    assert attempt("moved") == [f"{REFUSED}"]


def test_only_slots_of_the_image_are_entered(attempt: Try) -> None:
    idle = 1
    assert attempt("slots") == [f"{idle} {REFUSED} {REFUSED} {REFUSED}"]


def test_a_busy_slot_refuses_and_others_work(attempt: Try) -> None:
    assert attempt("busy", "entry6STATES") == [f"{REFUSED} {DONE}"]


def test_a_request_is_as_long_as_the_mailbox_at_most(attempt: Try) -> None:
    too_long = f"{DONE} {4 + len('message-too-long')} {TOO_LONG}"
    unknown = f"{DONE} {4 + len('operation-unknown')} {UNKNOWN}"
    assert attempt("length") == [too_long] * 3 + [unknown] * 2


def test_nothing_but_the_reply_goes_out(attempt: Try) -> None:
    assert attempt("reply") == [f"{DONE}"]


def test_registers_are_cleared_on_the_way_out(attempt: Try) -> None:
    code, general, vectors, mxcsr = attempt("registers")[0].split()
    assert (code, general, vectors) == (f"{DONE}", "0", "0")
    assert mxcsr == "1f80", "the ABI's default, no exception flags"


def test_a_request_leaves_nothing_on_its_stack(attempt: Try) -> None:
    code, left = map(int, attempt("stack", "__stack_tops")[0].split())
    assert code == DONE
    assert 0 < left < 1024, "only frames that are older than the request"


def test_every_task_of_a_loop_runs_once_on_two_threads(attempt: Try) -> None:
    cells = ("__TVMBackendParallelLaunch", "__TVMBackendAllocWorkspace")
    counts, rest, left = attempt("loops", "mailbox6handle", *cells, "__stack_tops")
    assert counts == f"{DONE} 50000 0 1", "code, loops, tasks not run once, the worker helped"
    nested, refused, memory, mxcsr = rest.split()
    assert nested == "0", "a loop inside a task is refused, the outer one goes on"
    assert refused == "1", "a failed task, a negative number of tasks, too many"
    assert memory == "0", "no workspace before the session hands them out"
    assert int(mxcsr, 16) & ~0x3F == 0x9FC0, "subnormals flushed, exceptions masked"
    assert 0 < int(left) < 1024, "tasks leave nothing on the worker's stack below its last frames"


def test_a_panic_ends_the_enclave_for_ever(attempt: Try) -> None:
    untouched = 77
    assert attempt("panic", "mailbox6handle", "panic_fmt") == [f"{DEAD} {DEAD} {DEAD} {untouched}"]
