//! The way in (entry.s), the threads' states and the way to die.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::{mailbox, table, threads};

/// Codes that a thread leaves with.
pub const DONE: u32 = 0;
pub const IDLE: u32 = 1;
const DEAD_CODE: u32 = 0xff;

/// Most thread slots an image may have.
pub const SLOTS: usize = 16;

/// Bytes of a slot's stack (image.ld).
const STACK: usize = 0x4_0000;

/// One for ever after a panic: no slot is entered again, nothing is written to the mailbox.
static DEAD: AtomicU32 = AtomicU32::new(0);

/// MXCSR inside: exceptions masked, subnormals flushed (FTZ, DAZ), as the kernels expect. Outside: the ABI's default.
static MXCSR_INSIDE: u32 = 0x9fc0;
static MXCSR_OUTSIDE: u32 = 0x1f80;

/// State of the slots, used by entry.s alone: busy, host's rsp, host's rcx, way out.
#[repr(C, align(64))]
struct Slot(UnsafeCell<[u64; 8]>);
// SAFETY: entry.s alone reads and writes it, a slot's words only between taking and freeing its busy word.
unsafe impl Sync for Slot {}
static STATES: [Slot; SLOTS] = [const { Slot(UnsafeCell::new([0; 8])) }; SLOTS];

global_asm!(
    include_str!("entry.s"),
    slots = const SLOTS,
    avx512 = const cfg!(target_feature = "avx512f") as u32,
    dead = sym DEAD,
    table = sym STATES,
    mxcsr_inside = sym MXCSR_INSIDE,
    mxcsr_outside = sym MXCSR_OUTSIDE,
    main = sym run,
);

/// What a thread does inside, on its slot's stack.
extern "C" fn run(slot: usize) -> u32 {
    if slot == 0 {
        threads::main(mailbox::serve);
        DONE
    } else if threads::serve() {
        // Not where no task came: nothing was left, and idle threads come often.
        wipe_stack();
        DONE
    } else {
        IDLE
    }
}

/// True after a panic anywhere.
pub fn dead() -> bool {
    DEAD.load(SeqCst) != 0
}

/// Ends the enclave: this thread leaves with 0xff, its slot stays taken, the others leave when they see it.
pub fn die() -> ! {
    DEAD.store(1, SeqCst);
    let state = STATES.get(slot()).map_or(core::ptr::null(), |state| state.0.get());
    // SAFETY: `_leave` expects this thread's slot in rbx and the code in edi, uses no stack and never returns.
    unsafe {
        asm!("mov rbx, {state}", "jmp _leave", state = in(reg) state, in("edi") DEAD_CODE, options(noreturn))
    }
}

/// The slot of this thread. Its stack pointer says so: it lies below exactly one top, the first above it.
pub fn slot() -> usize {
    let stack: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) };
    stack_tops().iter().take_while(|top| **top < stack).count()
}

/// Zeroes this thread's stack below the frame of the caller, where finished calls may have left secrets.
#[inline(never)]
pub fn wipe_stack() {
    let bottom = stack_tops().get(slot()).map_or(usize::MAX, |top| *top as usize - STACK);
    // SAFETY: from the end of the stack up to this frame, whose last 128 bytes (the red zone) are left out; nothing
    // that lives is there.
    unsafe {
        asm!("lea rcx, [rsp - 128]", "sub rcx, rdi", "cmovb rcx, rax", "rep stosb",
            out("rcx") _, inout("rdi") bottom => _, in("rax") 0usize, options(nostack));
    }
}

/// Number of thread slots.
pub fn slots() -> usize {
    stack_tops().len()
}

/// Tops of the slots' stacks, in rising order.
fn stack_tops() -> &'static [u64] {
    unsafe extern "C" {
        static __stack_tops: u64;
        static __stack_tops_end: u64;
    }
    // SAFETY: the linker script writes this table.
    unsafe { table(&__stack_tops, &__stack_tops_end) }
}

/// A panic is a broken promise of this code: nothing inside can be trusted after it.
#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    die()
}
