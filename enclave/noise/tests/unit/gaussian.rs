#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panics")]

extern crate std;

use std::vec;
use std::vec::Vec;

use super::*;

/// The two Gaussians of three words.
fn pair(words: [u64; 3]) -> (f64, f64) {
    let [w0, w1, w2] = words.map(|word| Words::from([word; 4 * FOURS]));
    let radius = root(log_twice(uniform(w0, w1)));
    let (first, second) = direction(w2);
    let [z0, z1] = [first, second].map(|z| <[f64; 4 * FOURS]>::from(mul(radius, z)));
    (z0[0], z1[0])
}

#[test]
fn gaussians_match_mpmath() {
    for row in include_str!("../vectors/pairs.txt").lines() {
        let fields: [&str; 5] = row.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let words = [0, 1, 2].map(|i| u64::from_str_radix(fields[i], 16).unwrap());
        let expected = [3, 4].map(|i| fields[i].parse::<f64>().unwrap());
        let radius = expected[0].hypot(expected[1]);
        // u is rounded to 2⁻⁵⁴ of itself, which counts where u is near 1 and the radius small.
        let rounding = (2f64.powi(-53) / radius).min(2f64.powi(-26));
        let (z0, z1) = pair(words);
        for (z, expected) in [(z0, expected[0]), (z1, expected[1])] {
            let error = (z - expected).abs();
            assert!(error <= 2f64.powf(-50.9) * expected.abs() + rounding, "{row}: {z}");
        }
    }
}

/// Share of even integers among 2²⁰ releases of a sum half way between two integers, each by `round`.
fn even_share(a: f64, round: impl Fn(Floats, Floats, Floats, Scale) -> Floats) -> f64 {
    let scale = Scale::new(32.0, 1.0, 1.0).unwrap();
    let mut generator = Generator::new(&[3; 32]);
    let mut words = vec![[0u64; WORDS]; (1 << 20) / GROUP];
    generator.blocks(bytemuck::cast_slice_mut(&mut words));
    let mut even = 0u32;
    for words in &words {
        let [w0, w1, w2] = split(words);
        let radius = mul(root(log_twice(uniform(w0, w1))), splat(scale.spread));
        let (z0, z1) = direction(w2);
        for z in [z0, z1] {
            let k: [f64; 4 * FOURS] = round(splat(a), radius, z, scale).into();
            even += k.iter().map(|k| u32::from(*k as i64 % 2 == 0)).sum::<u32>();
        }
    }
    f64::from(even) / f64::from(1 << 20)
}

#[test]
fn large_sums_are_rounded_once() {
    for exponent in [0, 20, 40, 50] {
        let share = even_share(2f64.powi(exponent) + 0.5, grid_point);
        assert!((share - 0.5).abs() < 5.0 * 0.5 / 1024.0, "2^{exponent}: {share}");
    }
    // Noise added before rounding favours even integers: the check above would see it.
    let twice = |sum: Floats, radius, z, scale: Scale| {
        round_even(fma(radius, z, mul(sum, splat(scale.to_grid))))
    };
    let share = even_share(2f64.powi(50) + 0.5, twice);
    assert!(share > 0.55, "{share}");
}
