import re
import subprocess
import sys
from pathlib import Path

import pytest
import tvm

from myelin.cpu import LEVELS, Cpu, CpuUnsupported, machine_features


def test_levels_by_name():
    assert Cpu.named("x86-64-v3").lanes == 8
    assert Cpu.named("x86-64-v4").lanes == 16
    known = ", ".join(("sapphirerapids", "znver4", "x86-64-v4", "x86-64-v3"))
    with pytest.raises(CpuUnsupported, match=f"'avx10' is unknown; choose one of {known}"):
        Cpu.named("avx10")


def test_better_level_has_all_features_of_the_generic_ones():
    intel, amd, v4, v3 = (set(cpu.features) for cpu in LEVELS)
    assert v3 < v4 < amd & intel
    assert {"avx2", "fma", "abm", "aes", "rdrand"} <= v3
    assert {"avx512f", "sha_ni", "vaes", "vpclmulqdq"} <= v4
    assert "avx512_bf16" in (amd & intel) - v4
    assert {"amx_tile", "amx_bf16"} <= intel - amd
    assert amd - intel == {"sse4a"}


def test_kernels_of_float32_ask_for_no_tile_registers():
    for cpu in LEVELS:
        assert set(cpu.features) - set(cpu.of("float32").features) == {
            name for name in cpu.features if name.startswith("amx_")
        }
        assert all(cpu.of(precision) == cpu for precision in ("bf16", "bf16x3"))


def test_runtime_of_a_level_uses_no_feature_that_the_level_lacks():
    for cpu in LEVELS:
        runtime = Cpu.named(cpu.runtime)
        assert runtime.runtime == runtime.level
        assert set(runtime.features) <= set(cpu.of("float32").features)


# What compiled kernels may contain, as LLVM names it; its other names are instructions for
# operating systems, hints on speed, or RDSEED, which the cell tries.
_COMPUTING = re.compile(
    r"avx.*|amx.*|ssse3|sse4.*|aes|sha|gfni|v?pclmul.*|vaes|bmi2?|fma|f16c|adx|lzcnt|popcnt|movbe"
    r"|rdrnd"
)
_NAMES = {"lzcnt": "abm", "sha": "sha_ni", "bmi": "bmi1", "pclmul": "pclmulqdq"} | {
    "rdrnd": "rdrand",
    "avxvnni": "avx_vnni",
    **{f"avx512{x}": f"avx512_{x}" for x in ("bf16", "bitalg", "fp16", "vbmi2", "vnni")},
    "avx512vpopcntdq": "avx512_vpopcntdq",
}


USED = [cpu.of(precision) for cpu in LEVELS for precision in cpu.precisions[:2]]


@pytest.mark.parametrize("cpu", USED, ids=lambda cpu: f"{cpu.level}-{len(cpu.features)}")
def test_features_are_all_that_the_compiler_may_use(cpu):
    """Against LLVM's own list of what its target has."""
    target = cpu.target
    has = tvm.get_global_func("target.llvm_get_cpu_features")(target)
    used = {name for name in map(str, has) if _COMPUTING.fullmatch(name)}
    assert {"avx2", "fma", "lzcnt"} <= used
    named = {re.sub(r"[-.]", "_", _NAMES.get(name, name)) for name in used}
    assert named <= set(cpu.features)


def test_native_level_is_the_best_that_the_machine_has(monkeypatch):
    for cpu in LEVELS:
        monkeypatch.setattr("myelin.cpu.machine_features", lambda cpu=cpu: frozenset(cpu.features))
        assert Cpu.native() == cpu
    few = frozenset(Cpu.named("x86-64-v3").features) - {"fma", "rdrand"}
    monkeypatch.setattr("myelin.cpu.machine_features", lambda: few)
    with pytest.raises(CpuUnsupported, match="lacks CPU features of x86-64-v3: fma rdrand"):
        Cpu.native()


def test_native_says_why_no_better_level_was_taken(monkeypatch):
    present = frozenset(Cpu.named("znver4").features) | {"amx_tile", "amx_bf16"}
    monkeypatch.setattr("myelin.cpu.machine_features", lambda: present)
    assert Cpu.native_reasons("bf16") == {
        "znver4": "the best that this machine has all features of",
        "sapphirerapids": "this machine lacks amx_int8 avx512_fp16 avx_vnni",
    }
    monkeypatch.setattr(
        "myelin.cpu.machine_features", lambda: frozenset(Cpu.named("sapphirerapids").features)
    )
    assert list(Cpu.native_reasons("bf16")) == ["sapphirerapids"]


def test_a_machine_without_tile_registers_is_native_for_float32(monkeypatch):
    intel = Cpu.named("sapphirerapids")
    guest = frozenset(intel.features) - {"amx_bf16", "amx_int8", "amx_tile"}
    monkeypatch.setattr("myelin.cpu.machine_features", lambda: guest)
    assert Cpu.native("float32") == intel
    assert Cpu.native("bf16").level == Cpu.native().level == "x86-64-v4"
    assert Cpu.native_reasons("bf16")["sapphirerapids"].endswith("lacks amx_bf16 amx_int8 amx_tile")


def test_features_are_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t: spectre\n")
    assert machine_features(cpuinfo) == {"fpu", "avx2", "fma"}
    assert machine_features(tmp_path / "missing") == frozenset()


def test_module_needs_no_tvm():
    code = "import sys, myelin.cpu; assert 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_avx512_without_sha_instructions_takes_the_lower_level(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    v4 = Cpu.named("x86-64-v4")
    skylake = frozenset(v4.features) - {"sha_ni", "vaes", "vpclmulqdq"}
    assert set(v4.missing(skylake)) == {"sha_ni", "vaes", "vpclmulqdq"}
    monkeypatch.setattr("myelin.cpu.machine_features", lambda: skylake)
    assert Cpu.native().level == "x86-64-v3"


def test_a_level_names_all_that_its_runtime_is_built_with_but_what_the_cell_tries() -> None:
    """The cell compares these names with the processor; build.sh says what the code may use."""
    script = (Path(__file__).parents[2] / "enclave" / "build.sh").read_text()
    ((base,), (more,)) = (
        re.findall(rf"{start}features=(?:\$features,)?(\S+)", script, re.MULTILINE)
        for start in ("^", "x86-64-v4\\) ")
    )
    renamed = {"sha": "sha_ni"}
    for level, flags in (("x86-64-v3", base), ("x86-64-v4", f"{base},{more}")):
        names = {flag.removeprefix("+") for flag in flags.split(",")}
        assert len(names) >= 4
        named = {renamed.get(name, name) for name in names}
        assert named - set(Cpu.named(level).features) == {"rdseed"}
