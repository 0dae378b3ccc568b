//! Releases against vectors made by mpmath (make_vectors.py): exact bits, then the distribution.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "tests fail by panics"
)]

use myelin_noise::{Generator, Noise, Scale};

/// Samples of a distribution test.
const SAMPLES: usize = 1 << 23;

fn fields<const N: usize>(row: &str) -> [&str; N] {
    row.split(' ').collect::<Vec<_>>().try_into().unwrap()
}

/// The integers k of a release of `sums`: the divisor makes every output k itself.
fn integers(sums: &[f64], multiplier: f64, seed: u8) -> Vec<f64> {
    let grid = Scale::new(multiplier, 1.0, 1.0).unwrap().grid();
    let scale = Scale::new(multiplier, 1.0, grid).unwrap();
    let mut out = vec![0.0; sums.len()];
    Noise::new(Generator::new(&[seed; 32])).release(sums, &mut out, scale);
    out.into_iter().map(f64::from).collect()
}

#[test]
fn release_matches_mpmath() {
    let rows: Vec<[&str; 2]> = include_str!("vectors/release.txt").lines().map(fields).collect();
    let sums: Vec<f64> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
    let seed = std::array::from_fn(|i| i as u8);
    let scale = Scale::new(1.25, 1.0, 7.0).unwrap();
    assert_eq!((scale.grid(), scale.sigma()), (1.0 / 32.0, 1.25));
    let mut out = vec![0.0; sums.len()];
    Noise::new(Generator::new(&seed)).release(&sums, &mut out, scale);
    for (row, out) in rows.iter().zip(&out) {
        let k: f64 = row[1].parse().unwrap();
        assert_eq!(*out, (k * (scale.grid() / 7.0)) as f32, "{row:?}");
    }
    // A shorter release is the beginning of a longer one.
    for count in [1, 3, 4, 5, 8, 9, 1023, 1024, 1025, 2049] {
        let mut part = vec![0.0; count];
        Noise::new(Generator::new(&seed)).release(&sums[..count], &mut part, scale);
        assert_eq!(part, out[..count]);
    }
}

#[test]
fn grid_is_the_largest_power_of_two_that_sigma_holds_32_times() {
    for (sigma, grid) in [
        (32.0, 1.0),
        (63.9, 1.0),
        (64.0, 2.0),
        (1.0, 0.03125),
        (0.99, 0.015625),
        (1e-12, 2f64.powi(-45)),
    ] {
        assert_eq!(Scale::new(sigma, 1.0, 256.0).unwrap().grid(), grid, "{sigma}");
        assert_eq!(Scale::new(1.0, sigma, 256.0).unwrap().grid(), grid, "{sigma}");
    }
    let bad = [0.0, -1.0, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE / 4.0, f64::MAX];
    for bad in bad {
        assert_eq!(Scale::new(bad, 1.0, 1.0), None, "{bad}");
        assert_eq!(Scale::new(1.0, bad, 1.0), None, "{bad}");
    }
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(Scale::new(1.0, 1.0, bad), None, "{bad}");
    }
}

#[test]
fn outputs_lie_on_the_grid_whatever_the_sums_are() {
    let sums: Vec<f64> = (0..10_000).map(|i| f64::from(i).powi(3) / 7.0 - 1e9).collect();
    let scale = Scale::new(1.0, 1.0, 1.0).unwrap();
    let mut out = vec![0.0; sums.len()];
    Noise::new(Generator::new(&[5; 32])).release(&sums, &mut out, scale);
    for out in out {
        assert_eq!(f64::from(out) / scale.grid() % 1.0, 0.0);
    }
}

#[test]
fn sums_that_no_training_makes_are_defined() {
    let limit = 2f64.powi(51) as f32;
    let sums = [f64::INFINITY, f64::MAX, f64::NAN, f64::NEG_INFINITY, f64::MIN, 5e-324, -0.0, 0.0];
    let k = integers(&sums, 32.0, 6);
    assert_eq!(k[..3], [f64::from(limit); 3]);
    assert_eq!(k[3..5], [-f64::from(limit); 2]);
    let zeros = integers(&[0.0; 8], 32.0, 6);
    assert_eq!(k[5..], zeros[5..]);
    assert!(zeros.iter().all(|k| k.abs() < 400.0));
}

