//! The upper levels of a B-tree: where its root is, and what its pages point to.
//!
//! Pages may be split or deleted between two reads, or be damaged. So every offset and
//! number is checked, and a page that does not fit has no children.

use std::mem::offset_of;

use pgrx::pg_sys::{self, BTMetaPageData, BTPageOpaqueData, ItemIdData, PageHeaderData};

use super::buffer::Page;
use crate::blocks::BlockNumber;

/// The block of an index that says where the root is.
pub const METAPAGE: BlockNumber = pg_sys::BTREE_METAPAGE;

const HEADER_SIZE: usize = offset_of!(PageHeaderData, pd_linp);
const SPECIAL_SIZE: usize = size_of::<BTPageOpaqueData>();

/// The root's block and its level. Leaves have level 0. `None` if the index is empty.
pub fn root(metapage: &Page) -> Option<(BlockNumber, u32)> {
    let field = |at| u32_at(metapage, HEADER_SIZE + at);
    let root = field(offset_of!(BTMetaPageData, btm_root))?;
    let level = field(offset_of!(BTMetaPageData, btm_level))?;
    let is_meta = field(offset_of!(BTMetaPageData, btm_magic))? == pg_sys::BTREE_MAGIC;
    (is_meta && root != pg_sys::P_NONE).then_some((root, level))
}

/// The blocks that a page of that level points down to.
pub fn children(page: &Page, level: u32) -> Vec<BlockNumber> {
    try_children(page, level).unwrap_or_default()
}

fn try_children(page: &Page, level: u32) -> Option<Vec<BlockNumber>> {
    const NO_CHILDREN: u32 =
        pg_sys::BTP_LEAF | pg_sys::BTP_DELETED | pg_sys::BTP_META | pg_sys::BTP_HALF_DEAD;
    let special = usize::from(u16_at(page, offset_of!(PageHeaderData, pd_special))?);
    let flags = u16_at(page, special + offset_of!(BTPageOpaqueData, btpo_flags))?;
    if special != page.len() - SPECIAL_SIZE
        || u32::from(flags) & NO_CHILDREN != 0
        || u32_at(page, special + offset_of!(BTPageOpaqueData, btpo_level))? != level
    {
        return None;
    }
    let right = u32_at(page, special + offset_of!(BTPageOpaqueData, btpo_next))?;
    let lower = usize::from(u16_at(page, offset_of!(PageHeaderData, pd_lower))?);
    let items = lower.checked_sub(HEADER_SIZE)? / size_of::<ItemIdData>();
    // The first item is the page's upper bound, except on the rightmost page.
    let first = usize::from(right != pg_sys::P_NONE);
    (first..items)
        .map(|item| {
            let id = HEADER_SIZE + item * size_of::<ItemIdData>();
            let offset = item_offset(bytes(page, id)?);
            // An index tuple begins with a block number: its upper half, then its lower.
            let (high, low) = (u16_at(page, offset)?, u16_at(page, offset + 2)?);
            Some(u32::from(high) << 16 | u32::from(low))
        })
        .collect()
}

/// Where an item is on its page.
fn item_offset(id: [u8; 4]) -> usize {
    let item = ItemIdData {
        _bitfield_1: pg_sys::__BindgenBitfieldUnit::new(id),
        ..Default::default()
    };
    item.lp_off() as usize
}

fn u16_at(page: &Page, at: usize) -> Option<u16> {
    bytes(page, at).map(u16::from_ne_bytes)
}

fn u32_at(page: &Page, at: usize) -> Option<u32> {
    bytes(page, at).map(u32::from_ne_bytes)
}

fn bytes<const N: usize>(page: &Page, at: usize) -> Option<[u8; N]> {
    page.get(at..)?.first_chunk().copied()
}
