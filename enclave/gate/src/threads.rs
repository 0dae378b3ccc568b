//! Parallel loops. The main thread posts one loop at a time and waits for its tasks; every thread inside takes tasks.
//! Which thread runs a task never changes a result: the tasks and their number are fixed by the loop alone.

use core::ffi::c_void;
use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use crate::entry::{dead, die, slots};

/// A task in TVM's form: (number of the task, environment, data of the loop) → 0 or failure.
type Task = unsafe extern "C" fn(i32, *mut Environment, *mut c_void) -> i32;

/// TVM's `TVMParallelGroupEnv`.
#[repr(C)]
struct Environment {
    sync: *mut c_void,
    tasks: i32,
}

/// Tasks a slot in a kernel's loop, so that a thread that was held up does not hold up the rest.
const TASKS_PER_SLOT: usize = 2;
/// Most tasks of one loop.
const MOST_TASKS: usize = 0xffff;
/// Pauses that a worker waits for a loop before it leaves (docs/image.md, "Threads").
const PATIENCE: u32 = 20_000;

/// The posted loop: generation << 32 | end << 16 | first, of the tasks that nobody has taken. The main thread takes the
/// first, the others the last, so that loops over the same rows leave each thread its own in its own cache. A task is
/// taken by a compare-and-swap of the whole word, and the rest below changes only when every task of the old word is
/// done: a late worker cannot mix two loops.
static TICKET: AtomicU64 = AtomicU64::new(0);
static TASKS: AtomicU32 = AtomicU32::new(0);
static TASK: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static DATA: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static FINISHED: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicBool = AtomicBool::new(false);
/// A loop is posted: a task may not start another.
static LOOPING: AtomicBool = AtomicBool::new(false);

/// The main thread is inside.
static WORKING: AtomicBool = AtomicBool::new(false);

/// Runs the main thread's `work`.
pub fn main(work: fn()) {
    WORKING.store(true, Relaxed);
    work();
    WORKING.store(false, Relaxed);
}

/// Takes tasks of loops until none came for a while, or none can come: the host has better use for the core then.
/// True if any came.
pub fn serve() -> bool {
    let (mut idle, mut worked) = (0, false);
    while idle < PATIENCE && WORKING.load(Relaxed) {
        if take(false) {
            (idle, worked) = (0, true);
        } else {
            if dead() {
                die()
            }
            idle += 1;
            spin_loop();
        }
    }
    worked
}

/// Runs `f(index, chunk)` for every chunk of `out` on all threads.
pub fn chunks<T: Send>(out: &mut [T], chunk: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
    struct Loop<'a, T> {
        out: *mut T,
        len: usize,
        chunk: usize,
        f: &'a (dyn Fn(usize, &mut [T]) + Sync),
    }
    unsafe extern "C" fn task<T>(
        number: i32,
        environment: *mut Environment,
        data: *mut c_void,
    ) -> i32 {
        // SAFETY: `take` passes its own environment and the data posted below, which outlives the loop.
        let (tasks, data) = unsafe { ((*environment).tasks as usize, &*data.cast::<Loop<T>>()) };
        for index in (number as usize..data.len.div_ceil(data.chunk)).step_by(tasks) {
            let start = index * data.chunk;
            let len = data.chunk.min(data.len - start);
            // SAFETY: inside `out`; chunks do not overlap and each index belongs to exactly one task.
            (data.f)(index, unsafe { core::slice::from_raw_parts_mut(data.out.add(start), len) });
        }
        0
    }
    assert!(chunk > 0, "a chunk holds something");
    let tasks = out.len().div_ceil(chunk).min(MOST_TASKS);
    let mut data = Loop { out: out.as_mut_ptr(), len: out.len(), chunk, f };
    let done = tasks == 0 || post(task::<T>, (&raw mut data).cast(), tasks);
    assert!(done, "a task may not start a loop");
}

/// Posts a loop, helps, and waits for its end. False if a task failed or this is itself a task.
fn post(task: Task, data: *mut c_void, tasks: usize) -> bool {
    if tasks == 0 || tasks > MOST_TASKS || LOOPING.swap(true, Acquire) {
        return false;
    }
    TASKS.store(tasks as u32, Relaxed);
    TASK.store(task as *mut c_void, Relaxed);
    DATA.store(data, Relaxed);
    FINISHED.store(0, Relaxed);
    FAILED.store(false, Relaxed);
    let generation = (TICKET.load(Relaxed) >> 32).wrapping_add(1);
    TICKET.store(generation << 32 | (tasks as u64) << 16, Release);
    while take(true) {}
    while FINISHED.load(Acquire) != tasks as u32 {
        if dead() {
            die()
        }
        spin_loop();
    }
    LOOPING.store(false, Release);
    !FAILED.load(Relaxed)
}

/// Takes and runs one task of the posted loop, the first or the last. False if there is none left.
fn take(main: bool) -> bool {
    let ticket = TICKET.load(Acquire);
    let (end, first) = (ticket >> 16 & 0xffff, ticket & 0xffff);
    if first >= end {
        return false;
    }
    let (number, left) = if main { (first, ticket + 1) } else { (end - 1, ticket - (1 << 16)) };
    let (tasks, task, data) = (TASKS.load(Relaxed), TASK.load(Relaxed), DATA.load(Relaxed));
    if TICKET.compare_exchange(ticket, left, AcqRel, Relaxed).is_err() {
        return true;
    }
    let mut environment = Environment { sync: ptr::null_mut(), tasks: tasks as i32 };
    // SAFETY: the ticket did not change between reading both and taking a task, so they are this loop's, posted as a
    // `Task` with its data; the loop waits for this task, so the data lives.
    let result = unsafe {
        core::mem::transmute::<*mut c_void, Task>(task)(number as i32, &mut environment, data)
    };
    if result != 0 {
        FAILED.store(true, Relaxed);
    }
    FINISHED.fetch_add(1, Release);
    true
}

/// TVM's parallel loop. `tasks` is 0 in generated code: the number is ours.
extern "C" fn launch(task: Task, data: *mut c_void, tasks: i32) -> i32 {
    let tasks =
        if tasks == 0 { TASKS_PER_SLOT * slots() } else { usize::try_from(tasks).unwrap_or(0) };
    if post(task, data, tasks) { 0 } else { -1 }
}

/// Kernels call through this cell, which is weak and writable in their object; ours is strong and read-only.
#[unsafe(no_mangle)]
static __TVMBackendParallelLaunch: extern "C" fn(Task, *mut c_void, i32) -> i32 = launch;
