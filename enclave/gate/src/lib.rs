//! Entry, threads, memory and processor of the enclave: all of its unsafe code. Every module says what it relies on.
// The image is built to abort; test harnesses unwind and have a panic handler of their own.
#![cfg(panic = "abort")]
#![no_std]

mod entry;
mod machine;
mod mailbox;
mod memory;
mod threads;

use core::cell::UnsafeCell;

/// Memory that one owner at a time uses; each `get` says why it is the only one.
#[repr(C, align(64))]
struct Owned<T>(UnsafeCell<T>);

// SAFETY: `get` is unsafe and its callers show that no other thread uses the value.
unsafe impl<T> Sync for Owned<T> {}

impl<T> Owned<T> {
    const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value.
    ///
    /// # Safety
    /// No other reference to it may exist.
    #[allow(clippy::mut_from_ref, reason = "the caller shows that the reference is the only one")]
    unsafe fn get(&self) -> &mut T {
        // SAFETY: the pointer comes from the cell itself; the caller shows that it is not aliased.
        unsafe { &mut *self.0.get() }
    }
}

/// What a linker-script table (docs/image.md) holds between two symbols.
///
/// # Safety
/// `start` and `end` are the symbols of one table of `T`, written at link time and never changed.
unsafe fn table<T>(start: &'static T, end: &'static T) -> &'static [T] {
    let (start, end) = (&raw const *start, &raw const *end);
    // SAFETY: the caller names both ends of one read-only array of `T`.
    unsafe { core::slice::from_raw_parts(start, (end.addr() - start.addr()) / size_of::<T>()) }
}
