"""Products in tiles: compiled everywhere; where a machine has tiles, test_mixed and test_split run
them too.
"""

import re

import pytest
import test_mixed
import tvm
from hypothesis import example, given
from templates import few

from myelin.cpu import Cpu, CpuUnsupported, machine_features
from myelin.kernels import bounds, linear, mixed, split
from myelin.kernels import object as kernel_object
from myelin.kernels.epilogue import Epilogue

CPU = Cpu.named("sapphirerapids")
# VEX.128.F3.0F38.W0 5C /r with three registers.
TDPBF16PS = re.compile(rb"\xc4[\xe2\xc2][\x02-\x7a]\x5c[\xc0-\xff]")
scaled = Epilogue(function=lambda value, other: value * other, others=1)
templates = pytest.mark.parametrize("templates", [mixed, split], ids=["bf16", "bf16x3"])


def kernels(templates, m, k, n):
    return {
        "matmul": templates.matmul(CPU, m, k, n, bias=True),
        "finished": templates.matmul(CPU, m, k, n, bias=False, finish=scaled),
        "backward_data": templates.backward_data(CPU, m, k, n),
        "weighted_gradient": templates.weighted_gradient(CPU, m, k, n),
    }


def assert_compiles(templates, m, k, n):
    found = kernels(templates, m, k, n)
    for name, kernel in found.items():
        bounds.prove(kernel, name)
    code = kernel_object.build(found, CPU)
    assert len(TDPBF16PS.findall(code)) >= len(found)
    assert kernel_object.undefined(code) <= kernel_object.ALLOWED


@templates
@few(4)
@given(size=test_mixed.sizes)
@example(size=(1, 1, 1))
@example(size=(16, 32, 16))
@example(size=(33, 1100, 40))
def test_every_size_compiles(templates, size):
    assert_compiles(templates, *size)


def test_other_levels_have_vectors():
    cpu = Cpu.named("znver4")
    code = kernel_object.build({"a": mixed.matmul(cpu, 33, 50, 70, bias=True)}, cpu)
    assert not TDPBF16PS.search(code)


CAST = re.compile(r"(%\S+) = .*@llvm\.x86\.cast\.(vector|tile)\.to\.\w+\.\w+\(.* (\S+?)\)")


@templates
@pytest.mark.parametrize("size", [(64, 784, 40), (33, 50, 70), (17, 2100, 33), (1, 784, 32)])
def test_llvm_can_replace_every_cast(templates, size):
    assert_casts(kernels(templates, *size))


def assert_casts(found):
    """See `bf16.TILE_WORDS`: into a tile goes what was read, zero or a product, and out nothing."""
    build = tvm.get_global_func("target.build.llvm")
    module = build(kernel_object._lower(found, CPU, kernel_object._c_abi), CPU.target)
    casts = 0
    for function in module.inspect_source("ll").split("\ndefine "):
        lines = [line for line in function.splitlines() if "#dbg_value" not in line]
        names = [set(re.findall(r"%[\w.]+", line)) for line in lines]
        made = {line.partition(" = ")[0].strip(): line for line in lines if " = " in line}

        def users(name, lines=lines, names=names):
            return [
                line
                for line, used in zip(lines, names, strict=True)
                if name in used and not line.strip().startswith(f"{name} = ")
            ]

        for cast in filter(None, map(CAST.search, lines)):
            result, kind, of = cast.groups()
            casts += 1
            if kind == "tile":
                assert all(".cast.vector.to.tile." in user for user in users(result))
            else:
                read = " load " in made.get(of, "") and len(users(of)) == 1
                assert read or of == "zeroinitializer" or ".cast.tile.to.vector." in made[of]
                assert all(".tdpbf16ps." in u or ".tilestored64." in u for u in users(result))
    assert casts


def test_a_chain_is_not_shorter_than_an_instruction():
    assert linear.EXAMPLES // 2 >= 16


@pytest.mark.skipif("amx_tile" in machine_features(), reason="this machine has tile registers")
def test_what_a_machine_lacks_is_said():
    kernel = mixed.matmul(CPU, 1, 1, 1, bias=False)
    with pytest.raises(CpuUnsupported, match="no AMX tile registers"):
        kernel_object.library({"kernel": kernel}, CPU)
