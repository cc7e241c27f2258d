//! The upper levels of indexes, which every look-up goes through.
//!
//! They are few blocks, scattered over the index: the caller reads them alone,
//! level by level, before everything else. Of an index that is no B-tree, its first
//! block is taken, where most keep what they begin with. Only into shared buffers:
//! the other modes bring whole files.

use rustc_hash::FxHashSet;

use super::collect::{Class, Collected};
use super::job::{Share, Target};
use super::read::Work;
use crate::blocks::{BlockNumber, Fork};
use crate::pg::storage::btree;

/// Reads the upper levels of an index, at most so many blocks, and returns which
/// blocks that were, sorted.
pub fn read(share: &Share, part: &Collected, target: &Target, most: u64) -> Vec<BlockNumber> {
    if part.class != Class::Index || part.part.fork != Fork::Main || part.blocks == 0 || most == 0 {
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
        blocks.truncate(most.saturating_sub(done.len() as u64) as usize);
        let mut children = Vec::new();
        share.read(target, Work::List(&blocks), &mut |block, buffer| {
            done.insert(block);
            // What the lowest of them points to are leaves.
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
