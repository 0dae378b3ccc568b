import subprocess
import sys

import pytest

from myelin.cpu import LEVELS, Cpu, CpuUnsupported, machine_features


def test_levels_by_name():
    assert Cpu.named("x86-64-v3").lanes == 8
    assert Cpu.named("x86-64-v4").lanes == 16
    with pytest.raises(
        CpuUnsupported, match="'avx10' is unknown; choose one of x86-64-v4, x86-64-v3"
    ):
        Cpu.named("avx10")


def test_better_level_has_all_features_of_the_other():
    assert set(LEVELS[1].features) < set(LEVELS[0].features)
    assert {"avx2", "fma", "abm", "aes", "rdrand", "rdseed"} <= set(LEVELS[1].features)
    assert {"avx512f", "sha_ni", "vaes", "vpclmulqdq"} <= set(LEVELS[0].features)


def test_native_level_is_the_best_that_the_machine_has(monkeypatch):
    for cpu in LEVELS:
        monkeypatch.setattr("myelin.cpu.machine_features", lambda cpu=cpu: frozenset(cpu.features))
        assert Cpu.native() == cpu
    few = frozenset(LEVELS[1].features) - {"fma", "rdseed"}
    monkeypatch.setattr("myelin.cpu.machine_features", lambda: few)
    with pytest.raises(CpuUnsupported, match="lacks CPU features of x86-64-v3: fma rdseed"):
        Cpu.native()


def test_features_are_read_from_cpuinfo(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t: spectre\n")
    assert machine_features(cpuinfo) == {"fpu", "avx2", "fma"}
    assert machine_features(tmp_path / "missing") == frozenset()


def test_module_needs_no_tvm():
    code = "import sys, myelin.cpu; assert 'tvm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
