"""Words for bfloat16 operands: pairs of them, and products of pairs with float32 sums.

An int32 lane holds a pair, the even one in its low half; vectors have 16 lanes. TVM knows neither
the type nor the instruction `vdpbf16ps`, so both stand in LLVM's language (`WORDS`), as functions
from values to values that are always inlined. Kernels that use them begin with

    with Kernel(…) as kernel, words():

and are for CPU levels with the feature `FEATURE` only: LLVM ends the process where it lacks.

Rounding is to the nearest, to even; what is not finite stays so; subnormal numbers become zero. A
product of two bfloat16 is exact in float32, so that each lane of `dot` adds two rounding errors of
float32.

The same for tiles of AMX (`TILE_WORDS`): vectors of 256 lanes, 16 rows of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from myelin.kernels.functions import is_nan
from myelin.kernels.tiles import Tile
from myelin.kernels.tir import joined, llvm, select, splat

FEATURE = "avx512_bf16"
LANES = 16
ROUNDOFF = 2.0**-8
"""The largest relative error of rounding a normal float32 to bfloat16."""

WORDS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)

define internal <16 x float> @bf16_dot(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b)
    alwaysinline nounwind memory(none) {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}

define internal <16 x i32> @bf16_pairs(<16 x float> %even, <16 x float> %odd)
    alwaysinline nounwind memory(none) {
  %a = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %even)
  %b = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %odd)
  %c = bitcast <16 x bfloat> %a to <16 x i16>
  %d = bitcast <16 x bfloat> %b to <16 x i16>
  %e = zext <16 x i16> %c to <16 x i32>
  %f = zext <16 x i16> %d to <16 x i32>
  %g = shl <16 x i32> %f, splat (i32 16)
  %r = or <16 x i32> %e, %g
  ret <16 x i32> %r
}

define internal <16 x i32> @bf16_neighbours(<16 x float> %first, <16 x float> %second)
    alwaysinline nounwind memory(none) {
  %a = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(
      <16 x float> %second, <16 x float> %first)
  %r = bitcast <32 x bfloat> %a to <16 x i32>
  ret <16 x i32> %r
}

define internal <8 x i32> @bf16_row(<16 x float> %row) alwaysinline nounwind memory(none) {
  %a = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %row)
  %r = bitcast <16 x bfloat> %a to <8 x i32>
  ret <8 x i32> %r
}
"""
# LLVM makes loads of tiles of the casts, and nothing between a product and the next. A cast that it
# could not replace makes LLVM 22 read freed memory: so sums leave tiles by `bf16_tile_numbers`.
TILE_WORDS = """
declare x86_amx @llvm.x86.cast.vector.to.tile.v256i32(<256 x i32>)
declare x86_amx @llvm.x86.cast.vector.to.tile.v256f32(<256 x float>)
declare <256 x float> @llvm.x86.cast.tile.to.vector.v256f32(x86_amx)
declare x86_amx @llvm.x86.tdpbf16ps.internal(i16, i16, i16, x86_amx, x86_amx, x86_amx)
declare void @llvm.x86.tilestored64.internal(i16, i16, ptr, i64, x86_amx)

define internal <256 x float> @bf16_tile_dot(<256 x float> %sum, <256 x i32> %a, <256 x i32> %b)
    alwaysinline nounwind memory(none) {
  %s = call x86_amx @llvm.x86.cast.vector.to.tile.v256f32(<256 x float> %sum)
  %x = call x86_amx @llvm.x86.cast.vector.to.tile.v256i32(<256 x i32> %a)
  %y = call x86_amx @llvm.x86.cast.vector.to.tile.v256i32(<256 x i32> %b)
  %t = call x86_amx @llvm.x86.tdpbf16ps.internal(
      i16 16, i16 64, i16 64, x86_amx %s, x86_amx %x, x86_amx %y)
  %r = call <256 x float> @llvm.x86.cast.tile.to.vector.v256f32(x86_amx %t)
  ret <256 x float> %r
}

define internal <256 x float> @bf16_tile_numbers(<256 x float> %sum)
    alwaysinline nounwind memory(none) {
  %room = alloca <256 x float>, align 64
  %s = call x86_amx @llvm.x86.cast.vector.to.tile.v256f32(<256 x float> %sum)
  call void @llvm.x86.tilestored64.internal(i16 16, i16 64, ptr %room, i64 64, x86_amx %s)
  %r = load <256 x float>, ptr %room, align 64
  ret <256 x float> %r
}
"""
TILE = 256
"""Lanes of a tile: 16 rows of 16."""

