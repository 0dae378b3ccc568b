//! Shifted rounded Gaussian: k = round(S/g + (σ/g)·z) with z standard normal, released as k·g/divisor.
//!
//! z comes from Box–Muller in float64 on four or eight lanes: polynomials, fused multiply-adds, integer operations and selects.
//! Nothing here branches, divides, looks up a table or calls a library on data, so time does not depend on the sums or
//! the noise. Coefficients are Chebyshev interpolations made with mpmath; the relative error of c·r·z is about 2⁻⁵¹.
//!
//! Sums and random words lie in fours, so that bits are the same at every CPU level; eight lanes take two fours at once.

#![allow(clippy::arithmetic_side_effects, reason = "vectors of floats do not panic")]

use zeroize::Zeroizing;

use crate::Generator;
use crate::lanes::*;

/// Samples made together: two outputs of Box–Muller a lane.
const GROUP: usize = 8 * FOURS;
/// Groups whose random words are made at once, small enough for the first-level cache.
const GROUPS: usize = 512 / GROUP;
/// Random words of a group: three a lane, 104 bits of radius and 54 of angle.
const WORDS: usize = 12 * FOURS;

/// What a release is scaled by. All numbers are public.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    grid: f64,
    sigma: f64,
    /// 1/grid, exact.
    to_grid: f64,
    /// σ/grid, exact: the grid is a power of two.
    spread: f64,
    /// grid/divisor.
    step: f64,
}

impl Scale {
    /// Noise of σ = `noise_multiplier · max_grad_norm` on a grid of the largest power of two ≤ σ/32, and the public
    /// `expected_batch` that sums are divided by. None unless all are positive and the grid is between 2⁻⁵⁰⁰ and 2⁵⁰⁰.
    pub fn new(noise_multiplier: f64, max_grad_norm: f64, expected_batch: f64) -> Option<Self> {
        let sigma = noise_multiplier * max_grad_norm;
        // A float's exponent alone is the largest power of two below it.
        let grid = f64::from_bits((sigma / 32.0).to_bits() & 0xfff0_0000_0000_0000);
        let positive = noise_multiplier > 0.0 && max_grad_norm > 0.0 && expected_batch > 0.0;
        let bounded = grid > 3.1e-151 && grid < 3.2e150 && expected_batch < f64::INFINITY;
        (positive && bounded).then(|| Self {
            grid,
            sigma,
            to_grid: 1.0 / grid,
            spread: sigma / grid,
            step: grid / expected_batch,
        })
    }

    /// Distance of neighbouring releases before the division: a power of two.
    pub fn grid(&self) -> f64 {
        self.grid
    }

    /// Standard deviation of the noise on the sums.
    pub fn sigma(&self) -> f64 {
        self.sigma
    }
}

/// Gaussian noise of one generator.
pub struct Noise {
    generator: Generator,
    words: Zeroizing<[[u64; WORDS]; GROUPS]>,
    /// −2 ln u of the words' uniform numbers, a lane each.
    logs: Zeroizing<[[f64; 4 * FOURS]; GROUPS]>,
}

impl Noise {
    /// `generator` must be fresh or forked for this noise: equal generators give equal noise.
    pub fn new(generator: Generator) -> Self {
        let (words, logs) = ([[0; WORDS]; GROUPS], [[0.0; 4 * FOURS]; GROUPS]);
        Self { generator, words: Zeroizing::new(words), logs: Zeroizing::new(logs) }
    }

    /// Writes the noisy means k·g/divisor of `sums` to `out`, which is as long. A sum beyond 2⁵¹ grid steps counts as
    /// that many, NaN as 2⁵¹. Not inlined: the disassembly of an image is checked for its instructions.
    #[inline(never)]
    pub fn release(&mut self, sums: &[f64], out: &mut [f32], scale: Scale) {
        assert_eq!(sums.len(), out.len(), "a release has one sum an output");
        for (sums, out) in sums.chunks(GROUP * GROUPS).zip(out.chunks_mut(GROUP * GROUPS)) {
            let (words, _) = self.words.split_at_mut(sums.len().div_ceil(GROUP));
            self.generator.blocks(bytemuck::cast_slice_mut(words));
            // Of two short loops the processor has more rounds under way at once than of a long one.
            for (words, log) in words.iter().zip(self.logs.iter_mut()) {
                let [w0, w1, _] = split(words);
                *log = log_twice(uniform(w0, w1)).into();
            }
            let mut draws = words.iter().zip(self.logs.iter());
            let (sums, last_sums) = sums.as_chunks::<GROUP>();
            let (out, last_out) = out.as_chunks_mut::<GROUP>();
            for ((sums, out), draw) in sums.iter().zip(out).zip(draws.clone()) {
                *out = group(draw, sums, scale);
            }
            if let (false, Some(draw)) = (last_sums.is_empty(), draws.next_back()) {
                let mut padded = [0.0; GROUP];
                padded.iter_mut().zip(last_sums).for_each(|(to, from)| *to = *from);
                let means = group(draw, &padded, scale);
                last_out.iter_mut().zip(means).for_each(|(to, from)| *to = from);
            }
        }
    }
}

