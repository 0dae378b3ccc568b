#![allow(clippy::arithmetic_side_effects, reason = "a test fails by panic")]

extern crate std;

use super::*;

/// The number that IEEE 754 says a binary16 is.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * 2f64.powi(-24),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * 2f64.powi(exponent - 25),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

#[test]
fn every_half_is_what_the_standard_says() {
    for bits in 0..=u16::MAX {
        let mut found = [7.0];
        Features::Float16.convert(&bits.to_le_bytes(), &mut found);
        let expected = half(bits) as f32;
        let same = found[0].to_bits() == expected.to_bits();
        assert!(same || found[0].is_nan() && expected.is_nan(), "{bits:#x}: {}", found[0]);
    }
}

#[test]
fn every_byte_is_the_nearest_float_to_its_ratio() {
    for (unit, zero) in [(255_000_000, 0), (127_500_000, 127_500_000), (90_024_001, 72_940_351)] {
        let features = Features::Uint8 { zero, scale: 1.0 / f64::from(unit) };
        let bytes: [u8; 256] = core::array::from_fn(|i| i as u8);
        let mut found = [0.0; 256];
        features.convert(&bytes, &mut found);
        for (byte, found) in bytes.iter().zip(found) {
            // Exact in integers: the distance to the ratio, times `unit`, of it and both neighbours.
            let exact = i64::from(*byte) * 1_000_000 - i64::from(zero);
            let off = |x: f32| (f64::from(x) * f64::from(unit) - exact as f64).abs();
            assert!(off(found) <= off(found.next_up()), "{byte} {unit} {zero}: {found}");
            assert!(off(found) <= off(found.next_down()), "{byte} {unit} {zero}: {found}");
        }
    }
}
