"""What all benchmarks share: one run at a time, the machine's name, tables for console and page."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import rich.table
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
PICTURES = ROOT / "docs" / "pictures"
THREADS = 2
VERSIONS = ("myelin", "apache-tvm", "torch", "opacus", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first `words` columns are words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def print(self, console: Console) -> None:
        """For people at a terminal."""
        table = rich.table.Table(title=self.title, title_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i < self.words else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)

    def markdown(self) -> str:
        """For the page."""
        numbers = len(self.columns) - self.words
        rows = [[cell.replace("|", r"\|") for cell in row] for row in self.rows]
        lines = [
            f"**{self.title}**",
            "",
            f"| {' | '.join(self.columns)} |",
            "|" + " --- |" * self.words + " ---: |" * numbers,
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Section:
    """One benchmark's part of the page: what was done, what came out; `pictures` are SVG files."""

    title: str
    text: str
    tables: Sequence[Table]
    pictures: Sequence[tuple[str, Path]] = field(default=())

    def print(self) -> None:
        """The text and the tables on the terminal, and where the pictures are."""
        console = Console(width=150)
        console.print(f"[bold]{self.title}[/bold]\n{self.text}", highlight=False)
        for table in self.tables:
            table.print(console)
        for title, path in self.pictures:
            console.print(f"{title}: {path.relative_to(ROOT)}", highlight=False)

    def markdown(self, folder: Path) -> str:
        """A part of a page in `folder`."""
        pictures = [f"![{title}]({os.path.relpath(path, folder)})" for title, path in self.pictures]
        parts = [
            f"## {self.title}",
            self.text,
            *pictures,
            *(table.markdown() for table in self.tables),
        ]
        return "\n\n".join(parts)


def failures(rows: Sequence[Sequence[str]], *columns: str) -> list[Table]:
    """A table of the rows that failed, by `columns` and their last words, where there are some."""
    columns = (*columns, "last words")
    title = "Rows that failed"
    return [Table(title=title, columns=columns, rows=rows, words=len(columns))] if rows else []


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds the machine's one lock for benchmarks; SystemExit where another run holds it.

    Prints what machine this is and how busy it is at the start.
    """
    path = Path(tempfile.gettempdir(), "myelin-benchmarks.lock")
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"another benchmark is running on this machine (it holds {path}): "
                "two at once would measure each other; wait until it has ended"
            ) from None
        print(f"{cpu()}, {THREADS} threads, load average {load()} at the start", flush=True)
        yield


def load() -> str:
    """How many threads ran or wanted to, over the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def peak_mib(pid: int) -> float:
    """The most memory that a process has had since it began its program.

    Not `ru_maxrss`, which begins with what the process that started it had.
    """
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/status names no VmHWM")


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {name: version(name) for name in VERSIONS}


def cpu() -> str:
    """The processor's name, family, model, and what matters of its features."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
    has = [name for name in wanted if name in fields.get("flags", "").split()]
    name = fields.get("model name", platform.processor())
    return f"{name} family {fields.get('cpu family')} model {fields.get('model')} ({' '.join(has)})"


def say(text: str) -> None:
    """What is being done now, on one line of the terminal that the next one replaces."""
    print(f"\r{text:100}", end="" if text else "\r", file=sys.stderr, flush=True)
