//! The seccomp filter: system calls by number and argument; everything else kills the process.
//!
//! An image in the process backend shares the cell's address space and can reach the cell's own
//! `syscall` instruction, so number and argument are what confines it. The instruction-pointer rule
//! on top shows that an image makes no system calls of its own, not even permitted ones.

use crate::sys;
use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, FUTEX_PRIVATE_FLAG, FUTEX_WAIT,
    FUTEX_WAKE, SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS, SYS_exit_group, SYS_futex, SYS_ioctl,
    SYS_read, SYS_write, c_long, sock_filter, sock_fprog,
};

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_GET_SREGS: u32 = 0x8138_ae83;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const INSTRUCTION_POINTER: u32 = 8;
const ARGUMENTS: u32 = 16;

/// A permitted call: its number, and the value of one argument. The kernel reads descriptors, futex
/// operations, ioctl requests and exit statuses as 32 bits, and so does the filter.
type Rule = (c_long, Option<(u32, u32)>);

/// What a cell may do once an image runs.
pub struct Policy {
    rules: &'static [Rule],
    one_instruction: bool,
}

/// An image runs in this process: the cell's calls all come from one instruction.
pub const PROCESS: Policy = Policy {
    rules: &FRAMES,
    one_instruction: true,
};

/// An image runs in a virtual machine: also what runs a vCPU and explains its end. No instruction
/// of the image runs in this process.
pub const KVM: Policy = Policy {
    rules: &[
        FRAMES[0],
        FRAMES[1],
        FRAMES[2],
        FRAMES[3],
        FRAMES[4],
        (SYS_ioctl, Some((1, KVM_RUN))),
        (SYS_ioctl, Some((1, KVM_GET_REGS))),
        (SYS_ioctl, Some((1, KVM_GET_SREGS))),
    ],
    one_instruction: false,
};

const FRAMES: [Rule; 5] = [
    (SYS_read, Some((0, 0))),
    (SYS_write, Some((0, 1))),
    (
        SYS_futex,
        Some((1, (FUTEX_WAIT | FUTEX_PRIVATE_FLAG) as u32)),
    ),
    (
        SYS_futex,
        Some((1, (FUTEX_WAKE | FUTEX_PRIVATE_FLAG) as u32)),
    ),
    (SYS_exit_group, None),
];

/// Locks every thread of this process. They must have started: a new thread makes other calls.
pub fn lock(policy: &Policy) -> Result<(), String> {
    let program = program(policy);
    let header = sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: header and program outlive the call, which copies them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &header,
        )
    };
    match result {
        0 => Ok(()),
        thread if thread > 0 => Err(format!("seccomp does not reach thread {thread}")),
        _ => sys::check("seccomp (a kernel with seccomp filters is needed)", -1).map(drop),
    }
}

fn program(policy: &Policy) -> Vec<sock_filter> {
    let mut program = Vec::new();
    require(&mut program, ARCH, AUDIT_ARCH_X86_64);
    if policy.one_instruction {
        require(&mut program, INSTRUCTION_POINTER, sys::gate() as u32);
        require(
            &mut program,
            INSTRUCTION_POINTER + 4,
            (sys::gate() >> 32) as u32,
        );
    }
    for &(number, argument) in policy.rules {
        program.push(load(NUMBER));
        match argument {
            Some((index, value)) => program.extend([
                unless(number as u32, 3),
                load(ARGUMENTS + 8 * index),
                unless(value, 1),
            ]),
            None => program.push(unless(number as u32, 1)),
        }
        program.push(answer(SECCOMP_RET_ALLOW));
    }
    program.push(answer(SECCOMP_RET_KILL_PROCESS));
    program
}

/// Kills the process where the word at `offset` is another.
fn require(program: &mut Vec<sock_filter>, offset: u32, value: u32) {
    let mut equal = unless(value, 0);
    equal.jt = 1;
    program.extend([load(offset), equal, answer(SECCOMP_RET_KILL_PROCESS)]);
}

fn load(offset: u32) -> sock_filter {
    instruction(BPF_LD | BPF_W | BPF_ABS, offset, 0)
}

/// Skips `skip` instructions unless the loaded word is `value`.
fn unless(value: u32, skip: u8) -> sock_filter {
    instruction(BPF_JMP | BPF_JEQ | BPF_K, value, skip)
}

fn answer(action: u32) -> sock_filter {
    instruction(BPF_RET | BPF_K, action, 0)
}

fn instruction(code: u32, k: u32, jf: u8) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    }
}
