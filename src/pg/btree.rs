//! The upper levels of a B-tree, as its pages tell them.
//!
//! Only what is needed to find the pages above the leaves is read. Pages may be
//! split or deleted between two looks, or be damaged: what does not fit is left
//! out, and nothing is believed that could lead astray.

use pgrx::pg_sys;

use crate::blocks::BlockNumber;

/// The block of an index that tells where the root is.
pub const METAPAGE: BlockNumber = 0;

/// A copy of a page.
pub type Page = [u8; pg_sys::BLCKSZ as usize];

const MAGIC: u32 = 0x0005_3162;
const HEADER_SIZE: usize = 24;
const ITEM_ID_SIZE: usize = 4;
/// Where the header says that the item identifiers end, and that the page's
/// special space begins.
const LOWER_AT: usize = 12;
const SPECIAL_AT: usize = 16;
/// In the special space: the right sibling, the level, the flags.
const SPECIAL_SIZE: usize = 16;
const RIGHT_SIBLING_AT: usize = 4;
const LEVEL_AT: usize = 8;
const FLAGS_AT: usize = 12;
const LEAF: u16 = 1 << 0;
const DELETED: u16 = 1 << 2;
const META: u16 = 1 << 3;
const HALF_DEAD: u16 = 1 << 4;

fn bytes<const N: usize>(page: &Page, at: usize) -> Option<[u8; N]> {
    page.get(at..)?.first_chunk().copied()
}

fn u16_at(page: &Page, at: usize) -> Option<u16> {
    bytes(page, at).map(u16::from_ne_bytes)
}

fn u32_at(page: &Page, at: usize) -> Option<u32> {
    bytes(page, at).map(u32::from_ne_bytes)
}

/// The root's block and its level, leaves being of level 0; nothing where the
/// index is empty.
pub fn root(metapage: &Page) -> Option<(BlockNumber, u32)> {
    let root = u32_at(metapage, HEADER_SIZE + 8)?;
    let level = u32_at(metapage, HEADER_SIZE + 12)?;
    let is_meta = u32_at(metapage, HEADER_SIZE)? == MAGIC;
    (is_meta && root != METAPAGE).then_some((root, level))
}

/// The blocks that a page of that level points down to.
pub fn children(page: &Page, level: u32) -> Vec<BlockNumber> {
    try_children(page, level).unwrap_or_default()
}

fn try_children(page: &Page, level: u32) -> Option<Vec<BlockNumber>> {
    let special = usize::from(u16_at(page, SPECIAL_AT)?);
    let flags = u16_at(page, special + FLAGS_AT)?;
    if special != page.len() - SPECIAL_SIZE
        || flags & (LEAF | DELETED | META | HALF_DEAD) != 0
        || u32_at(page, special + LEVEL_AT)? != level
    {
        return None;
    }
    let is_rightmost = u32_at(page, special + RIGHT_SIBLING_AT)? == METAPAGE;
    let items = usize::from(u16_at(page, LOWER_AT)?).checked_sub(HEADER_SIZE)? / ITEM_ID_SIZE;
    // The first item of all pages but the rightmost is their upper bound.
    (usize::from(!is_rightmost)..items)
        .map(|item| {
            let id = u32_at(page, HEADER_SIZE + item * ITEM_ID_SIZE)?;
            let offset = match cfg!(target_endian = "little") {
                true => id & 0x7fff,
                false => id >> 17,
            } as usize;
            // A downlink: the block number's upper half, then its lower.
            let (high, low) = (u16_at(page, offset)?, u16_at(page, offset + 2)?);
            Some(u32::from(high) << 16 | u32::from(low))
        })
        .collect()
}
