"""The CPU levels that an image can be built for.

A level is part of the measured image: kernels and runtime are compiled for it and never ask the CPU
at run time, so the cell compares `Cpu.features` with the machine before it starts one. RDSEED it
tries: Linux hides that on processors whose shorter forms fail (AMD-SB-7055), and the runtime uses
the 64-bit form alone, which does not.

Two levels are generic; the others name a family of processors and have what only that family has.
Of these only kernels are compiled anew: the runtime is that of the generic level below.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from myelin.errors import MyelinError

Precision = Literal["float32", "bf16", "bf16x3"]
"""How products are computed: with operands of float32, of bfloat16, or of two bfloat16 that
together are almost a float32. Sums are float32 in all."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

_V3 = (
    *("abm", "aes", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "pclmulqdq"),
    *("popcnt", "rdrand", "sse4_1", "sse4_2", "ssse3", "xsave"),
)
_V4 = (
    *_V3,
    *("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
    *("sha_ni", "vaes", "vpclmulqdq"),
)
_BF16 = (
    *_V4,
    *("adx", "avx512_bf16", "avx512_bitalg", "avx512_vbmi2", "avx512_vnni", "avx512_vpopcntdq"),
    *("avx512ifma", "avx512vbmi", "gfni"),
)

_WITH_TILES, _TILES = "sapphirerapids", ("amx_bf16", "amx_int8", "amx_tile")


class CpuUnsupported(MyelinError):
    """This machine, or this name, is none of the CPU levels that images are built for."""


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A CPU level.

    `level` names it, `features` are all instruction sets that kernels and runtime may use but
    RDSEED, named as in /proc/cpuinfo, `lanes` is the number of float32 in a vector register.
    `runtime` is the level whose enclave runtime its images hold. `cache` are the bytes of a core's
    own cache, the second.
    """

    level: str
    features: tuple[str, ...]
    lanes: int
    runtime: str
    cache: int = 1 << 20

    @staticmethod
    def named(level: str) -> Cpu:
        """Gives the level called "x86-64-v3", say; raises `CpuUnsupported` for none of `LEVELS`."""
        for cpu in LEVELS:
            if cpu.level == level:
                return cpu
        known = ", ".join(cpu.level for cpu in LEVELS)
        raise CpuUnsupported(f"CPU level {level!r} is unknown; choose one of {known}")

    @staticmethod
    def native(precision: Precision | None = None) -> Cpu:
        """Gives the best level that this machine has, for images of one precision or of all.

        Raises `CpuUnsupported` where it has none.
        """
        present = machine_features()
        for cpu in LEVELS:
            if cpu.of(precision or cpu.precisions[-1]).missing(present) == ():
                return cpu
        missing = " ".join(LEVELS[-1].missing(present))
        raise CpuUnsupported(
            f"this machine ({platform.machine()}) lacks CPU features of {LEVELS[-1].level}:"
            f" {missing}; use an x86-64 machine of 2015 or later"
        )

    @staticmethod
    def native_reasons(precision: Precision) -> dict[str, str]:
        """Says of the level that `native` gives, and of each better one, why it is or is not it."""
        present, native = machine_features(), Cpu.native(precision)
        reasons = {
            cpu.level: f"this machine lacks {' '.join(cpu.of(precision).missing(present))}"
            for cpu in LEVELS[: LEVELS.index(native)]
        }
        return {native.level: "the best that this machine has all features of", **reasons}

    def missing(self, present: frozenset[str]) -> tuple[str, ...]:
        """Lists the features of this level that are not among `present`."""
        return tuple(feature for feature in self.features if feature not in present)

    def of(self, precision: Precision) -> Cpu:
        """Gives what kernels of this precision use of the level.

        Those of float32 use no tile registers, which virtual machines may not have where their
        processor does.
        """
        if precision != "float32":
            return self
        used = tuple(name for name in self.features if name not in _TILES)
        return replace(self, features=used)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that kernels of this level can have."""
        return PRECISIONS if "avx512_bf16" in self.features else ("float32",)

    @property
    def target(self) -> Any:
        """The `tvm.target.Target` that compiles for this level on any machine."""
        from tvm.target import Target

        # LLVM prefers 256-bit vectors even where 512-bit ones are faster.
        wide = ["-prefer-256-bit"] if self.lanes == 16 else []
        unused = set(_TILES).difference(self.features) if self.level == _WITH_TILES else ()
        return Target(
            {
                "kind": "llvm",
                "mcpu": self.level,
                "mattr": [*wide, *(f"-{name.replace('_', '-')}" for name in sorted(unused))],
                "mtriple": "x86_64-unknown-linux-gnu",
            }
        )


# Best first. The families have no order: each lacks something of the other.
LEVELS = (
    Cpu(
        level=_WITH_TILES,
        features=tuple(sorted((*_BF16, *_TILES, "avx512_fp16", "avx_vnni"))),
        lanes=16,
        runtime="x86-64-v4",
        cache=2 << 20,
    ),
    Cpu(level="znver4", features=tuple(sorted((*_BF16, "sse4a"))), lanes=16, runtime="x86-64-v4"),
    Cpu(level="x86-64-v4", features=tuple(sorted(_V4)), lanes=16, runtime="x86-64-v4"),
    Cpu(level="x86-64-v3", features=tuple(sorted(_V3)), lanes=8, runtime="x86-64-v3"),
)


def machine_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Reads the CPU features of this machine; empty where `cpuinfo` is missing or names none."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
