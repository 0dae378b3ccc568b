"""Start an enclave image in a cell, and carry requests to it and replies back.

A cell is a child process (`cell/`, Rust) that maps the image, donates threads to it and confines
it: backend `process` by seccomp, backend `kvm` in a virtual machine of its own. Whatever an image
does ends the cell, never this process. Nothing that comes out of a cell is trusted: frames are
bounded before they are read, text is cleaned before it is shown.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn, Self

from myelin.errors import CellDied, EnclaveRefused, UsageError
from myelin.native import native_file

Backend = Literal["process", "kvm"]

MESSAGE_BYTES = 1 << 20
"""The most that one request or reply may hold, operation or status included (docs/protocol.md)."""

_LAST_WORDS = 0xFFFF_FFFF
_LAST_WORDS_BYTES = 1024
_ERROR_BYTES = 4096
_REASON = re.compile(rb"[a-z0-9-]{1,64}")
_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12
_SIGNALS = {
    signal.SIGSYS: "the enclave attempted a system call",
    signal.SIGSEGV: "the enclave caused a memory fault, or used a privileged instruction",
    signal.SIGBUS: "the enclave caused a memory fault, or the machine is out of huge pages",
    signal.SIGILL: "the enclave used an instruction that this CPU does not have",
    signal.SIGFPE: "the enclave caused an arithmetic fault",
    signal.SIGTRAP: "the enclave hit a breakpoint instruction",
    signal.SIGKILL: "it was killed from outside, perhaps because memory ran out",
}


def backends() -> dict[Backend, str | None]:
    """Every backend, and why it cannot be used on this machine; None where it can."""
    machine = f"{platform.system()} {platform.machine()}"
    linux = None if machine == "Linux x86_64" else f"needs Linux on x86-64, this is {machine}"
    return {"process": linux, "kvm": linux or _kvm_problem()}


def _kvm_problem() -> str | None:
    try:
        descriptor = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"/dev/kvm does not open: {error.strerror}"
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"/dev/kvm is not KVM: {error.strerror}"
    finally:
        os.close(descriptor)
    wanted = _KVM_API_VERSION
    return None if version == wanted else f"KVM has API version {version}, not {wanted}"


class Cell:
    """A running enclave image. A context manager; leaving it ends the cell and all it held.

    `cores` are the cores its threads are pinned to, in the order of the slots; empty where they
    could not be pinned, and then `unpinned` says why. `pid` is the process.
    """

    def __init__(
        self,
        image: Path,
        *,
        backend: Backend = "process",
        threads: int,
        features: Sequence[str],
        timeout: float = 60.0,
    ) -> None:
        """Start `image` with `threads` thread slots on a CPU that must have `features`.

        `features` are named as in /proc/cpuinfo. Raises `UsageError` for an unavailable backend and
        `CellDied` when the cell does not say within `timeout` seconds that it is ready: the CPU
        lacks a feature, the image is not one of docs/image.md, memory cannot be had.
        """
        problem = backends().get(backend, "no such backend")
        if problem is not None:
            raise UsageError(f"backend {backend!r} is not available: {problem}")
        command = [str(native_file("cell")), "--backend", backend, "--threads", str(threads)]
        command += ["--require", ",".join(features), str(Path(image).resolve())]
        self._exchange = threading.Lock()
        self._death: str | None = None
        # One frame. Kept, because fresh memory costs more than the copy out of it.
        self._frame = memoryview(bytearray(4 + MESSAGE_BYTES))
        self._socket, theirs = socket.socketpair()
        # Room for a whole request, as far as the system allows: one wake of the cell carries it.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        with theirs:
            self._process = _Process(command, theirs)
        self.pid = self._process.pid
        try:
            ready = json.loads(bytes(self._receive(time.monotonic() + timeout)))
            self.cores: tuple[int, ...] = tuple(ready["cores"])
            self.unpinned: str | None = ready["unpinned"]
        except BaseException:
            self.close()
            raise

    def request(self, operation: int, *body: bytes, timeout: float | None = None) -> bytes:
        """Send one operation and return the result, at most `MESSAGE_BYTES` less 4 each way.

        The parts of `body` go out one after another. Waits for ever, or `timeout` seconds. Raises
        `EnclaveRefused` when the enclave answers with a refusal, `CellDied` when the cell has ended
        or had to be ended: a fault, a system call, a reply that is none, no reply in time.
        `UsageError` when `body` is too long. Threads may share a cell; their requests take turns.
        """
        header = _header(operation, body)
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._turn():
            self._send(header, body, deadline)
            reply = bytes(self._receive(deadline))
        return self._result(reply)

    def stream(self, operation: int, bodies: Iterable[Sequence[bytes]]) -> None:
        """Send one operation with each of `bodies`, one after another; results are dropped.

        Each goes out while the enclave works on the one before. Raises as `request` does. After a
        refusal the enclave still gets the body that is on its way, and no more. An error of
        `bodies` ends the cell.
        """
        before = last = bytes(4)
        with self._turn():
            waiting = False
            for body in bodies:
                self._send(_header(operation, body), body, None)
                if waiting:
                    before = bytes(self._receive(None, more=True))
                    if before[:4] != bytes(4):
                        break
                waiting = True
            if waiting:
                last = bytes(self._receive(None))
        self._result(before)
        self._result(last)

    def close(self) -> None:
        """End the cell, if it still runs, and wait until it is gone. Its memory goes with it."""
        self._end("it was closed")
        with self._exchange:
            self._socket.close()

    def __enter__(self) -> Self:
        """The running cell."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the cell."""
        self.close()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Nobody else's requests; what interrupts them ends the cell."""
        with self._exchange:
            if self._death is not None:
                raise CellDied(self._death)
            try:
                yield
            except CellDied:
                raise
            except BaseException:
                # Between request and reply: the next reply would be the wrong one.
                self._end("it was ended, because a request was interrupted")
                raise

    def _result(self, reply: bytes) -> bytes:
        status, result = reply[:4], reply[4:]
        if status == bytes(4):
            return result
        if len(status) < 4 or not _REASON.fullmatch(result):
            self._die("it sent a reply without status or reason, and was killed")
        raise EnclaveRefused(result.decode("ascii"))

    def _send(self, header: bytes, body: Sequence[bytes], deadline: float | None) -> None:
        try:
            self._limit(deadline)
            sent = self._socket.sendmsg([header, *body])
            for part in (header, *body):
                if rest := memoryview(part)[sent:]:
                    self._socket.sendall(rest)
                sent = max(0, sent - len(part))
        except TimeoutError:
            self._die("it took no request in time, and was killed")
        except OSError:
            # It ended while we wrote; what it said, if anything, is still to be read.
            self._receive(deadline)
            self._die("it stopped listening, and was killed")

    def _receive(self, deadline: float | None, *, more: bool = False) -> memoryview:
        """The next message, valid until the one after it. Raises `CellDied` when there is none.

        Where `more` are due, what follows it is left alone.
        """
        try:
            have = self._fill(0, 4, deadline, exactly=more)
            (length,) = struct.unpack_from("<I", self._frame)
            if length == _LAST_WORDS:
                self._die(self._last_words(have))
            if length > MESSAGE_BYTES:
                self._die(f"it sent a frame of {length} bytes, more than 1 MiB, and was killed")
            if self._fill(have, 4 + length, deadline, exactly=more) > 4 + length:
                self._die("it sent more than one reply to one request, and was killed")
            return self._frame[4 : 4 + length]
        except TimeoutError:
            self._die("it sent no reply in time, and was killed")
        except (EOFError, ConnectionError):
            self._process.wait(1.0)
            self._die(self._process.explanation())

    def _fill(
        self, have: int, wanted: int, deadline: float | None, *, exactly: bool = False
    ) -> int:
        """Reads until the frame has `wanted` bytes or more. Returns how many it has."""
        while have < wanted:
            self._limit(deadline)
            got = self._socket.recv_into(self._frame[have : wanted if exactly else None])
            if got == 0:
                raise EOFError
            have += got
        return have

    def _last_words(self, have: int) -> str:
        """What follows up to the end of the stream, which is near unless the image forges it."""
        deadline = time.monotonic() + 1.0
        with contextlib.suppress(EOFError, OSError):
            while have < 4 + _LAST_WORDS_BYTES:
                have = self._fill(have, have + 1, deadline)
        return _printable(bytes(self._frame[4 : min(have, 4 + _LAST_WORDS_BYTES)])) or "no reason"

    def _limit(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _die(self, reason: str) -> NoReturn:
        self._end(reason)
        raise CellDied(self._death)

    def _end(self, reason: str) -> None:
        if self._death is None:
            self._death = f"the cell has ended: {reason}"
        self._process.kill()
        # Wakes a thread that still waits for a reply; the descriptor is closed when none does.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def _header(operation: int, body: Sequence[bytes]) -> bytes:
    length = 4 + sum(map(len, body))
    if length > MESSAGE_BYTES:
        raise UsageError(f"a request of {length} bytes is too long: at most {MESSAGE_BYTES}")
    return struct.pack("<II", length, operation)


class _Process:
    """A child process with a thread that starts it, keeps what it says on stderr, and reaps it.

    The kernel ends a cell together with the thread that started it (PR_SET_PDEATHSIG), so that no
    cell outlives its host: that thread must live as long as the cell, and callers' threads may not.
    """

    def __init__(self, command: Sequence[str], channel: socket.socket) -> None:
        self._errors = b""
        self._gone = threading.Event()
        started: list[subprocess.Popen[bytes] | OSError] = []
        running = threading.Event()
        self._keeper = threading.Thread(
            target=self._keep, args=(command, channel, started, running), daemon=True
        )
        self._keeper.start()
        running.wait()
        if isinstance(started[0], OSError):
            self._keeper.join()
            raise CellDied(f"the cell did not start: {started[0]}")
        self._child = started[0]
        self.pid = self._child.pid

    def _keep(
        self,
        command: Sequence[str],
        channel: socket.socket,
        started: list[subprocess.Popen[bytes] | OSError],
        running: threading.Event,
    ) -> None:
        try:
            child = subprocess.Popen(
                command,
                stdin=channel.fileno(),
                stdout=channel.fileno(),
                stderr=subprocess.PIPE,
                env={},
                cwd="/",
                start_new_session=True,  # an interrupt from the terminal is for the host alone
            )
        except OSError as error:
            started.append(error)
            running.set()
            return
        started.append(child)
        running.set()
        with child:
            assert child.stderr is not None
            self._errors = child.stderr.read(_ERROR_BYTES)
            while child.stderr.read(_ERROR_BYTES):
                pass
        self._gone.set()

    def wait(self, seconds: float) -> None:
        self._gone.wait(seconds)

    def kill(self) -> None:
        """End it and wait until it is reaped."""
        if not self._gone.is_set():
            self._child.kill()
        self._keeper.join()

    def explanation(self) -> str:
        """Why it ended, as far as exit status and stderr tell."""
        status = self._child.returncode
        if status is None:
            return "it closed its end, and was killed"
        if status < 0:
            number = signal.Signals(-status)
            return f"{_SIGNALS.get(number, 'it was ended by a signal')} ({number.name})"
        return _printable(self._errors) or f"it left with exit status {status} and gave no reason"


def _printable(text: bytes) -> str:
    """Text from a cell without anything that a terminal would obey."""
    return re.sub(r"[^\x20-\x7e]+", " ", text.decode("ascii", "replace")).strip()
