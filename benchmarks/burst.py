"""Rows that wait for their turn: each in a process of its own, made once, timed in short bursts.

Speed of a shared machine changes from one minute to the next, more than the rows differ. So all
rows of a model are made first; then, round after round, each works for a second while the others
are stopped (their threads would wait for work by spinning), and only rows of the same rounds are
compared (`in_turn`). A row's process calls `serve`; `Row` starts one and asks it.

The system below a virtual machine moves its cores about: for seconds or minutes both may share one
core, or lie far apart, where what one wrote reaches the other at a sixth of the speed. `Machine`
measures when they are side by side, and again where they were not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from benchmarks import report
from benchmarks.report import ROOT, THREADS

LEAST = 5
"""Steps of a burst, however long they take."""
WARMING = 0.3
"""Of a burst's time, before it: the first steps after a rest take memory that was given back."""
KEPT = ", memory kept"
"""How the mode of a row ends that never gives memory back to the system: the C library is told so.

Fresh pages are dear on virtual machines, and libraries that allocate each result take many a step.
"""
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "1",
}


SLOW = 1.15
"""Times the least that the same multiply-adds have taken: above, cores are not our own."""
APART = 2.1
"""Times as long for a copy of what the other thread wrote as for one of its own, with what it takes
to start a loop: above, they share no cache. Side by side it was 1.3 to 1.6, apart 2.7 to 3.4.
"""
PROBED = 0.015
"""Seconds, of each of three things."""
PATIENCE = (60, 1500.0)
"""Of a measurement's seconds, and seconds of a run: so long is waited for a better machine."""

Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(kw_only=True)
class Turns(Generic[Key]):
    """What came of rows that worked in turn: of each what it says of itself, and milliseconds,
    medians of each round; or the last words of one that failed.
    """

    facts: dict[Key, dict[str, Any]] = field(default_factory=dict)
    medians: dict[Key, list[dict[str, float]]] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)

    def tried(self, key: Key, work: Callable[[], Result]) -> Result | None:
        """What `work` of this row gives, nothing where the row fails: the others go on."""
        try:
            return work()
        except RowFailed as reason:
            self.failed[key] = str(reason)
            print(f"\n{key} failed: {reason}", file=sys.stderr)
            return None


def in_turn(
    rows: Mapping[Key, tuple[str, ...]], rounds: int, seconds: float, *, what: str, rest: float = 0
) -> Turns[Key]:
    """Starts all rows (`Row`'s arguments), then times them round after round.

    `what` they do is for the terminal; before each there is a rest of so many seconds.
    """
    turns: Turns[Key] = Turns()
    started: dict[Key, Row] = {}
    for key, arguments in rows.items():
        report.say(f"{what}: {' '.join(arguments[2:])}, getting ready")
        if row := turns.tried(key, partial(Row, *arguments)):
            started[key], turns.medians[key] = row, []
    for round_ in range(rounds):
        report.say(f"{what}: round {round_ + 1} of {rounds}")
        for key, row in started.items():
            if key not in turns.failed:
                time.sleep(rest)
                burst = partial(machine.undisturbed, partial(row.burst, seconds), seconds)
                if times := turns.tried(key, burst):
                    ms = {name: 1e3 * statistics.median(same) for name, same in times.items()}
                    turns.medians[key].append(ms)
    for key, row in started.items():
        if key not in turns.failed and (facts := turns.tried(key, row.end)) is not None:
            turns.facts[key] = facts
    report.say("")
    return turns


class RowFailed(Exception):
    """A row's process ended before it was asked to; says its last words."""


class Row:
    """A row's process: a module of ours, and what it takes. `burst` lets it work; `end` gives what
    it says of itself.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        kept = ALLOCATOR if any(argument.endswith(KEPT) for argument in arguments) else {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            # Of its own, to be stopped alone; the system ends stopped groups whose parent is gone.
            process_group=0,
            env=os.environ | {"TVM_NUM_THREADS": str(THREADS)} | kept,
        )
        self._answer()
        self._signal(signal.SIGSTOP)

    def burst(self, seconds: float) -> dict[str, list[float]]:
        """Seconds of each step, under "step" and other names, of a burst of so many seconds."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # It is dead, which its answer tells.
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        times = dict(self._answer())
        self._signal(signal.SIGSTOP)
        return times

    def end(self) -> dict[str, Any]:
        """The row's other values; its process is over then."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        facts = dict(self._answer())
        self._close()
        return facts

    def _answer(self) -> Any:
        """One line of JSON after what else a library may print."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines()
        self._close()
        raise RowFailed(words[-1] if words else f"no words, status {self._process.returncode}")

    def _signal(self, number: signal.Signals) -> None:
        """To the row's process and those that it started."""
        os.killpg(self._process.pid, number)

    def _close(self) -> None:
        with contextlib.suppress(BrokenPipeError), self._process, self._errors:
            pass


class Machine:
    """Where its cores are, and how many measurements were made in spite of that."""

    def __init__(self) -> None:
        self.measured = self.disturbed = 0
        self._least = float("inf")
        self._patience = PATIENCE[1]
        self._probe: Row | None = None

    def undisturbed(self, measure: Callable[[], Result], seconds: float) -> Result:
        """What `measure` gives in about so many seconds, when the machine was quiet before and
        after, or patience is at an end. No probe where seconds is 0.
        """
        if seconds == 0:
            return measure()
        end = time.monotonic() + min(PATIENCE[0] * seconds, self._patience)
        while True:
            start = time.monotonic()
            quiet = self._becomes_quiet(end)
            self._patience -= time.monotonic() - start
            start = time.monotonic()
            result = measure()
            quiet = self._is_quiet() and quiet
            if quiet or time.monotonic() > end:
                break
            self._patience -= time.monotonic() - start
        self.measured += 1
        self.disturbed += not quiet
        return result

    def _becomes_quiet(self, end: float) -> bool:
        while not self._is_quiet():
            if time.monotonic() > end:
                return False
            time.sleep(0.3)
        return True

    def _is_quiet(self) -> bool:
        self._probe = self._probe or Row("probe")
        found = self._probe.burst(PROBED)
        multiply, copy, exchange = (
            statistics.median(found[name]) for name in ("multiply", "copy", "exchange")
        )
        self._least = min(self._least, multiply)
        return multiply <= SLOW * self._least and exchange <= APART * copy


machine = Machine()

MARK = "row: "


def serve(
    burst: Callable[[float], dict[str, list[float]]], facts: Callable[[], dict[str, Any]]
) -> None:
    """Works for as long as each line of the standard input says, then tells `facts`."""
    _tell(None)
    for line in sys.stdin:
        _tell(burst(float(line)))
    _tell(facts())


def _tell(what: Any) -> None:
    print(MARK + json.dumps(what), flush=True)


def timed(step: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each step, for so long, after warming up."""
    until = time.perf_counter() + WARMING * seconds
    step()
    while time.perf_counter() < until:
        step()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < LEAST or time.perf_counter() < until:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times
