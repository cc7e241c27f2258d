//! What the fuzz targets once found worth keeping, gone through again.

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
fn every_list_of_the_corpus_is_read_in_the_same_way_however_it_comes() {
    replay("list", checks::list::check);
}

#[test]
fn every_plan_of_the_corpus_holds_what_it_should() {
    replay("plan", checks::plan::check);
}
