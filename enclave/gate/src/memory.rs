//! The five memory functions that compilers call, and copies that they cannot see through. In assembly: written in
//! Rust, the compiler would turn them into calls of themselves.

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::ptr;

/// Copies `words` words. The compiler cannot merge it with what follows, so untrusted memory is read exactly once.
///
/// # Safety
/// Both are valid for `words` words and do not overlap.
pub unsafe fn copy_words(to: *mut u64, from: *const u64, words: usize) {
    // SAFETY: as the caller promises; the direction flag is clear by the ABI.
    unsafe {
        asm!("rep movsq", inout("rcx") words => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
}

/// Zeroes `bytes`, whatever the compiler thinks of their use.
pub fn wipe(bytes: &mut [u8]) {
    // SAFETY: writes exactly the slice.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes.len() => _, inout("rdi") bytes.as_mut_ptr() => _, in("al") 0u8,
            options(nostack, preserves_flags));
    }
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: as in C.
    unsafe {
        asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: as in C; a forward copy never reads what it wrote.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: as in C; backwards from the last byte, then the direction flag as the ABI wants it.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") count => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _, options(nostack));
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: as in C.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    let (left, right): (u32, u32);
    // SAFETY: as in C; stops at the first bytes that differ. Registers start equal for the case of no bytes.
    unsafe {
        asm!("xor eax, eax", "xor edx, edx", "test rcx, rcx", "jz 2f", "repe cmpsb",
            "movzx eax, byte ptr [rsi - 1]", "movzx edx, byte ptr [rdi - 1]", "2:",
            inout("rcx") count => _, inout("rsi") a => _, inout("rdi") b => _,
            out("eax") left, out("edx") right, options(nostack, readonly));
    }
    left as i32 - right as i32
}

/// # Safety
/// As in C.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: as in C.
    unsafe { memcmp(a, b, count) }
}

/// There is no heap to allocate from. Crates that mention one must link, and nothing that runs may ask: it would die.
struct NoHeap;

// SAFETY: it never hands out memory, which the contract allows, so nothing comes back either.
unsafe impl GlobalAlloc for NoHeap {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        ptr::null_mut()
    }
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static NO_HEAP: NoHeap = NoHeap;
