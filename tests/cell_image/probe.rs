//! A hostile enclave image: what it is asked by the first four bytes of a request (docs/image.md).
//! Built by tests/test_cell.py; it keeps the entry convention of the real runtime in the fewest
//! lines.
#![no_std]
#![allow(clippy::missing_safety_doc)]

use core::{
    arch::{asm, global_asm},
    panic::PanicInfo,
    ptr,
    sync::atomic::{AtomicU32, Ordering::SeqCst},
};

const MAILBOX: *mut u64 = 0x10_0000_0000 as *mut u64;
const BODY: *mut u8 = 0x10_0000_1000 as *mut u8;
const BODY_BYTES: u64 = 1 << 20;
const SLOTS: u32 = 2;

// Entry +0 process, +0x10 KVM; rdi is the slot. The first argument of `served` tells the gate.
global_asm!(
    ".section .text.entry,\"ax\"",
    ".global _enter",
    "_enter: xor esi, esi",
    "jmp 1f",
    ".balign 16",
    "mov esi, 1", // +0x10
    "jmp 1f",
    ".balign 16",
    "ud2", // +0x20: SGX, not here
    ".balign 16",
    "1: cmp rdi, 2",
    "jb 2f",
    "mov eax, 2",
    "jmp 3f",
    "2: mov r12, rsp",
    "mov r13, rdi",
    "mov r14, rsi",
    "lea rax, [rip + __stack_tops]",
    "mov rsp, [rax + rdi*8]",
    "mov rsi, r12",
    "call served",
    "mov rsp, r12",
    "mov rdi, r13",
    "mov rsi, r14",
    "3: xor ebx, ebx",
    "xor ebp, ebp",
    "xor r12d, r12d",
    "xor r13d, r13d",
    "xor r14d, r14d",
    "xor r15d, r15d",
    "test esi, esi",
    "jnz 4f",
    "ret",
    "4: mov edx, 0x10",
    "out dx, al",
    "jmp _enter + 0x10",
);

unsafe extern "C" {
    static __heap: [*mut u8; 2]; // start and end
}

static READ_ONLY: AtomicBytes = AtomicBytes([7; 64]);
static FIRST_INSIDE: AtomicU32 = AtomicU32::new(0);
static HELPERS: AtomicU32 = AtomicU32::new(0);

#[repr(transparent)]
struct AtomicBytes([u8; 64]);
unsafe impl Sync for AtomicBytes {}

#[unsafe(no_mangle)]
extern "C" fn served(slot: u32, host_stack: *const *const u8) -> u32 {
    if slot == 0 {
        FIRST_INSIDE.store(1, SeqCst);
        let code = unsafe { obey(host_stack) };
        FIRST_INSIDE.store(0, SeqCst);
        return code;
    }
    let mut arrived = false;
    while FIRST_INSIDE.load(SeqCst) == 1 {
        if !arrived {
            HELPERS.fetch_add(1, SeqCst);
            arrived = true;
        }
        core::hint::spin_loop();
    }
    if arrived {
        HELPERS.fetch_sub(1, SeqCst);
    }
    1
}

unsafe fn obey(host_stack: *const *const u8) -> u32 {
    unsafe {
        let bytes = MAILBOX.read_volatile();
        let operation = BODY.cast::<u32>().read_volatile();
        let argument = BODY.add(4).cast::<u64>().read_unaligned();
        BODY.cast::<u32>().write_volatile(0);
        MAILBOX.add(1).write_volatile(bytes); // echo, unless it says otherwise
        match operation {
            0 => {}
            1 => refuse(),
            2 => spin(),
            3 => while HELPERS.load(SeqCst) + 1 < SLOTS {},
            4 => heap_ends(),
            5 => asm!("vpbroadcastq ymm0, [{0}]", "vmovdqu [{0}], ymm0", in(reg) BODY.add(4)),
            6 => asm!("vpbroadcastq zmm0, [{0}]", "vmovdqu64 [{0}], zmm0", in(reg) BODY.add(4)),
            7 => {
                FIRST_INSIDE.store(0, SeqCst); // the others find nothing to do
                spin()
            }
            8 => through_a_tile(),
            10 => argument_of(argument, |at| ptr::write_volatile(at, 1)),
            11 => argument_of(argument, |at| _ = ptr::read_volatile(at)),
            12 => ptr::write_volatile(served as *mut u8, 1),
            13 => ptr::write_volatile(READ_ONLY.0.as_ptr().cast_mut(), 1),
            14 => execute(__heap[0]),
            15 => execute(BODY.add(64)),
            16 => overflow(argument),
            17 => asm!("ud2"),
            18 => asm!("hlt"),
            19 => asm!("in al, 0x60", out("al") _),
            20 => asm!("out 0x80, al", in("al") 0u8),
            21 => asm!("int3"),
            // getppid; a write to the host, permitted but not from here; getpid of 32-bit programs
            30 => system_call(110, 0, 0, 0),
            31 => system_call(1, 1, BODY as usize, 4),
            32 => asm!("int 0x80", inout("eax") 20 => _),
            33 => asm!("sysenter"),
            34 => borrowed(host_stack, argument as usize, 0),
            35 => borrowed(host_stack, 231, argument as usize), // exit_group is permitted
            40 => return 0xff,
            41 => return 0x77,
            42 => MAILBOX.add(1).write_volatile(BODY_BYTES + 1),
            43 => MAILBOX.add(1).write_volatile(u64::MAX),
            44 => MAILBOX.add(1).write_volatile(3),
            45 => borrowed_write(host_stack, &[0xf0, 0xff, 0xff, 0xff]), // an absurd frame length
            46 => borrowed_write(
                host_stack,
                &[0xff, 0xff, 0xff, 0xff, b'l', 0x1b, b'[', b'2', b'J', 0xff],
            ),
            _ => refuse(),
        }
    }
    0
}

