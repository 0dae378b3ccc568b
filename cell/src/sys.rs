//! The few system calls that remain once the cell is locked, through one `syscall` instruction, and
//! what is switched off before anything of the image is mapped.

use libc::{c_int, c_long};
use std::{
    arch::global_asm,
    fmt::{self, Write},
    io::Error,
    sync::atomic::AtomicU32,
};

/// Starts the last words of a cell where a frame length is expected.
const LAST_WORDS: u32 = u32::MAX;

// The only instruction that may make a system call in a locked process cell: the filter compares
// the return address with `cell_syscall_return`.
global_asm!(
    ".global cell_syscall",
    "cell_syscall:", // (number, a, b, c, d)
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "syscall",
    ".global cell_syscall_return",
    "cell_syscall_return:",
    "ret",
);

unsafe extern "C" {
    fn cell_syscall(number: c_long, a: usize, b: usize, c: usize, d: usize) -> isize;
    fn cell_syscall_return();
}

/// The address that the kernel sees as instruction pointer of every permitted call.
pub fn gate() -> u64 {
    cell_syscall_return as *const () as u64
}

/// Reads from the host into memory that may be the mailbox. Returns the bytes read, 0 at the end.
///
/// # Safety
/// `at..at + bytes` must be writable and not otherwise in use.
pub unsafe fn read(at: *mut u8, bytes: usize) -> Result<usize, i32> {
    // SAFETY: the caller vouches for the buffer.
    let got = unsafe { cell_syscall(libc::SYS_read, 0, at as usize, bytes, 0) };
    usize::try_from(got).map_err(|_| -got as i32)
}

/// Writes everything to the host.
///
/// # Safety
/// `at..at + bytes` must be readable.
pub unsafe fn write(mut at: *const u8, mut bytes: usize) -> Result<(), i32> {
    while bytes > 0 {
        // SAFETY: the caller vouches for the buffer.
        let sent = unsafe { cell_syscall(libc::SYS_write, 1, at as usize, bytes, 0) };
        let sent = usize::try_from(sent).map_err(|_| -sent as i32)?;
        // SAFETY: the kernel took `sent` of the `bytes` that the caller vouches for.
        at = unsafe { at.add(sent) };
        bytes -= sent;
    }
    Ok(())
}

/// Sleeps while `word` holds `value`, for `most` at most where given; may wake for no reason.
pub fn wait(word: &AtomicU32, value: u32, most: Option<&libc::timespec>) {
    let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word and the time outlive the call, which only reads them.
    unsafe {
        cell_syscall(
            libc::SYS_futex,
            word.as_ptr() as usize,
            op as usize,
            value as usize,
            most.map_or(0, |most| &raw const *most as usize),
        )
    };
}

/// Wakes every thread that sleeps on `word`.
pub fn wake(word: &AtomicU32) {
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    let all = c_int::MAX as usize;
    // SAFETY: the word is only an address here.
    unsafe { cell_syscall(libc::SYS_futex, word.as_ptr() as usize, op as usize, all, 0) };
}

/// Ends the cell.
pub fn exit(status: i32) -> ! {
    loop {
        // SAFETY: no memory is involved, and the call does not return.
        unsafe { cell_syscall(libc::SYS_exit_group, status as usize, 0, 0, 0) };
    }
}

/// Tells the host why, then ends the cell. Allocates nothing: a locked cell cannot get memory.
pub fn die(reason: fmt::Arguments<'_>) -> ! {
    let mut words = Words {
        bytes: [0; 1024],
        used: 4,
    };
    words.bytes[..4].copy_from_slice(&LAST_WORDS.to_le_bytes());
    let _ = words.write_fmt(reason); // what does not fit is left out
    // SAFETY: the buffer is ours. If the host is gone, nobody is left to tell.
    let _ = unsafe { write(words.bytes.as_ptr(), words.used) };
    exit(1)
}

struct Words {
    bytes: [u8; 1024],
    used: usize,
}

impl Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.used..];
        let taken = room.len().min(text.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.used += taken;
        Ok(())
    }
}

/// Turns off core dumps, ptrace, inherited files, new privileges and life after the host.
pub fn harden() -> Result<(), String> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: plain calls; `none` outlives its call. std uses no file above 2 yet.
    unsafe {
        // The host's thread that started the cell must live as long: it is the "parent" here.
        check(
            "PR_SET_PDEATHSIG",
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL),
        )?;
        check("PR_SET_DUMPABLE", libc::prctl(libc::PR_SET_DUMPABLE, 0))?;
        check(
            "PR_SET_NO_NEW_PRIVS",
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        )?;
        check("RLIMIT_CORE", libc::setrlimit(libc::RLIMIT_CORE, &none))?;
        let closed = libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        check("close_range (Linux 5.9 or newer)", closed as c_int)?;
        // std's handlers make system calls, which would turn a fault into a forbidden call.
        libc::signal(libc::SIGSEGV, libc::SIG_DFL);
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
    Ok(())
}

/// Turns a C result below zero into an error that names the step.
pub fn check(step: &str, result: c_int) -> Result<c_int, String> {
    if result < 0 {
        Err(format!("{step} failed: {}", Error::last_os_error()))
    } else {
        Ok(result)
    }
}
