//! Runs the checks of the fuzz targets on their corpus.

#![allow(clippy::cast_possible_truncation)]

use std::fs;
use std::path::Path;

mod checks;

fn replay(target: &str, check: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let inputs: Vec<_> = fs::read_dir(folder).unwrap().collect();
    assert!(inputs.len() > 50);
    for input in inputs {
        let path = input.unwrap().path();
        println!("{}", path.display());
        check(&fs::read(path).unwrap());
    }
}

#[test]
fn every_list_of_the_corpus_is_read_the_same_in_pieces_of_any_size() {
    replay("list", checks::list::check);
}

#[test]
fn every_plan_of_the_corpus_has_the_right_blocks_in_the_right_order() {
    replay("plan", checks::plan::check);
}

#[test]
fn every_upstream_list_of_the_corpus_is_refused_or_read_the_same_again() {
    replay("upstream", checks::upstream::check);
}
