"""Stores of whole lines past the caches, for numbers that are read much later.

What a core writes to memory it first reads, and keeps at the cost of what it needs sooner. TVM has
no store that does neither, so it stands in LLVM's language (`WORDS`), as the words of
`myelin.kernels.bf16` do. Such a store must lie on a line of its own: `myelin.kernels.bounds` proves
it. Other cores see it after `Stream.end`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.cpu import Cpu
from myelin.kernels.tir import llvm, load, store

LANES = 16
"""Numbers of a line."""
LARGE = 8 << 20
"""Bytes of a kernel's results above which they leave every cache before they are read."""

WORDS = """
declare void @llvm.x86.sse.sfence()

define internal i32 @stream_line(ptr %line, <16 x float> %value) alwaysinline nounwind {
  store <16 x float> %value, ptr %line, align 64, !nontemporal !0
  ret i32 0
}

define internal i32 @stream_end() alwaysinline nounwind {
  call void @llvm.x86.sse.sfence()
  ret i32 0
}

!0 = !{i32 1}
"""
LINE, END = "stream_line", "stream_end"


class Stream:
    """Stores rows of `numbers` floats for each of `n` examples, in vectors of their `channels`.

    Past the caches where these are whole lines and all are many, else as any other.
    """

    def __init__(self, cpu: Cpu, *, n: int, numbers: int, channels: int) -> None:
        """Chooses which."""
        whole = cpu.lanes == LANES and channels % LANES == 0 and numbers % LANES == 0
        self.past = whole and 4 * n * numbers > LARGE

    def scope(self) -> AbstractContextManager[Any]:
        """Where `store` and `end` may stand."""
        scope: AbstractContextManager[Any] = llvm(WORDS) if self.past else nullcontext()
        return scope

    def store(self, buffer: Any, value: Any, *index: Any) -> None:
        """Writes a vector."""
        if self.past:
            line = T.address_of(load(buffer, *index))
            T.evaluate(T.call_extern("int32", LINE, line, value))
        else:
            store(buffer, value, *index)

    def end(self) -> None:
        """Ends what this iteration of a parallel loop stores."""
        if self.past:
            T.evaluate(T.call_extern("int32", END))