unsafe fn argument_of(address: u64, f: impl Fn(*mut u8)) {
    f(address as *mut u8)
}

unsafe fn refuse() {
    unsafe {
        BODY.cast::<u32>().write_volatile(1);
        for (i, &byte) in b"operation-unknown".iter().enumerate() {
            BODY.add(4 + i).write_volatile(byte);
        }
        MAILBOX.add(1).write_volatile(4 + 17);
    }
}

fn spin() {
    loop {
        core::hint::spin_loop();
    }
}

/// Touches both ends of the heap, which must be zero.
unsafe fn heap_ends() {
    unsafe {
        for at in [__heap[0], __heap[1].sub(1)] {
            if ptr::read_volatile(at) != 0 {
                return refuse();
            }
            ptr::write_volatile(at, 1);
        }
    }
}

/// Copies the argument to behind itself by a tile register of one row of 8 bytes.
unsafe fn through_a_tile() {
    let mut shape = [0u8; 64];
    shape[0] = 1; // palette
    shape[16] = 8; // bytes of a row of tile 0, in 16 bits
    shape[48] = 1; // its rows
    unsafe {
        asm!("ldtilecfg [{shape}]", "tileloadd tmm0, [{body} + {stride}]",
             "tilestored [{body} + {stride} + 8], tmm0", "tilerelease",
             shape = in(reg) shape.as_ptr(), body = in(reg) BODY.add(4), stride = in(reg) 0usize);
    }
}

unsafe fn execute(at: *mut u8) {
    unsafe {
        ptr::write_volatile(at, 0xc3); // ret
        asm!("call {}", in(reg) at, clobber_abi("C"));
    }
}

/// Runs off the end of the stack, a page at a time.
#[inline(never)]
fn overflow(depth: u64) -> () {
    let mut frame = [0u8; 4096];
    unsafe { ptr::write_volatile(frame.as_mut_ptr(), depth as u8) };
    if depth < 1 << 40 {
        overflow(depth + 1);
    }
    unsafe { ptr::read_volatile(frame.as_ptr()) };
}

unsafe fn system_call(number: usize, a: usize, b: usize, c: usize) {
    unsafe {
        asm!("syscall", inout("rax") number => _, in("rdi") a, in("rsi") b, in("rdx") c,
             out("rcx") _, out("r11") _);
    }
}

/// Makes a system call by the cell's own instruction: the host's stack holds an address in the
/// cell's text, and `mov r10, r8; syscall; ret` lies near it.
unsafe fn borrowed(host_stack: *const *const u8, number: usize, a: usize) {
    unsafe { call_at(gate(host_stack), number, a, 0, 0) }
}

unsafe fn borrowed_write(host_stack: *const *const u8, frame: &[u8]) {
    unsafe {
        call_at(gate(host_stack), 1, 1, frame.as_ptr() as usize, frame.len());
        spin();
    }
}

unsafe fn call_at(at: *const u8, number: usize, a: usize, b: usize, c: usize) {
    unsafe {
        asm!("call {at}", at = in(reg) at, inout("rax") number => _, in("rdi") a, in("rsi") b,
             in("rdx") c, in("r8") 0, out("rcx") _, out("r11") _, out("r10") _);
    }
}

unsafe fn gate(host_stack: *const *const u8) -> *const u8 {
    const GATE: [u8; 6] = [0x4d, 0x89, 0xc2, 0x0f, 0x05, 0xc3];
    unsafe {
        let near = *host_stack;
        let mut distance = 0;
        loop {
            for at in [near.wrapping_add(distance), near.wrapping_sub(distance)] {
                if (0..6).all(|i| ptr::read_volatile(at.add(i)) == GATE[i]) {
                    return at;
                }
            }
            distance += 1;
        }
    }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}
