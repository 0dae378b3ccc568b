//! The machine that a session runs on: linker tables, heap, workspaces, kernels, entropy.

use core::arch::x86_64::{_rdrand64_step, _rdseed64_step};
use core::ffi::c_void;
use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicPtr, AtomicUsize, Ordering::Relaxed};

use myelin_protocol::Refusal;
use myelin_runtime::Machine;

use crate::entry::{SLOTS, slot, slots};
use crate::memory::wipe;
use crate::{table, threads};

/// Most arguments of a kernel.
const ARGUMENTS: usize = 14;
/// A kernel. All are called with this many pointers, because in the System V convention that is the same call for a
/// kernel of fewer: six go in registers that the callee may change anyway, the others lie in the caller's frame, which
/// the caller alone removes. One signature keeps fourteen transmutes of function pointers out of the image.
type Kernel = unsafe extern "C" fn(
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
    *mut u8,
) -> i32;

/// Times that a random instruction is asked again; it fails at random when many threads ask.
const TRIES: usize = 1000;

/// The one machine of the image.
pub struct Gate {
    heap_taken: bool,
}

impl Gate {
    /// The machine; made once, by the session's only thread.
    pub fn new() -> Self {
        Self { heap_taken: false }
    }
}

impl Machine for Gate {
    fn description(&self) -> &'static [u8] {
        unsafe extern "C" {
            static __description: u8;
            static __description_end: u8;
        }
        // SAFETY: the linker script writes this table.
        unsafe { table(&__description, &__description_end) }
    }

    fn slots(&self) -> usize {
        slots()
    }

    fn kernels(&self) -> usize {
        kernels().len()
    }

    fn heap(&mut self) -> &'static mut [u8] {
        unsafe extern "C" {
            static __heap: [usize; 2];
        }
        assert!(!self.heap_taken, "the heap is handed out once");
        self.heap_taken = true;
        // SAFETY: the linker script writes this table.
        let [start, end] = unsafe { __heap };
        // SAFETY: the range is this image's own and mapped, nothing else lies there, any byte is one, and it is handed
        // out once.
        unsafe {
            core::slice::from_raw_parts_mut(ptr::with_exposed_provenance_mut(start), end - start)
        }
    }

    fn set_workspaces(&mut self, memory: &'static mut [u8], bytes: usize) {
        let enough = slots().checked_mul(bytes).is_some_and(|needed| needed <= memory.len());
        assert!(enough, "every slot has a workspace");
        assert!(bytes.is_multiple_of(64), "workspaces are whole cache lines");
        WORKSPACE_BYTES.store(bytes, Relaxed);
        WORKSPACES.store(memory.as_mut_ptr(), Relaxed);
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), Refusal> {
        for bytes in out.chunks_mut(8) {
            let word = (seed()? ^ random()?).to_ne_bytes();
            bytes.iter_mut().zip(word).for_each(|(to, from)| *to = from);
        }
        Ok(())
    }

    fn call(
        &mut self,
        k: usize,
        arena: &mut [u8],
        arguments: &[(u32, u32)],
    ) -> Result<(), Refusal> {
        let kernel = *kernels().get(k).ok_or(Refusal::KernelFailed)?;
        if arguments.len() > ARGUMENTS {
            return Err(Refusal::KernelFailed);
        }
        let mut pointers = [ptr::null_mut(); ARGUMENTS];
        for (pointer, &(offset, bytes)) in pointers.iter_mut().zip(arguments) {
            let rest = arena.get_mut(offset as usize..).ok_or(Refusal::KernelFailed)?;
            let argument = rest.get_mut(..bytes as usize).ok_or(Refusal::KernelFailed)?;
            *pointer = argument.as_mut_ptr();
        }
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n] = pointers;
        // A kernel that failed may have kept its workspaces.
        WORKSPACE_USED.iter().for_each(|used| used.store(0, Relaxed));
        // SAFETY: the table holds the image's kernels, which the compiler proved to stay inside arguments of the sizes
        // that the description states; the session passes those sizes, and each range was just checked.
        match unsafe { kernel(a, b, c, d, e, f, g, h, i, j, k, l, m, n) } {
            0 => Ok(()),
            _ => Err(Refusal::KernelFailed),
        }
    }

    fn parallel_chunks<T: Send>(
        &mut self,
        out: &mut [T],
        chunk: usize,
        f: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        threads::chunks(out, chunk, f);
    }

    fn wipe(&mut self) {
        let (start, bytes) = (WORKSPACES.load(Relaxed), WORKSPACE_BYTES.load(Relaxed) * slots());
        if !start.is_null() {
            // SAFETY: handed over for good by `set_workspaces`; no kernel runs, so nobody else uses it.
            wipe(unsafe { core::slice::from_raw_parts_mut(start, bytes) });
        }
    }
}

