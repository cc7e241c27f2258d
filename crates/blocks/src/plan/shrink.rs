//! A plan that is made smaller, for a segment of shared memory that is.

use std::collections::TryReserveError;

use super::Plan;

impl Plan {
    /// How many blocks are to be loaded.
    pub fn blocks(&self) -> u64 {
        self.keys.len() as u64
    }

    /// Keeps the `most` blocks with the highest usage counts, in the order that they have.
    /// The others join those that exceed the budget.
    ///
    /// # Errors
    /// If memory is refused; the plan is of no use then.
    pub fn shrink(&mut self, most: u64) -> Result<(), TryReserveError> {
        self.leave_out(|_| most)?;
        self.chunks.clear();
        self.divide_into_chunks()
    }
}