/// A distribution function by k, from `first` on.
struct Law {
    first: i64,
    below: Vec<f64>,
}

impl Law {
    fn read(spread: &str, shift: &str) -> Self {
        let rows: Vec<[&str; 4]> =
            include_str!("vectors/rounded.txt").lines().map(fields).collect();
        let rows: Vec<_> =
            rows.into_iter().filter(|row| row[0] == spread && row[1] == shift).collect();
        let first = rows[0][2].parse().unwrap();
        Self { first, below: rows.iter().map(|row| row[3].parse().unwrap()).collect() }
    }

    /// Counts of `k` by integer; those outside count at the ends.
    fn count(&self, k: &[f64]) -> Vec<f64> {
        let mut counts = vec![0.0; self.below.len()];
        let last = counts.len() as i64 - 1;
        for k in k {
            counts[(*k as i64 - self.first).clamp(0, last) as usize] += 1.0;
        }
        counts
    }

    /// Standard score of Pearson's statistic over bins of `width` integers that expect at least 20 (Wilson–Hilferty).
    fn chi_square(&self, k: &[f64], width: usize) -> f64 {
        let counts = self.count(k);
        let (mut bins, mut start, mut open) = (vec![], 0.0, 0.0);
        for (i, (count, below)) in counts.iter().zip(&self.below).enumerate() {
            open += count;
            let expected = (below - start) * k.len() as f64;
            if (i + 1) % width == 0 && expected >= 20.0 && (1.0 - below) * k.len() as f64 >= 20.0 {
                bins.push((open, expected));
                (start, open) = (*below, 0.0);
            }
        }
        bins.push((open, (1.0 - start) * k.len() as f64));
        let statistic: f64 =
            bins.iter().map(|(count, expected)| (count - expected).powi(2) / expected).sum();
        let freedom = bins.len() as f64 - 1.0;
        let spread = 2.0 / (9.0 * freedom);
        ((statistic / freedom).cbrt() - (1.0 - spread)) / spread.sqrt()
    }

    /// Kolmogorov's statistic, √n times the largest distance of the distribution functions.
    fn kolmogorov(&self, k: &[f64]) -> f64 {
        let mut counted = 0.0;
        let distance = |(count, below): (f64, &f64)| {
            counted += count;
            (counted / k.len() as f64 - below).abs()
        };
        let largest = self.count(k).into_iter().zip(&self.below).map(distance).fold(0.0, f64::max);
        largest * (k.len() as f64).sqrt()
    }
}

/// Mean, variance and fourth moment over the variance squared.
fn moments(k: &[f64]) -> (f64, f64, f64) {
    let n = k.len() as f64;
    let mean = k.iter().sum::<f64>() / n;
    let variance = k.iter().map(|k| (k - mean).powi(2)).sum::<f64>() / n;
    let fourth = k.iter().map(|k| (k - mean).powi(4)).sum::<f64>() / n;
    (mean, variance, fourth / variance.powi(2))
}

/// Standard score of the variance against spread² + 1/12, which rounding adds.
fn variance_score(k: &[f64], spread: f64) -> f64 {
    let expected = spread * spread + 1.0 / 12.0;
    (moments(k).1 / expected - 1.0) / (2.0 / k.len() as f64).sqrt()
}

#[test]
fn integers_follow_the_rounded_gaussian() {
    // Spread σ/g and shift S/g; the noise multiplier that gives the spread on a grid of 1.
    for (spread, shift, seed) in [("32", "0", 11), ("32", "0.375", 12), ("60", "-0.5", 13)] {
        let law = Law::read(spread, shift);
        let (spread, shift): (f64, f64) = (spread.parse().unwrap(), shift.parse().unwrap());
        let k = integers(&vec![shift; SAMPLES], spread, seed);
        let (mean, _, kurtosis) = moments(&k);
        let n = SAMPLES as f64;
        assert!((mean - shift).abs() < 4.0 * spread / n.sqrt(), "{spread} {shift}: mean {mean}");
        assert!(variance_score(&k, spread).abs() < 4.0, "{spread} {shift}");
        assert!((kurtosis - 3.0).abs() < 4.0 * (24.0 / n).sqrt(), "{spread} {shift}: {kurtosis}");
        for width in [1, 8] {
            let score = law.chi_square(&k, width);
            assert!(score.abs() < 4.0, "{spread} {shift}: chi-square {score} at width {width}");
        }
        let distance = law.kolmogorov(&k);
        assert!(distance < 2.0, "{spread} {shift}: Kolmogorov {distance}");
    }
}

