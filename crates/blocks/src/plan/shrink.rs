//! A plan that is made smaller, for a segment of shared memory that is.

#![expect(
    clippy::cast_possible_truncation,
    reason = "a plan's indexes have 32 bits"
)]

use std::collections::TryReserveError;

use super::{CHUNK_BLOCKS, Chunk, Plan, keep_most_used};

impl Plan {
    /// How many blocks are to be loaded.
    pub fn blocks(&self) -> u64 {
        self.keys.len() as u64
    }

    /// Keeps the hottest `most` blocks, in the order that they have.
    ///
    /// # Errors
    /// If memory is refused; the plan is of no use then.
    pub fn shrink(&mut self, most: u64) -> Result<(), TryReserveError> {
        // The old chunks say which file each place is of.
        let mut old: Vec<(usize, Chunk)> = Vec::new();
        old.try_reserve_exact(self.chunks.len())?;
        let place_of = |chunk: &Chunk| self.keys[chunk.first as usize].place();
        old.extend(self.chunks.iter().map(|chunk| (place_of(chunk), *chunk)));
        keep_most_used(&mut self.keys, |_| most);

        self.chunks.clear();
        let mut old = old.into_iter();
        let mut current = None;
        for (index, key) in self.keys.iter().enumerate() {
            if let Some(last) = self.chunks.last_mut()
                && current == Some(key.place())
                && last.count < CHUNK_BLOCKS
            {
                last.count += 1;
                continue;
            }
            let chunk = if current == Some(key.place()) {
                self.chunks.last().copied()
            } else {
                current = Some(key.place());
                let found = old.find(|(place, _)| *place == key.place());
                found.map(|(_, chunk)| chunk)
            };
            // There is room: no place has more chunks than before.
            self.chunks.push(Chunk {
                first: index as u32,
                count: 1,
                ..chunk.expect("each block was in a chunk")
            });
        }
        Ok(())
    }
}
