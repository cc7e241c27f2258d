//! What holds for every list and every plan, checked for one input: the fuzz
//! targets make inputs up, and a test goes through those of the corpus.

pub mod list;
mod memory;
pub mod plan;
