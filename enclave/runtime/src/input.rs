//! One input: granted, opened, streamed in, checked.

use core::mem::replace;
use core::ops::Range;

use myelin_protocol::{CHUNK, CHUNK_TAG, Granted, HEADER, Refusal, Sealed, Send};
use sha2::{Digest, Sha256};

use crate::memory::{Memory, RECORD_HEADER, zero};

/// An input of the job.
pub struct Input {
    send: Send,
    /// Where its plaintext lies in the heap's inputs.
    place: Range<usize>,
    /// Bytes of a record.
    record: usize,
    state: State,
}

enum State {
    Waiting,
    Granted(Granted),
    Loading(Loading),
    Loaded(Shard, [u8; 32]),
    /// Something that it must not recover from was wrong.
    Dead,
}

struct Loading {
    sealed: Sealed,
    next: u64,
    hash: Sha256,
    commitment: [u8; 32],
}

/// The records of a loaded input.
#[derive(Clone)]
pub struct Shard {
    /// Where the records begin in the heap's inputs.
    pub start: usize,
    /// Records, padding included.
    pub capacity: u32,
    /// Real records, the first ones: a secret.
    pub count: u32,
}

impl Input {
    /// An input that waits for its grant.
    pub fn new(send: Send, place: Range<usize>, record: usize) -> Self {
        Input { send, place, record, state: State::Waiting }
    }

    /// What the job says of it.
    pub fn send(&self) -> Send {
        self.send
    }

    /// The records and the commitment, once everything is there and right.
    pub fn loaded(&self) -> Result<(&Shard, &[u8; 32]), Refusal> {
        match &self.state {
            State::Loaded(shard, commitment) => Ok((shard, commitment)),
            _ => Err(Refusal::InputMissing),
        }
    }

    /// Refuses a second grant.
    pub fn expects_grant(&self) -> Result<(), Refusal> {
        match self.state {
            State::Waiting => Ok(()),
            State::Dead => Err(Refusal::WrongState),
            _ => Err(Refusal::GrantDuplicate),
        }
    }

    /// Takes the grant.
    pub fn grant(&mut self, granted: Granted) {
        self.state = State::Granted(granted);
    }

    /// Ends the input for good.
    pub fn kill(&mut self) {
        self.state = State::Dead;
    }

    /// Begins the sealed file with `header`.
    pub fn open(&mut self, header: &[u8; HEADER]) -> Result<(), Refusal> {
        let granted = match &self.state {
            State::Granted(granted) => granted,
            State::Waiting => return Err(Refusal::GrantMissing),
            State::Dead => return Err(Refusal::WrongState),
            State::Loading(_) | State::Loaded(..) => return Err(Refusal::InputDuplicate),
        };
        let sealed = Sealed::open(&granted.key, header)?;
        if sealed.length() != self.place.len() as u64 {
            return Err(Refusal::CapacityWrong);
        }
        self.state = State::Loading(Loading {
            sealed,
            next: 0,
            hash: Sha256::new_with_prefix(header),
            commitment: granted.commitment,
        });
        Ok(())
    }

    /// Takes `chunks`, the first of which is number `first`; whatever is wrong with one ends the input for good.
    pub fn chunks(
        &mut self,
        memory: &mut Memory,
        first: u64,
        chunks: &[u8],
    ) -> Result<(), Refusal> {
        self.state = match replace(&mut self.state, State::Dead) {
            State::Loading(loading) => {
                self.take(memory, loading, first, chunks).inspect_err(|_| {
                    zero(memory.input_mut(self.place.clone()));
                })?
            }
            state => {
                self.state = state;
                return Err(match self.state {
                    State::Loaded(..) => Refusal::InputDuplicate,
                    _ => Refusal::WrongState,
                });
            }
        };
        Ok(())
    }

    fn take(
        &self,
        memory: &mut Memory,
        mut loading: Loading,
        first: u64,
        chunks: &[u8],
    ) -> Result<State, Refusal> {
        if first != loading.next {
            return Err(Refusal::ChunkOrder);
        }
        if chunks.is_empty() {
            return Err(Refusal::ChunkTagWrong);
        }
        // Chunk by chunk, so that what was hashed is still in the cache when it is decrypted.
        for chunk in chunks.chunks(CHUNK + CHUNK_TAG) {
            let (offset, bytes) = loading.sealed.chunk(loading.next).ok_or(Refusal::ChunkOrder)?;
            // Chunks of a sealed file as long as the place, as `open` checked, lie inside it.
            let start = self.place.start.saturating_add(offset);
            let place = memory.input_mut(start..start.saturating_add(bytes));
            loading.hash.update(chunk);
            loading.sealed.decrypt(loading.next, chunk, place)?;
            loading.next = loading.next.saturating_add(1);
        }
        if loading.next < loading.sealed.chunks() {
            return Ok(State::Loading(loading));
        }
        if loading.hash.finalize() != loading.commitment {
            return Err(Refusal::CommitmentWrong);
        }
        Ok(State::Loaded(self.shard(memory)?, loading.commitment))
    }

    /// Checks the record header of the plaintext.
    fn shard(&self, memory: &Memory) -> Result<Shard, Refusal> {
        let plaintext = memory.input(self.place.clone());
        let header: &[u8; RECORD_HEADER] =
            plaintext.first_chunk().ok_or(Refusal::RecordHeaderWrong)?;
        let (words, _) = header.as_chunks::<4>();
        let mut words = words.iter().copied().map(u32::from_le_bytes).skip(2);
        let mut word = || words.next().unwrap_or_default();
        let (count, capacity, record) = (word(), word(), word());
        let right = header.starts_with(b"MYRECORD")
            && u64::from(capacity) == self.send.capacity
            && (1..=capacity).contains(&count)
            && record as usize == self.record
            && words.all(|word| word == 0);
        let start = self.place.start.saturating_add(RECORD_HEADER);
        if right { Ok(Shard { start, capacity, count }) } else { Err(Refusal::RecordHeaderWrong) }
    }
}
