//! The mailbox (docs/protocol.md): untrusted memory outside the image, read once into private memory before anything
//! is parsed. Copies are whole aligned words, as Intel asks for enclaves (SA-00615, SA-00657).

use core::mem::MaybeUninit;

use myelin_protocol::Refusal;
use myelin_runtime::Session;

use crate::Owned;
use crate::entry::wipe_stack;
use crate::machine::Gate;
use crate::memory::{copy_words, wipe};

/// Address of the mailbox: request length, reply length, zero to 4096, then the body.
const MAILBOX: usize = 0x10_0000_0000;
const REPLY_LENGTH: usize = MAILBOX + 8;
const BODY: usize = MAILBOX + 4096;
/// Most bytes of a message.
const BODY_BYTES: usize = 1 << 20;

static REQUEST: Owned<[u8; BODY_BYTES]> = Owned::new([0; BODY_BYTES]);
static REPLY: Owned<[u8; BODY_BYTES]> = Owned::new([0; BODY_BYTES]);
static SESSION: Owned<MaybeUninit<Session<Gate>>> = Owned::new(MaybeUninit::uninit());
static STARTED: Owned<bool> = Owned::new(false);

/// Serves the request in the mailbox.
pub fn serve() {
    // SAFETY: slot 0 alone comes here, and one thread at a time holds it.
    let (request, reply, started, session) =
        unsafe { (REQUEST.get(), REPLY.get(), STARTED.get(), SESSION.get()) };
    if !*started {
        start(session);
        *started = true;
    }
    let mut length = 0u64;
    // SAFETY: the mailbox is mapped at this address, or the thread faults; `length` is a word.
    unsafe { copy_words((&raw mut length).cast(), MAILBOX as *const u64, 1) };
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let replied = match request.get_mut(..length) {
        Some(request) => {
            // SAFETY: `length` fits the buffer, whose size is a multiple of a word, and the mailbox.
            unsafe {
                copy_words(request.as_mut_ptr().cast(), BODY as *const u64, length.div_ceil(8));
            }
            // SAFETY: `start` wrote it.
            let replied = handle(unsafe { session.assume_init_mut() }, request, reply);
            wipe(request);
            wipe_stack();
            replied
        }
        None => refuse(reply, Refusal::MessageTooLong),
    };
    assert!(replied <= BODY_BYTES, "a reply fits its buffer");
    // The last word goes out whole: nothing older may stand in it.
    wipe(reply.get_mut(replied..replied.next_multiple_of(8)).unwrap_or_default());
    let length = replied as u64;
    // SAFETY: the reply fits the body of the mailbox, the length its place in the header.
    unsafe {
        copy_words(BODY as *mut u64, reply.as_ptr().cast(), replied.div_ceil(8));
        copy_words(REPLY_LENGTH as *mut u64, (&raw const length).cast(), 1);
    }
}

/// Makes the session. Not inlined, as below: its large frame is gone when requests are handled.
#[inline(never)]
fn start(session: &mut MaybeUninit<Session<Gate>>) {
    session.write(Session::new(Gate::new()));
}

#[inline(never)]
fn handle(session: &mut Session<Gate>, request: &[u8], reply: &mut [u8]) -> usize {
    session.handle(request, reply)
}

/// Writes the reply that says why nothing was done.
fn refuse(reply: &mut [u8], refusal: Refusal) -> usize {
    let status = refusal.status().to_le_bytes();
    let text = status.iter().chain(refusal.reason().as_bytes());
    reply.iter_mut().zip(text).map(|(to, from)| *to = *from).count()
}
