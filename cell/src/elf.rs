//! Reads an enclave image and refuses everything that docs/image.md does not describe.

use crate::memory::{BASE, MAILBOX, PAGE};
use std::{fs, ops::Range, path::Path};

const MAX_FILE: u64 = 256 << 20;
const PT_LOAD: u32 = 1;
const PT_GNU_STACK: u32 = 0x6474_e551;
/// The gates of the entry: process, KVM, SGX.
const ENTRY_BYTES: usize = 0x30;

/// What a segment may be used for. There is no writable and executable one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rights {
    Read,
    Execute,
    Write,
}

/// One loadable segment; its memory is whole pages, and zero beyond the file's bytes.
#[derive(Debug)]
pub struct Segment {
    pub memory: Range<usize>,
    pub file: Range<usize>,
    pub rights: Rights,
}

/// A checked image.
#[derive(Debug)]
pub struct Image {
    pub bytes: Vec<u8>,
    pub segments: Vec<Segment>,
}

impl Image {
    pub fn read(path: &Path) -> Result<Self, String> {
        let problem = |e| format!("the image {} cannot be read: {e}", path.display());
        let bytes = fs::metadata(path).map_err(problem)?.len();
        if bytes > MAX_FILE {
            return Err(format!("the image has {bytes} bytes, more than {MAX_FILE}"));
        }
        Self::parse(fs::read(path).map_err(problem)?).map_err(|e| format!("image refused: {e}"))
    }

    fn parse(bytes: Vec<u8>) -> Result<Self, String> {
        let file = File(&bytes);
        if file.0.get(..7) != Some(b"\x7fELF\x02\x01\x01") {
            return Err("not a 64-bit little-endian ELF file".into());
        }
        let kind = (file.u16(16)?, file.u16(18)?);
        if kind != (2, 62) {
            return Err(format!(
                "not a static x86-64 executable (type, machine: {kind:?})"
            ));
        }
        if file.usize(24)? != BASE {
            return Err(format!("entry at {:#x}, not at {BASE:#x}", file.usize(24)?));
        }
        let (start, size, count) = (file.usize(32)?, file.u16(54)?, file.u16(56)?);
        if size != 56 || !(1..=64).contains(&count) {
            return Err(format!(
                "{count} program headers of {size} bytes, not 1 to 64 of 56"
            ));
        }
        let mut segments: Vec<Segment> = Vec::new();
        for index in 0..usize::from(count) {
            let at = index.checked_mul(56).and_then(|o| o.checked_add(start));
            let at = at.ok_or("program headers lie outside the file")?;
            let Some(segment) = file.segment(index, at)? else {
                continue;
            };
            let free = segments.last().map_or(BASE, |s| s.memory.end);
            if segment.memory.start < free {
                return Err(format!(
                    "segment {index} at {:#x} overlaps or precedes what lies below {free:#x}",
                    segment.memory.start
                ));
            }
            segments.push(segment);
        }
        let entry = BASE..BASE + ENTRY_BYTES;
        if !segments.first().is_some_and(|s| {
            s.rights == Rights::Execute && s.memory.start == BASE && s.file.len() >= entry.len()
        }) {
            return Err(format!(
                "no executable segment holds the entry gates {entry:#x?}"
            ));
        }
        Ok(Self { bytes, segments })
    }
}

struct File<'a>(&'a [u8]);

impl File<'_> {
    /// The loadable segment of the program header at `at`, if it is one and is not empty.
    fn segment(&self, index: usize, at: usize) -> Result<Option<Segment>, String> {
        let (kind, flags) = (self.u32(at)?, self.u32(at + 4)?);
        let (offset, address) = (self.usize(at + 8)?, self.usize(at + 16)?);
        let (file_bytes, memory_bytes) = (self.usize(at + 32)?, self.usize(at + 40)?);
        match kind {
            PT_LOAD if memory_bytes == 0 && file_bytes == 0 => return Ok(None),
            PT_LOAD => {}
            PT_GNU_STACK if flags & 1 == 0 => return Ok(None),
            PT_GNU_STACK => return Err("it asks for an executable stack".into()),
            _ => {
                return Err(format!(
                    "segment {index} is of type {kind:#x}, not loadable"
                ));
            }
        }
        let rights = match flags {
            4 => Rights::Read,
            5 => Rights::Execute,
            6 => Rights::Write,
            7 => return Err(format!("segment {index} is writable and executable")),
            _ => {
                return Err(format!(
                    "segment {index} has rights {flags:#x}, not r--, r-x or rw-"
                ));
            }
        };
        let file_end = offset
            .checked_add(file_bytes)
            .filter(|&end| end <= self.0.len());
        let file_end =
            file_end.ok_or_else(|| format!("segment {index} reaches beyond the file"))?;
        if file_bytes > memory_bytes {
            return Err(format!(
                "segment {index} has more bytes in the file than in memory"
            ));
        }
        let end = address
            .checked_add(memory_bytes)
            .and_then(|e| e.checked_next_multiple_of(PAGE));
        let end = end.filter(|&end| address >= BASE && end <= MAILBOX - PAGE);
        let end = end.ok_or_else(|| {
            format!(
                "segment {index} at {address:#x} with {memory_bytes:#x} bytes lies outside \
                 {BASE:#x}..{MAILBOX:#x}"
            )
        })?;
        if address % PAGE != 0 {
            return Err(format!(
                "segment {index} at {address:#x} does not start on a page"
            ));
        }
        Ok(Some(Segment {
            memory: address..end,
            file: offset..file_end,
            rights,
        }))
    }

    fn field<const N: usize>(&self, at: usize) -> Result<[u8; N], String> {
        let bytes = at.checked_add(N).and_then(|end| self.0.get(at..end));
        bytes
            .and_then(|b| b.try_into().ok())
            .ok_or_else(|| "its headers are cut short".into())
    }

    fn u16(&self, at: usize) -> Result<u16, String> {
        self.field(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        self.field(at).map(u32::from_le_bytes)
    }

    fn usize(&self, at: usize) -> Result<usize, String> {
        self.field(at).map(usize::from_le_bytes)
    }
}