/// The image's kernels.
fn kernels() -> &'static [Kernel] {
    unsafe extern "C" {
        static __kernels: Kernel;
        static __kernels_end: Kernel;
    }
    // SAFETY: the linker script writes this table of addresses.
    unsafe { table(&__kernels, &__kernels_end) }
}

/// A word of the processor's entropy source.
fn seed() -> Result<u64, Refusal> {
    // SAFETY: every level that the enclave is built for has the instruction, and the cell checks the processor.
    ask(|word| unsafe { _rdseed64_step(word) })
}

/// A word of the processor's random generator.
fn random() -> Result<u64, Refusal> {
    // SAFETY: as for `seed`.
    ask(|word| unsafe { _rdrand64_step(word) })
}

/// Asks until `step` succeeds. Broken processors were seen to answer all zeros or all ones: those do not count.
fn ask(step: impl Fn(&mut u64) -> i32) -> Result<u64, Refusal> {
    for _ in 0..TRIES {
        let mut word = 0;
        if step(&mut word) == 1 && word != 0 && word != u64::MAX {
            return Ok(word);
        }
        spin_loop();
    }
    Err(Refusal::RandomnessFailed)
}

/// Where the workspaces lie, bytes of each, and how much of each slot's is used: a stack, because kernels free in
/// reverse order. Kernels allocate inside tasks too, so each slot has its own.
static WORKSPACES: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
static WORKSPACE_BYTES: AtomicUsize = AtomicUsize::new(0);
static WORKSPACE_USED: [AtomicUsize; SLOTS] = [const { AtomicUsize::new(0) }; SLOTS];

/// TVM's workspace: null when the slot's is full, upon which the kernel fails.
extern "C" fn allocate(_device: i32, _id: i32, bytes: u64, _code: i32, _bits: i32) -> *mut c_void {
    let (slot, capacity) = (slot(), WORKSPACE_BYTES.load(Relaxed));
    let Some(used) = WORKSPACE_USED.get(slot) else { return ptr::null_mut() };
    let start = used.load(Relaxed);
    let end = usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_next_multiple_of(64));
    let end = end.and_then(|bytes| bytes.checked_add(start)).filter(|end| *end <= capacity);
    let Some(end) = end else { return ptr::null_mut() };
    used.store(end, Relaxed);
    WORKSPACES.load(Relaxed).wrapping_add(slot * capacity + start).cast()
}

/// Frees a workspace and everything allocated after it.
extern "C" fn free(_device: i32, _id: i32, pointer: *mut c_void) -> i32 {
    let (slot, capacity) = (slot(), WORKSPACE_BYTES.load(Relaxed));
    let base = WORKSPACES.load(Relaxed).addr().wrapping_add(slot * capacity);
    let start = pointer.addr().wrapping_sub(base);
    match WORKSPACE_USED.get(slot) {
        Some(used) if start <= used.load(Relaxed) => used.store(start, Relaxed),
        _ => return -1,
    }
    0
}

/// Kernels call through these cells, as in `threads`.
#[unsafe(no_mangle)]
static __TVMBackendAllocWorkspace: extern "C" fn(i32, i32, u64, i32, i32) -> *mut c_void = allocate;
#[unsafe(no_mangle)]
static __TVMBackendFreeWorkspace: extern "C" fn(i32, i32, *mut c_void) -> i32 = free;