/// The means of a group's sums from its random words and their logarithms.
#[inline(always)]
fn group(
    (words, log): (&[u64; WORDS], &[f64; 4 * FOURS]),
    sums: &[f64; GROUP],
    scale: Scale,
) -> [f32; GROUP] {
    let [_, _, w2] = split(words);
    let radius = mul(root((*log).into()), splat(scale.spread));
    let (z0, z1) = direction(w2);
    let sums: [[[f64; 4]; 2]; FOURS] = bytemuck::cast(*sums);
    let (s0, s1) = (sums.map(|[first, _]| first), sums.map(|[_, second]| second));
    let first = mean(s0, radius, z0, scale);
    let second = mean(s1, radius, z1, scale);
    let mut means = [[[0.0; 4]; 2]; FOURS];
    for ((mean, first), second) in means.iter_mut().zip(first).zip(second) {
        *mean = [first, second];
    }
    bytemuck::cast(means)
}

/// The three words of every lane.
#[inline(always)]
fn split(words: &[u64; WORDS]) -> [Words; 3] {
    let fours: [[[u64; 4]; 3]; FOURS] = bytemuck::cast(*words);
    let words = [fours.map(|[w, ..]| w), fours.map(|[_, w, _]| w), fours.map(|[.., w]| w)];
    words.map(|w| bytemuck::cast::<_, [u64; 4 * FOURS]>(w).into())
}

/// k·g/divisor as float32.
#[inline(always)]
fn mean(sum: [[f64; 4]; FOURS], radius: Floats, z: Floats, scale: Scale) -> [[f32; 4]; FOURS] {
    singles(mul(
        grid_point(bytemuck::cast::<_, [f64; 4 * FOURS]>(sum).into(), radius, z, scale),
        splat(scale.step),
    ))
}

/// k = round(S/g + radius·z). The integer part of S/g is set aside before the noise is added, so that the sum is
/// rounded once, to an integer, however large S is; adding first would round twice and favour even k.
#[inline(always)]
fn grid_point(sum: Floats, radius: Floats, z: Floats, scale: Scale) -> Floats {
    let limit = 2_251_799_813_685_248.0; // 2⁵¹
    // The order of operands makes NaN 2⁵¹: the instruction returns its second operand then.
    let a = max(min(mul(sum, splat(scale.to_grid)), splat(limit)), splat(-limit));
    let integer = round_even(a);
    add(integer, round_even(fma(radius, z, sub(a, integer))))
}

/// A uniform number of (0, 1]: 104 bits, rounded to the nearest float64. Never 0.
#[inline(always)]
fn uniform(w0: Words, w1: Words) -> Floats {
    const TINY: f64 = 1.0 / 4_503_599_627_370_496.0; // 2⁻⁵²
    let low = sub(one_to_two(w1), splat(1.0 - TINY / 2.0));
    fma(low, splat(TINY), sub(one_to_two(w0), splat(1.0)))
}

/// −2 ln u for u in [2⁻¹⁰⁵, 1].
#[inline(always)]
fn log_twice(u: Floats) -> Floats {
    // u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
    let shifted = add_bits(as_bits(u), bits(ONE - SQRT_HALF));
    let exponent = shr::<52>(shifted) | bits(0x4330_0000_0000_0000);
    let k = sub(as_float(exponent), splat(4_503_599_627_370_496.0 + 1023.0));
    let f = sub(as_float(add_bits(shifted & bits(MANTISSA), bits(SQRT_HALF))), splat(1.0));
    // x = −2 ln u = −2k ln 2 − 2f + f²(1 + f·P(f)): the first two with their rounding error `rest`.
    let f2 = mul(f, f);
    let tail = mul(f2, fma(polynomial_even_odd(&LOG, f, f2), f, splat(1.0)));
    let tail = fma(k, splat(-LN_4_LOW), tail);
    let head = fma(k, splat(-LN_4_HIGH), mul(f, splat(-2.0)));
    let rest = fma(f, splat(-2.0), sub(mul(k, splat(-LN_4_HIGH)), head));
    add(head, add(tail, rest))
}

