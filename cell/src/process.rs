//! The process backend: a thread enters the image by a plain call and comes back by `ret`.

use crate::{elf::Image, memory::BASE, serve::Slot};
use std::arch::global_asm;

// The image comes back with every register but rax cleared, callee-saved ones included.
global_asm!(
    ".global cell_enter",
    "cell_enter:", // (entry, slot) -> code
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "mov rax, rdi",
    "mov rdi, rsi",
    "call rax",
    "cld",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn cell_enter(entry: usize, slot: usize) -> u32;
}

/// A thread slot of the image that is mapped in this process.
pub struct Thread(usize);

/// One for every donated thread.
pub fn slots(_loaded: &Image, threads: usize) -> Vec<Thread> {
    (0..threads).map(Thread).collect()
}

impl Slot for Thread {
    fn enter(&mut self) -> u32 {
        // SAFETY: the image is mapped, its entry is executable (checked by elf), and it switches to
        // its own stack. A hostile image can do anything to this process; the filter
        // confines the process.
        unsafe { cell_enter(BASE, self.0) }
    }
}
