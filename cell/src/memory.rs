//! The address space of an image: its segments and the mailbox, nothing else for 64 GiB.

use crate::{
    elf::{Image, Rights},
    sys,
};
use libc::{PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, c_void};
use std::{io::Error, ptr};

pub const PAGE: usize = 4096;
pub const HUGE_PAGE: usize = 2 << 20;
pub const MAX_SLOTS: usize = 16;
/// Where an image starts.
pub const BASE: usize = 0x4000_0000;
/// Where the mailbox starts: a header page, then the body.
pub const MAILBOX: usize = 0x10_0000_0000;
pub const BODY: usize = MAILBOX + PAGE;
pub const BODY_BYTES: usize = 1 << 20;
pub const MAILBOX_BYTES: usize = PAGE + BODY_BYTES;
/// Inaccessible on both sides of everything.
const GUARD: usize = 64 << 10;

/// Maps the image at its addresses with its rights, and the mailbox. Whatever lies between is
/// reserved and inaccessible, so that nothing else ever gets there.
pub fn load(image: &Image) -> Result<(), String> {
    reserve(BASE - GUARD, MAILBOX + MAILBOX_BYTES + GUARD)?;
    for segment in &image.segments {
        let at = segment.memory.start;
        let bytes = segment.memory.len();
        protect(at, bytes, PROT_READ | PROT_WRITE)?;
        if bytes >= HUGE_PAGE {
            // Only a hint: speed is all that is lost where it fails.
            // SAFETY: the range is ours.
            unsafe { libc::madvise(at as *mut c_void, bytes, libc::MADV_HUGEPAGE) };
        }
        let content = &image.bytes[segment.file.clone()];
        // SAFETY: the range is ours, writable, and at least as long as its content (checked by
        // elf).
        unsafe { ptr::copy_nonoverlapping(content.as_ptr(), at as *mut u8, content.len()) };
        match segment.rights {
            Rights::Read => protect(at, bytes, PROT_READ)?,
            Rights::Execute => protect(at, bytes, PROT_READ | PROT_EXEC)?,
            Rights::Write => {}
        }
    }
    protect(MAILBOX, MAILBOX_BYTES, PROT_READ | PROT_WRITE)
}

fn reserve(start: usize, end: usize) -> Result<(), String> {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let wanted = start as *mut c_void;
    // SAFETY: FIXED_NOREPLACE touches no existing mapping.
    let got = unsafe { libc::mmap(wanted, end - start, PROT_NONE, flags, -1, 0) };
    if got != wanted {
        let error = Error::last_os_error();
        return Err(format!(
            "the addresses {start:#x}..{end:#x} cannot be reserved ({error}); is the address space \
             limited (ulimit -v)?"
        ));
    }
    Ok(())
}

fn protect(at: usize, bytes: usize, rights: i32) -> Result<(), String> {
    // SAFETY: only ranges inside the reservation are passed in.
    let result = unsafe { libc::mprotect(at as *mut c_void, bytes, rights) };
    sys::check(&format!("mapping {bytes:#x} bytes at {at:#x}"), result).map(drop)
}