/// The square root of x = −2 ln u: a radius.
#[inline(always)]
fn root(x: Floats) -> Floats {
    // y = 1/sqrt(x) from the bits of x within 3.4 %, then two steps of higher order and one on the root itself. The
    // square-root instruction is faster, but not known to take the same time for every operand.
    let y = as_float(sub_bits(bits(0x5fe6_eb50_c7b5_37a9), shr::<1>(as_bits(x))));
    let e = fma(mul(x, y), mul(y, splat(-1.0)), splat(1.0));
    let p = fma(fma(e, splat(0.3125), splat(0.375)), e, splat(0.5));
    let y = fma(mul(y, e), p, y);
    let e = fma(mul(x, y), mul(y, splat(-1.0)), splat(1.0));
    let y = fma(mul(y, e), fma(e, splat(0.375), splat(0.5)), y);
    let root = mul(x, y);
    let d = fma(mul(root, splat(-1.0)), root, x);
    fma(d, mul(y, splat(0.5)), root)
}

/// (cos, sin) of a uniform angle: 52 bits within ±45 degrees, one for the sign and one to swap.
#[inline(always)]
fn direction(w: Words) -> (Floats, Floats) {
    let t = add(sub(one_to_two(w), splat(1.5)), splat(1.0 / 9_007_199_254_740_992.0)); // 2⁻⁵³
    let t2 = mul(t, t);
    let sin = mul(t, polynomial(&SIN, t2));
    let cos = fma(polynomial(&COS, t2), t2, splat(1.0));
    let cos = as_float(as_bits(cos) ^ shl::<63>(w));
    let swap = shl::<62>(w);
    (blend(cos, sin, swap), blend(sin, cos, swap))
}

/// 52 random bits as a number of [1, 2).
#[inline(always)]
fn one_to_two(w: Words) -> Floats {
    as_float(shr::<12>(w) | bits(ONE))
}

/// Σ c_i x^i by Horner's rule.
#[inline(always)]
fn polynomial<const N: usize>(coefficients: &[f64; N], x: Floats) -> Floats {
    let mut terms = coefficients.iter().rev();
    let highest = splat(*terms.next().unwrap_or(&0.0));
    terms.fold(highest, |sum, c| fma(sum, x, splat(*c)))
}

/// The same from even and odd halves: half the latency for one more operation.
#[inline(always)]
fn polynomial_even_odd(coefficients: &[[f64; 2]; 10], x: Floats, x2: Floats) -> Floats {
    let even = coefficients.map(|[even, _]| even);
    let odd = coefficients.map(|[_, odd]| odd);
    fma(polynomial(&odd, x2), x, polynomial(&even, x2))
}

#[inline(always)]
fn round_even(x: Floats) -> Floats {
    round::<8>(x) // to nearest, ties to even, no exception
}

/// Bits of 1, of a float64's fraction, and of sqrt(1/2).
const ONE: i64 = 0x3ff0_0000_0000_0000;
const MANTISSA: i64 = 0x000f_ffff_ffff_ffff;
const SQRT_HALF: i64 = 0x3fe6_a09e_667f_3bcd;
/// 2 ln 2 = high + low; k·high is exact for every exponent k.
const LN_4_HIGH: f64 = 1.3862943611197807;
const LN_4_LOW: f64 = 1.0995846037416742e-13;
/// −2 (ln(1+f) − f + f²/2) / f³ for f in [sqrt(1/2) − 1, sqrt(2) − 1], even and odd powers; error 2⁻⁵⁶·⁸ of ln.
const LOG: [[f64; 2]; 10] = [
    [-0.6666666666666667, 0.4999999999999986],
    [-0.39999999999986446, 0.3333333333339461],
    [-0.2857142857518348, 0.24999999994218533],
    [-0.22222221819682145, 0.1999999999263454],
    [-0.18181839751996404, 0.16666690112826407],
    [-0.153839762402675, 0.1428446409831694],
    [-0.13343971110542582, 0.12530063739036126],
    [-0.11674036702929998, 0.10736560776101096],
    [-0.1074375578132956, 0.12259123961455812],
    [-0.1133284648410436, 0.05012245619056493],
];
/// sin(t·π/2)/t in t², t in (−1/2, 1/2).
const SIN: [f64; 7] = [
    core::f64::consts::FRAC_PI_2,
    -0.6459640975062443,
    0.07969262624604301,
    -0.004681754132340976,
    0.0001604411507421909,
    -3.59864335298231e-06,
    5.633933781537854e-08,
];
/// (cos(t·π/2) − 1)/t² in t².
const COS: [f64; 7] = [
    -1.2337005501361697,
    0.2536695079010478,
    -0.020863480763340773,
    0.0009192602745468447,
    -2.5202039028029178e-05,
    4.710678405505227e-07,
    -6.329396344967424e-09,
];

#[cfg(test)]
#[path = "../tests/unit/gaussian.rs"]
mod tests;
