//! How records keep their features (docs/image.md, "Features"), and float32 made of them.

use myelin_protocol::Refusal;
use myelin_protocol::cbor::Reader;

/// The features of a record, in the bytes that sealed files and the heap hold.
#[derive(Clone, Copy)]
pub enum Features {
    Float32,
    /// IEEE 754 binary16.
    Float16,
    /// The byte in millionths less `zero`, times `scale`.
    Uint8 {
        zero: i32,
        scale: f64,
    },
}

impl Features {
    /// Reads `type`, `unit` and `zero`.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, Refusal> {
        let kind = reader.key("type")?.text()?;
        let unit = reader.key("unit")?.unsigned()?;
        let zero = reader.key("zero")?.unsigned()?;
        match (kind, unit, i32::try_from(zero)) {
            ("float32", 0, Ok(0)) => Ok(Features::Float32),
            ("float16", 0, Ok(0)) => Ok(Features::Float16),
            ("uint8", 1.., Ok(zero)) => Ok(Features::Uint8 { zero, scale: 1.0 / unit as f64 }),
            _ => Err(Refusal::FieldWrong),
        }
    }

    /// Bytes of a feature.
    pub fn bytes(self) -> usize {
        match self {
            Features::Float32 => 4,
            Features::Float16 => 2,
            Features::Uint8 { .. } => 1,
        }
    }

    /// Makes floats of a record's features. No branch and no table on data.
    pub fn convert(self, from: &[u8], to: &mut [f32]) {
        match self {
            Features::Float32 => {
                for (to, from) in to.iter_mut().zip(from.as_chunks().0) {
                    *to = f32::from_le_bytes(*from);
                }
            }
            Features::Float16 => {
                for (to, from) in to.iter_mut().zip(from.as_chunks().0) {
                    *to = single(u16::from_le_bytes(*from));
                }
            }
            Features::Uint8 { zero, scale } => {
                for (to, from) in to.iter_mut().zip(from) {
                    let micro = i32::from(*from).wrapping_mul(1_000_000).wrapping_sub(zero);
                    *to = (f64::from(micro) * scale) as f32;
                }
            }
        }
    }
}

/// The float32 of a binary16, exact. Its subnormals are normal float32, and made without any: the
/// processor takes subnormal operands for zero.
fn single(half: u16) -> f32 {
    /// From exponent bias 15 to 127.
    const REBIAS: u32 = 112 << 23;
    const SMALLEST: f32 = 1.0 / 16_384.0;
    let sign = u32::from(half & 0x8000) << 16;
    let rest = u32::from(half & 0x7fff) << 13;
    let special = if rest < 0x0f80_0000 { 0 } else { REBIAS };
    let normal = rest.wrapping_add(REBIAS).wrapping_add(special);
    let subnormal = (f32::from_bits(rest | SMALLEST.to_bits()) - SMALLEST).to_bits();
    f32::from_bits(sign | if rest < 0x0080_0000 { subnormal } else { normal })
}

#[cfg(test)]
#[path = "../tests/unit/features.rs"]
mod tests;
