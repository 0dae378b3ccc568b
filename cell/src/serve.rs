//! Threads and frames: the first thread carries a request in and the reply out, the others help
//! while it is inside.

use crate::{
    cpu::{Placement, pin},
    filter::{self, Policy},
    memory::{BODY, BODY_BYTES, MAILBOX},
    sys,
};
use std::{
    convert::Infallible,
    ptr,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
};

/// One thread slot of the image.
pub trait Slot: Send + 'static {
    /// Runs the image on the calling thread until it leaves by its gate. Returns the gate's code.
    fn enter(&mut self) -> u32;
}

/// Codes of the image's gate.
const DONE: u32 = 0;
const IDLE: u32 = 1;
const REFUSED: u32 = 2;

/// Nanoseconds that a helping thread leaves its core to others: at first when work had come and then
/// came none, twice as long each time that it came back for nothing, at most the last.
const PAUSES: [i64; 2] = [50_000, 1_000_000];

/// 1 while the first thread is inside: the others enter, else they sleep on it.
static INSIDE: AtomicU32 = AtomicU32::new(0);
static STARTED: AtomicU32 = AtomicU32::new(0);
static UNPINNED: Mutex<Option<String>> = Mutex::new(None);

/// A frame lies in the mailbox so that its message is the body: one read and one write carry it
/// whole. Its length borrows the last four bytes of the header page, which are zero whenever the
/// image runs.
const FRAME: *mut u8 = (BODY - 4) as *mut u8;
const REQUEST_BYTES: *mut u64 = MAILBOX as *mut u64;
const REPLY_BYTES: *mut u64 = (MAILBOX + 8) as *mut u64;

/// Starts the threads, locks the process, says ready, and serves until the host closes its end.
pub fn serve<S: Slot>(
    slots: Vec<S>,
    placement: Placement,
    policy: Policy,
) -> Result<Infallible, String> {
    let threads = slots.len();
    let mut slots = slots.into_iter().enumerate();
    let (_, mut first) = slots.next().ok_or("no thread slot")?;
    settle(placement.core(0));
    for (index, mut slot) in slots {
        let core = placement.core(index);
        thread::Builder::new()
            .spawn(move || {
                settle(core);
                help(index, &mut slot)
            })
            .map_err(|e| format!("thread {index} does not start: {e}"))?;
    }
    while (STARTED.load(SeqCst) as usize) < threads {
        thread::yield_now();
    }
    let ready = ready(threads, &placement);
    filter::lock(&policy)?;
    send(ready.as_bytes());
    loop {
        receive();
        INSIDE.store(1, SeqCst);
        if threads > 1 {
            sys::wake(&INSIDE);
        }
        match first.enter() {
            DONE => {}
            code => fail(0, code),
        }
        INSIDE.store(0, SeqCst);
        reply();
    }
}

/// Everything that a new thread does before it may be locked.
fn settle(core: Option<usize>) {
    if let Some(Err(reason)) = core.map(pin)
        && let Ok(mut unpinned) = UNPINNED.lock()
    {
        unpinned.get_or_insert(reason);
    }
    STARTED.fetch_add(1, SeqCst);
}

/// A helping thread: asleep while the first thread is outside, inside while there is work to share.
/// It leaves when none came for a while, and looks again after a pause or at the next request.
fn help<S: Slot>(index: usize, slot: &mut S) -> ! {
    let [first, last] = PAUSES;
    let mut pause = libc::timespec {
        tv_sec: 0,
        tv_nsec: first,
    };
    loop {
        while INSIDE.load(SeqCst) == 0 {
            sys::wait(&INSIDE, 0, None);
            pause.tv_nsec = first;
        }
        match slot.enter() {
            DONE => pause.tv_nsec = first,
            IDLE => pause.tv_nsec = last.min(2 * pause.tv_nsec),
            code => fail(index, code),
        }
        sys::wait(&INSIDE, 1, Some(&pause));
    }
}

fn fail(slot: usize, code: u32) -> ! {
    match code {
        REFUSED => sys::die(format_args!(
            "the enclave refused thread slot {slot}: it has no such slot, or the slot is in use"
        )),
        0xff => sys::die(format_args!("the enclave panicked in thread slot {slot}")),
        _ => sys::die(format_args!(
            "the enclave left thread slot {slot} with the unknown code {code:#x}"
        )),
    }
}

fn ready(threads: usize, placement: &Placement) -> String {
    let failed = UNPINNED.lock().ok().and_then(|mut reason| reason.take());
    let (cores, unpinned) = match (placement, failed) {
        (Placement::Pinned(cores), None) => (cores.as_slice(), None),
        (Placement::Pinned(_), reason) => (&[][..], reason),
        (Placement::Unpinned(reason), _) => (&[][..], Some(reason.clone())),
    };
    // Debug form of numbers and of these plain sentences is JSON.
    let unpinned = unpinned.map_or("null".to_owned(), |reason| format!("{reason:?}"));
    format!("{{\"threads\": {threads}, \"cores\": {cores:?}, \"unpinned\": {unpinned}}}")
}

/// Waits for a request and leaves it in the mailbox, not a byte of the next one with it, which may
/// wait already; ends the cell when the host has closed its end.
fn receive() {
    let mut have = 0;
    let mut want = 4;
    while have < want {
        // SAFETY: FRAME is followed by the mailbox's body, and no thread is inside.
        match unsafe { sys::read(FRAME.add(have), want - have) } {
            Ok(0) if have == 0 => sys::exit(0),
            Ok(0) => sys::die(format_args!("the host closed its end within a request")),
            Ok(got) => have += got,
            Err(libc::EINTR) => {}
            Err(error) => sys::die(format_args!("reading a request failed with error {error}")),
        }
        if have == 4 {
            // SAFETY: the four bytes were just read.
            want = 4 + unsafe { FRAME.cast::<u32>().read() } as usize;
        }
        if want > 4 + BODY_BYTES {
            sys::die(format_args!(
                "the host sent a request of {} bytes, more than {BODY_BYTES}",
                want - 4
            ));
        }
    }
    // SAFETY: the header is ours while the first thread is outside.
    unsafe {
        FRAME.cast::<u32>().write(0);
        REQUEST_BYTES.write_volatile((want - 4) as u64);
        REPLY_BYTES.write_volatile(0);
    }
}

/// Sends what the enclave left in the mailbox.
fn reply() {
    // SAFETY: the header is mapped; the enclave may have left anything there.
    let bytes = unsafe { REPLY_BYTES.read_volatile() };
    if bytes > BODY_BYTES as u64 {
        sys::die(format_args!(
            "the enclave left a reply of {bytes} bytes, more than {BODY_BYTES}"
        ));
    }
    // SAFETY: FRAME is followed by the mailbox's body.
    let sent = unsafe {
        FRAME.cast::<u32>().write(bytes as u32);
        let sent = sys::write(FRAME, 4 + bytes as usize);
        FRAME.cast::<u32>().write(0);
        sent
    };
    if sent.is_err() {
        sys::exit(0) // the host has closed its end
    }
}

fn send(message: &[u8]) {
    // SAFETY: the message is far shorter than the body that follows FRAME, and no thread is inside.
    unsafe { ptr::copy_nonoverlapping(message.as_ptr(), BODY as *mut u8, message.len()) };
    // SAFETY: as above.
    unsafe { REPLY_BYTES.write_volatile(message.len() as u64) };
    reply();
    // SAFETY: as above.
    unsafe { ptr::write_bytes(BODY as *mut u8, 0, message.len()) };
}