#[test]
fn a_wrong_scale_fails_the_same_checks() {
    let law = Law::read("32", "0");
    let k = integers(&vec![0.0; SAMPLES], 32.0 * 1.003, 14);
    assert!(law.chi_square(&k, 1) > 4.0);
    assert!(law.chi_square(&k, 8) > 4.0);
    assert!(variance_score(&k, 32.0) > 4.0);
}

#[test]
fn tails_are_as_heavy_as_the_gaussian_ones() {
    let k = integers(&vec![0.0; SAMPLES], 32.0, 15);
    // Expected beyond 4, 5 and 6 σ of 2²³: 531, 4.8 and 0.02; k counts from the half integer.
    let beyond = |sigmas: f64| k.iter().filter(|k| k.abs() > 32.0 * sigmas).count();
    assert!((400..660).contains(&beyond(4.0)), "{}", beyond(4.0));
    assert!((1..15).contains(&beyond(5.0)), "{}", beyond(5.0));
    assert!(beyond(6.0) <= 1, "{}", beyond(6.0));
}

#[test]
fn samples_do_not_depend_on_each_other() {
    let k = integers(&vec![0.0; SAMPLES / 4], 32.0, 16);
    let (_, variance, _) = moments(&k);
    for lag in [1, 2, 3, 4, 5, 7, 8, 16, 1024] {
        let pairs = k.iter().zip(&k[lag..]);
        // Values, squares (the two of a Box–Muller pair share a radius) and signs with sizes.
        let (mut plain, mut square, mut mixed) = (0.0, 0.0, 0.0);
        for (a, b) in pairs {
            plain += a * b / variance;
            square += (a * a / variance - 1.0) * (b * b / variance - 1.0) / 2.0;
            mixed += a * (b * b / variance - 1.0) / (2.0 * variance).sqrt();
        }
        for score in [plain, square, mixed].map(|sum| sum / ((k.len() - lag) as f64).sqrt()) {
            assert!(score.abs() < 4.5, "lag {lag}: {plain} {square} {mixed}");
        }
    }
}

#[test]
fn equal_keys_give_equal_noise_and_others_none() {
    let zeros = vec![0.0; 4096];
    let first = integers(&zeros, 1.0, 1);
    assert_eq!(first, integers(&zeros, 1.0, 1));
    let other = integers(&zeros, 1.0, 2);
    let same = first.iter().zip(&other).filter(|(a, b)| a == b).count();
    // Two draws agree with probability about 1/(2 √π 32) = 0.9 %.
    assert!(same < 80, "{same}");
}

/// FNV-1a over the bits of releases of many lengths. One number for every CPU level: run it for others with the flags of
/// build.sh in RUSTFLAGS.
#[test]
fn bits_are_the_same_at_every_level() {
    let mut generator = Generator::new(&[7; 32]);
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for count in [1_u32, 7, 8, 9, 15, 16, 17, 1000, 1023, 1024, 1025, 1040, 5000, 100_003] {
        let sums: Vec<f64> = (0..count).map(|i| (f64::from(i) - 3.0) * 0.37).collect();
        let mut out = vec![0.0; sums.len()];
        let scale = Scale::new(1.3, 0.7, 256.0).unwrap();
        Noise::new(generator.fork()).release(&sums, &mut out, scale);
        for mean in &out {
            hash = (hash ^ u64::from(mean.to_bits())).wrapping_mul(0x0100_0000_01b3);
        }
    }
    assert_eq!(hash, 0x982a_5314_b349_35e5);
}
