//! What holds for every list and every plan, checked for one input: the fuzz
//! targets make inputs up, and a test goes through those of the corpus.

// A target needs one of them, and neither all of the core.
#![allow(dead_code, unused_imports)]

#[path = "../../src/blocks/mod.rs"]
mod blocks;

pub mod list;
mod memory;
pub mod plan;
