//! Reading the upper levels of indexes, which every index scan goes through.
//!
//! They are few blocks, scattered over the index. The caller alone reads them, level
//! by level, before everything else. Of an index that is not a B-tree, only the first
//! block is read, which most access methods use as their metapage or root. This is
//! done in mode `buffer` only.

use rustc_hash::FxHashSet;

use super::collect::{Class, Collected};
use super::job::{Share, Target};
use super::read::Work;
use crate::blocks::{BlockNumber, Fork};
use crate::pg::storage::btree;

/// Reads the upper levels of an index, at most `max` blocks, and returns the numbers of
/// the blocks read, sorted.
pub fn read(share: &Share, part: &Collected, target: &Target, max: u64) -> Vec<BlockNumber> {
    if part.class != Class::Index || part.part.fork != Fork::Main || part.blocks == 0 || max == 0 {
        return Vec::new();
    }
    let mut done = FxHashSet::default();
    let mut root = None;
    share.read(
        target,
        Work::List(&[btree::METAPAGE]),
        &mut |block, buffer| {
            done.insert(block);
            if part.is_btree {
                root = btree::root(&buffer.copy_page());
            }
        },
    );
    let Some((root, mut level)) = root else {
        return sorted(done);
    };
    let mut blocks = vec![root];
    while level > 0
        && !blocks.is_empty()
        && target.change().is_none()
        && share.header.full().is_none()
    {
        blocks.retain(|&block| block < part.blocks && !done.contains(&block));
        let left = max.saturating_sub(done.len() as u64);
        blocks.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        let mut children = Vec::new();
        share.read(target, Work::List(&blocks), &mut |block, buffer| {
            done.insert(block);
            // The children of a block of level 1 are leaves, which are not upper levels.
            if level > 1 {
                children.extend(btree::children(&buffer.copy_page(), level));
            }
        });
        children.sort_unstable();
        children.dedup();
        blocks = children;
        level -= 1;
    }
    sorted(done)
}

fn sorted(blocks: FxHashSet<BlockNumber>) -> Vec<BlockNumber> {
    let mut blocks: Vec<_> = blocks.into_iter().collect();
    blocks.sort_unstable();
    blocks
}
