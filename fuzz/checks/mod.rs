//! Checks that must hold for every input. The fuzz targets run them on generated inputs,
//! and the test `fuzz_corpus` on those of the corpus.

pub mod list;
mod memory;
pub mod plan;
pub mod upstream;
