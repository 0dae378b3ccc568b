//! Vectors of float64 as wide as the CPU level has them. Every operation rounds alike at both widths, so bits are the
//! same; twice as many lanes need half as many instructions.

#[cfg(not(target_feature = "avx512dq"))]
mod width {
    pub use safe_arch::{
        add_i64_m256i as add_bits, add_m256d as add, cast_to_m256d_from_m256i as as_float,
        cast_to_m256i_from_m256d as as_bits, fused_mul_add_m256d as fma, m256d as Floats,
        m256i as Words, max_m256d as max, min_m256d as min, mul_m256d as mul, round_m256d as round,
        set_splat_i64_m256i as bits, set_splat_m256d as splat, shl_imm_u64_m256i as shl,
        shr_imm_u64_m256i as shr, sub_i64_m256i as sub_bits, sub_m256d as sub,
    };
    /// Fours of lanes.
    pub const FOURS: usize = 1;
    /// Lanes of `b` where the sign bit of `mask` is set, else of `a`.
    #[inline(always)]
    pub fn blend(a: Floats, b: Floats, mask: Words) -> Floats {
        safe_arch::blend_varying_m256d(a, b, as_float(mask))
    }
    #[inline(always)]
    pub fn singles(x: Floats) -> [[f32; 4]; FOURS] {
        [safe_arch::convert_to_m128_from_m256d(x).into()]
    }
}

#[cfg(target_feature = "avx512dq")]
mod width {
    pub use safe_arch::{
        add_i64_m512i as add_bits, add_m512d as add, cast_to_m512d_from_m512i as as_float,
        cast_to_m512i_from_m512d as as_bits, fused_mul_add_m512d as fma, m512d as Floats,
        m512i as Words, max_m512d as max, min_m512d as min, mul_m512d as mul, round_m512d as round,
        set_splat_i64_m512i as bits, set_splat_m512d as splat, sub_i64_m512i as sub_bits,
        sub_m512d as sub,
    };
    use safe_arch::{convert_to_m128_from_m256d as single, extract_m256d_from_m512d as half};
    pub const FOURS: usize = 2;
    #[inline(always)]
    pub fn blend(a: Floats, b: Floats, mask: Words) -> Floats {
        safe_arch::blend_varying_m512d(a, b, safe_arch::movepi64_mask_m512d(as_float(mask)))
    }
    #[inline(always)]
    pub fn singles(x: Floats) -> [[f32; 4]; FOURS] {
        [single(half::<0>(x)).into(), single(half::<1>(x)).into()]
    }
    #[inline(always)]
    pub fn shl<const COUNT: i32>(x: Words) -> Words {
        safe_arch::shl_all_u64_m512i(x, COUNT as u64)
    }
    #[inline(always)]
    pub fn shr<const COUNT: i32>(x: Words) -> Words {
        safe_arch::shr_all_u64_m512i(x, COUNT as u64)
    }
}

pub use width::*;
