//! A list of at most sixteen items, without a heap.

use crate::Refusal;

/// The most parties, sends and receives of a job.
pub const MOST: usize = 16;

/// At most [`MOST`] items, in order.
pub struct List<T> {
    items: [Option<T>; MOST],
    length: usize,
}

impl<T> List<T> {
    /// Adds an item, or refuses with `limit-exceeded`.
    pub fn push(&mut self, item: T) -> Result<(), Refusal> {
        *self.items.get_mut(self.length).ok_or(Refusal::LimitExceeded)? = Some(item);
        self.length = self.length.saturating_add(1);
        Ok(())
    }

    /// Drops all items.
    pub fn clear(&mut self) {
        self.items.iter_mut().for_each(|item| *item = None);
        self.length = 0;
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is no item.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The item at `index`.
    pub fn get(&self, index: usize) -> Option<&T> {
        self.items.get(index)?.as_ref()
    }

    /// The item at `index`, to change.
    pub fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.items.get_mut(index)?.as_mut()
    }

    /// The items in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.items.iter().flatten()
    }

    /// The items in order, to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.items.iter_mut().flatten()
    }
}

impl<T> Default for List<T> {
    fn default() -> Self {
        List { items: [const { None }; MOST], length: 0 }
    }
}