TEXTS = frozenset({WORDS, TILE_WORDS})
NAMES = frozenset(
    {
        *("bf16_dot", "bf16_pairs", "bf16_neighbours", "bf16_row"),
        *("bf16_tile_dot", "bf16_tile_numbers"),
    }
)


def words() -> Any:
    """The scope in which the functions of vectors below may be called."""
    return llvm(WORDS)


def tile_words() -> Any:
    """The scope of functions of tiles: products, and the numbers that become of them."""
    return llvm(TILE_WORDS)


def dot(total: Any, a: Any, b: Any) -> Any:
    """total + a_even · b_even + a_odd · b_odd, lane by lane, of vectors of pairs."""
    return T.call_pure_extern("float32x16", "bf16_dot", total, a, b)


def tile_dot(total: Any, a: Any, b: Any) -> Any:
    """total[r, c] + Σ_p a[r, p] · b[p, c] of tiles, a and b of pairs.

    `total` is zero, or was read from memory, or is a product; a and b were read. What is not passed
    on to `tile_dot` goes to `tile_numbers`, without a loop between.
    """
    return T.call_pure_extern(f"float32x{TILE}", "bf16_tile_dot", total, a, b)


def tile_numbers(total: Any) -> Any:
    """The numbers of a sum of products."""
    return T.call_pure_extern(f"float32x{TILE}", "bf16_tile_numbers", total)


def pairs(even: Any, odd: Any) -> Any:
    """Lane l holds the pair even[l], odd[l]."""
    return T.call_pure_extern("int32x16", "bf16_pairs", even, odd)


def neighbours(first: Any, second: Any) -> Any:
    """The 32 numbers of two vectors, one after the other, as 16 pairs."""
    return T.call_pure_extern("int32x16", "bf16_neighbours", first, second)


def row(numbers: Any) -> Any:
    """The 16 numbers of a vector as 8 pairs of neighbours."""
    return T.call_pure_extern("int32x8", "bf16_row", numbers)


def add_outer(tile: Tile, column: Sequence[Any], row: Sequence[Any]) -> None:
    """Adds the products of pairs column[r] · row[v] to every accumulator (r, v) of the tile."""
    operands = [T.bind(vector) for vector in row]
    for r, pair in enumerate(column):
        left = T.bind(T.Broadcast(pair, LANES))
        for v, right in enumerate(operands):
            tile.set(r, v, dot(tile.get(r, v), right, left))


def filled(read: Callable[[Any, int], Any], at: Any, count: int) -> Any:
    """A vector of the `count` numbers that `read(at, lanes)` gives, zeros after them."""
    if count >= LANES:
        return read(at, LANES)
    if count <= 0:
        return splat(0.0, LANES)
    return joined([read(at, count), splat(0.0, LANES - count)])


def rounded(value: Any, lanes: int) -> Any:
    """The same rounding as float32 lanes, of any number; subnormal numbers may stay."""
    kind = "int32" if lanes == 1 else f"int32x{lanes}"

    def whole(constant: int) -> Any:
        one = T.int32(constant)
        return T.Broadcast(one, lanes) if lanes > 1 else one

    bits = T.bind(T.reinterpret(kind, value))
    odd = (bits >> whole(16)) & whole(1)
    # A NaN stays: adding could carry into its sign.
    near = (bits + whole(0x7FFF) + odd) & whole(-0x10000)
    kept = select(is_nan(value), value, T.reinterpret(str(value.ty.dtype), near))
    return T.bind(kept)
