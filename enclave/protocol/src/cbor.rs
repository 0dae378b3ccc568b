//! Deterministic CBOR (RFC 8949 §4.2.1): a strict reader over `minicbor`, and its encoder.

use minicbor::data::Type;
use minicbor::decode;
use minicbor::encode::write::{Cursor, EndOfSlice};
use minicbor::{Decoder, Encoder, encode};

use crate::Refusal;

/// Writes deterministic CBOR into a slice; callers give map keys in canonical order.
pub type Writer<'a> = Encoder<Cursor<&'a mut [u8]>>;

/// A writer at the start of `out`.
pub fn writer(out: &mut [u8]) -> Writer<'_> {
    Encoder::new(Cursor::new(out))
}

/// Reads deterministic CBOR and refuses everything else.
///
/// Map keys are given by the caller in canonical order, so unknown, missing, repeated and
/// reordered keys all fail as `field-wrong`.
pub struct Reader<'b> {
    decoder: Decoder<'b>,
}

impl<'b> Reader<'b> {
    /// A reader at the start of `bytes`.
    pub fn new(bytes: &'b [u8]) -> Self {
        Reader { decoder: Decoder::new(bytes) }
    }

    /// Reads one whole document: whatever `read` reads, and no byte more.
    pub fn document<T>(
        bytes: &'b [u8],
        read: impl FnOnce(&mut Self) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut reader = Reader::new(bytes);
        let value = read(&mut reader)?;
        if reader.decoder.position() == bytes.len() {
            Ok(value)
        } else {
            Err(Refusal::CborMalformed)
        }
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.decoder.position()
    }

    /// An unsigned integer.
    pub fn unsigned(&mut self) -> Result<u64, Refusal> {
        let start = self.decoder.position();
        let value = self.decoder.u64()?;
        self.canonical(start, value, 0)?;
        Ok(value)
    }

    /// An unsigned integer of at most 32 bits.
    pub fn unsigned32(&mut self) -> Result<u32, Refusal> {
        u32::try_from(self.unsigned()?).map_err(|_| Refusal::FieldWrong)
    }

    /// A byte string.
    pub fn bytes(&mut self) -> Result<&'b [u8], Refusal> {
        let start = self.decoder.position();
        let value = self.decoder.bytes()?;
        self.canonical(start, value.len() as u64, value.len())?;
        Ok(value)
    }

    /// A byte string of exactly `N` bytes.
    pub fn fixed<const N: usize>(&mut self) -> Result<&'b [u8; N], Refusal> {
        self.bytes()?.try_into().map_err(|_| Refusal::FieldWrong)
    }

    /// A text string.
    pub fn text(&mut self) -> Result<&'b str, Refusal> {
        let start = self.decoder.position();
        let value = self.decoder.str()?;
        self.canonical(start, value.len() as u64, value.len())?;
        Ok(value)
    }

    /// The head of an array of at most `most` items; gives their number.
    pub fn list(&mut self, most: usize) -> Result<usize, Refusal> {
        let start = self.decoder.position();
        let count = self.decoder.array()?.ok_or(Refusal::CborNotCanonical)?;
        self.canonical(start, count, 0)?;
        match usize::try_from(count) {
            Ok(count) if count <= most => Ok(count),
            _ => Err(Refusal::LimitExceeded),
        }
    }

    /// The head of a map of exactly `count` entries.
    pub fn map(&mut self, count: u64) -> Result<(), Refusal> {
        let start = self.decoder.position();
        let found = self.decoder.map()?.ok_or(Refusal::CborNotCanonical)?;
        self.canonical(start, found, 0)?;
        if found == count { Ok(()) } else { Err(Refusal::FieldWrong) }
    }

    /// The map key `name`.
    pub fn key(&mut self, name: &str) -> Result<&mut Self, Refusal> {
        if self.text()? == name { Ok(self) } else { Err(Refusal::FieldWrong) }
    }

    /// The document type `name`, a text value.
    pub fn kind(&mut self, name: &str) -> Result<(), Refusal> {
        if self.text()? == name { Ok(()) } else { Err(Refusal::TypeWrong) }
    }

    /// `None` for null, else what `read` reads.
    pub fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Refusal>,
    ) -> Result<Option<T>, Refusal> {
        if self.decoder.datatype()? == Type::Null {
            self.decoder.null()?;
            return Ok(None);
        }
        read(self).map(Some)
    }

    /// The bytes of one item, which stays unread: the reader goes past it.
    pub fn skip(&mut self) -> Result<&'b [u8], Refusal> {
        let start = self.decoder.position();
        self.decoder.skip()?;
        let end = self.decoder.position();
        self.decoder.input().get(start..end).ok_or(Refusal::CborMalformed)
    }

    /// Checks that the head read since `start` with argument `value` and `payload` bytes after it
    /// had its shortest form.
    fn canonical(&self, start: usize, value: u64, payload: usize) -> Result<(), Refusal> {
        let shortest = match value {
            0..=23 => 1,
            24..=0xff => 2,
            0x100..=0xffff => 3,
            0x1_0000..=0xffff_ffff => 5,
            _ => 9,
        };
        let read = self.decoder.position().checked_sub(start).and_then(|n| n.checked_sub(payload));
        if read == Some(shortest) { Ok(()) } else { Err(Refusal::CborNotCanonical) }
    }
}

impl From<decode::Error> for Refusal {
    fn from(error: decode::Error) -> Self {
        if error.is_type_mismatch() { Refusal::FieldWrong } else { Refusal::CborMalformed }
    }
}

impl From<encode::Error<EndOfSlice>> for Refusal {
    fn from(_: encode::Error<EndOfSlice>) -> Self {
        Refusal::MessageTooLong
    }
}
